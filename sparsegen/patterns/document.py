"""See the past of the same document in a packed sequence."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def document(
    q: sg.Tensor["T Hq D"],
    k: sg.Tensor["S Hk D"],
    v: sg.Tensor["S Hk E"],
    doc: sg.Tensor["S", "int"],
):
    """Attend to earlier keys of equal document id; ids need not be sorted."""
    i, j = sg.index(q, k)
    return sg.attend(q, k, v, where=(j <= i) & (doc[i] == doc[j]))


CONFIGS = (
    Config("llama-3-8b-packed", {"T": 8192, "S": 8192, "Hq": 32, "Hk": 8, "D": 128, "E": 128}),
    Config("olmo-2-7b-packed", {"T": 4096, "S": 4096, "Hq": 32, "Hk": 32, "D": 128, "E": 128}),
)
TEST_CONFIGS = (
    Config("odd", {"T": 29, "S": 29, "Hq": 6, "Hk": 2, "D": 5, "E": 7}),
    Config("chunk", {"T": 11, "S": 43, "Hq": 4, "Hk": 4, "D": 9, "E": 9}),
    Config("decode", {"T": 1, "S": 37, "Hq": 7, "Hk": 1, "D": 17, "E": 3}),
    Config("dead-rows", {"T": 9, "S": 5, "Hq": 3, "Hk": 3, "D": 8, "E": 8}, note="S < T"),
    Config("past-tiles", {"T": 97, "S": 131, "Hq": 3, "Hk": 1, "D": 24, "E": 40}),
)
