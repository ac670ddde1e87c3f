"""See the keys at or before the query, aligned bottom-right when there are fewer queries."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def causal(q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk E"]):
    """Attend to the past."""
    i, j = sg.index(q, k)
    return sg.attend(q, k, v, where=j <= i)


CONFIGS = (
    Config("llama-3-8b", {"T": 4096, "S": 4096, "Hq": 32, "Hk": 8, "D": 128, "E": 128}),
    Config("llama-3-8b-decode", {"T": 1, "S": 8192, "Hq": 32, "Hk": 8, "D": 128, "E": 128}),
    Config("llama-2-7b", {"T": 4096, "S": 4096, "Hq": 32, "Hk": 32, "D": 128, "E": 128}),
    Config("qwen3-32b", {"T": 4096, "S": 4096, "Hq": 64, "Hk": 8, "D": 128, "E": 128}),
)
TEST_CONFIGS = (
    Config("odd", {"T": 13, "S": 13, "Hq": 6, "Hk": 2, "D": 5, "E": 7}),
    Config("chunk", {"T": 11, "S": 29, "Hq": 4, "Hk": 4, "D": 9, "E": 9}),
    Config("decode", {"T": 1, "S": 37, "Hq": 7, "Hk": 1, "D": 17, "E": 3}),
    Config("dead-rows", {"T": 9, "S": 5, "Hq": 3, "Hk": 3, "D": 8, "E": 8}, note="S < T"),
    Config("past-tiles", {"T": 67, "S": 131, "Hq": 10, "Hk": 5, "D": 40, "E": 24}),
)
