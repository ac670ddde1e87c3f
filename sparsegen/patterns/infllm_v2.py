"""Select blocks by the best probability of the pooled keys they overlap: InfLLM-v2 (MiniCPM4)."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def infllm_v2(
    q: sg.Tensor["T Hq D"],
    k: sg.Tensor["S Hk D"],
    v: sg.Tensor["S Hk E"],
    *,
    width=32,
    stride=16,
    B=64,
    n=64,
    local=32,
):
    """Attend to `n` blocks of `B` keys per group, the first and the last `local` forced."""
    i, j = sg.index(q, k)
    grp = sg.head(q) // q.group
    kc = sg.compress(k, sg.mean, width=width, stride=stride)
    _, e = sg.index(q, kc)
    p = sg.score(q, kc, norm="softmax", where=kc.end <= i)
    blk = kc.blocks(B)
    best = sg.reduce(sg.reduce(p, "sum", by=(grp, i, e)), "max", by=(grp, i, blk))
    near = (blk <= i // B) & (blk > i // B - local)
    sel = sg.select(best, topk=n, force=(blk < 1) | near)
    return sg.attend(q, k, v, where=(j <= i) & sel[grp, i, j // B])


_MINICPM = {"Hq": 32, "Hk": 2, "D": 128, "E": 128}
CONFIGS = (
    Config("minicpm4-8b", {"T": 8192, "S": 16384, **_MINICPM}),
    Config("minicpm4-8b-decode", {"T": 1, "S": 65536, **_MINICPM}),
)
_SMALL = {"width": 4, "stride": 2, "B": 8, "n": 3, "local": 1}
TEST_CONFIGS = (
    Config("odd", {"T": 37, "S": 37, "Hq": 6, "Hk": 2, "D": 5, "E": 7}, _SMALL),
    Config("chunk", {"T": 7, "S": 43, "Hq": 4, "Hk": 4, "D": 9, "E": 3}, _SMALL),
    Config("decode", {"T": 1, "S": 71, "Hq": 3, "Hk": 1, "D": 8, "E": 8}, _SMALL),
    Config(
        "thrice",
        {"T": 29, "S": 53, "Hq": 7, "Hk": 1, "D": 6, "E": 10},
        {"width": 6, "stride": 2, "B": 9, "n": 4, "local": 2},
    ),
    Config("dead-rows", {"T": 19, "S": 13, "Hq": 3, "Hk": 3, "D": 4, "E": 4}, _SMALL, "S < T"),
)
