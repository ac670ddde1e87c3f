"""Cap the score smoothly before the softmax: Gemma 2 (arXiv 2408.00118)."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def softcap(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk E"], *, cap=50.0, window=4096
):
    """Attend to a window of the past with cap * tanh(score / cap)."""
    i, j = sg.index(q, k)
    return sg.attend(
        q, k, v, where=(j <= i) & (i - j < window), mod=lambda s: cap * sg.tanh(s / cap)
    )


CONFIGS = (
    Config("gemma-2-9b", {"T": 8192, "S": 8192, "Hq": 16, "Hk": 8, "D": 256, "E": 256}),
    Config("gemma-2-27b", {"T": 8192, "S": 8192, "Hq": 32, "Hk": 16, "D": 128, "E": 128}),
    Config("gemma-2-2b-decode", {"T": 1, "S": 8192, "Hq": 8, "Hk": 4, "D": 256, "E": 256}),
)
TEST_CONFIGS = (
    Config("odd", {"T": 13, "S": 13, "Hq": 6, "Hk": 2, "D": 5, "E": 7}, {"cap": 0.5}),
    Config(
        "chunk", {"T": 11, "S": 29, "Hq": 4, "Hk": 4, "D": 9, "E": 9}, {"cap": 2.0, "window": 7}
    ),
    Config("decode", {"T": 1, "S": 37, "Hq": 7, "Hk": 1, "D": 17, "E": 3}, {"window": 11}),
    Config("dead-rows", {"T": 9, "S": 5, "Hq": 3, "Hk": 3, "D": 8, "E": 8}, note="S < T"),
    Config(
        "past-tiles",
        {"T": 67, "S": 131, "Hq": 10, "Hk": 5, "D": 24, "E": 40},
        {"cap": 1.5, "window": 53},
    ),
)
