"""Score blocks by sums over antidiagonals: XAttention (arXiv 2503.16428)."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def xattention(
    q: sg.Tensor["T Hq D"],
    k: sg.Tensor["S Hk D"],
    v: sg.Tensor["S Hk E"],
    *,
    stride=8,
    B=128,
    mass=0.9,
):
    """Attend to the fewest blocks of `B` by `B` that hold `mass` of the estimated probability."""
    i, j = sg.index(q, k)
    h = sg.head(q)
    anti = (j <= i) & (i % stride + j % stride == stride - 1)
    s = sg.score(q, k, where=anti)
    tile = sg.reduce(s, "sum", by=(h, i // stride, j // stride), norm="softmax")
    block = sg.reduce(tile, "sum", by=(h, i // B, j // B))
    sel = sg.select(block, top_p=mass, force=(j // B == 0) | (j // B == i // B))
    return sg.attend(q, k, v, where=(j <= i) & sel[h, i // B, j // B])


CONFIGS = (
    Config(
        "llama-3.1-8b", {"T": 8192, "S": 8192, "Hq": 32, "Hk": 8, "D": 128, "E": 128}, {"stride": 8}
    ),
    Config(
        "qwen2-vl-7b",
        {"T": 8192, "S": 8192, "Hq": 28, "Hk": 4, "D": 128, "E": 128},
        {"stride": 16},
    ),
)
_SMALL = {"stride": 2, "B": 6, "mass": 0.7}
TEST_CONFIGS = (
    Config("odd", {"T": 37, "S": 37, "Hq": 6, "Hk": 2, "D": 5, "E": 7}, _SMALL),
    Config("chunk", {"T": 13, "S": 53, "Hq": 4, "Hk": 4, "D": 9, "E": 9}, _SMALL),
    Config("threes", {"T": 41, "S": 41, "Hq": 3, "Hk": 1, "D": 3, "E": 3}, {"stride": 3, "B": 9}),
    Config(
        "one-block", {"T": 11, "S": 11, "Hq": 2, "Hk": 1, "D": 4, "E": 4}, {"stride": 4, "B": 16}
    ),
    Config("dead-rows", {"T": 19, "S": 13, "Hq": 3, "Hk": 3, "D": 8, "E": 8}, _SMALL),
)
