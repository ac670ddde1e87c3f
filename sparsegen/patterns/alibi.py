"""Add a linear penalty on distance to the score: ALiBi (arXiv 2108.12409)."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def alibi(
    q: sg.Tensor["T Hq D"],
    k: sg.Tensor["S Hk D"],
    v: sg.Tensor["S Hk E"],
    slope: sg.Tensor["Hq"],
):
    """Attend to the past with score + slope[h] * (j - i)."""
    i, j = sg.index(q, k)
    h = sg.head(q)
    return sg.attend(q, k, v, where=j <= i, mod=lambda s: s + slope[h] * (j - i))


CONFIGS = (
    Config("bloom-7b", {"T": 2048, "S": 2048, "Hq": 32, "Hk": 32, "D": 128, "E": 128}),
    Config("mpt-7b", {"T": 2048, "S": 2048, "Hq": 32, "Hk": 32, "D": 128, "E": 128}),
    Config("mpt-7b-decode", {"T": 1, "S": 8192, "Hq": 32, "Hk": 32, "D": 128, "E": 128}),
)
TEST_CONFIGS = (
    Config("odd", {"T": 13, "S": 13, "Hq": 6, "Hk": 2, "D": 5, "E": 7}),
    Config("chunk", {"T": 11, "S": 29, "Hq": 4, "Hk": 4, "D": 9, "E": 9}),
    Config("decode", {"T": 1, "S": 37, "Hq": 7, "Hk": 1, "D": 17, "E": 3}),
    Config("dead-rows", {"T": 9, "S": 5, "Hq": 3, "Hk": 3, "D": 8, "E": 8}, note="S < T"),
    Config("past-tiles", {"T": 67, "S": 131, "Hq": 10, "Hk": 5, "D": 24, "E": 40}),
)
