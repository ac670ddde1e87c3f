"""Compress, select and slide: native sparse attention (arXiv 2502.11089).

Three branches are summed with gates per head. The blocks to select are the ones whose compressed
entries have the most probability, summed over the heads of a group.
"""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def nsa(
    q: sg.Tensor["T Hq D"],
    k: sg.Tensor["S Hk D"],
    v: sg.Tensor["S Hk E"],
    g: sg.Tensor["T Hq 3"],
    phi_k: sg.Tensor["l D D"],
    phi_v: sg.Tensor["l E E"],
    *,
    l=32,  # noqa: E741
    d=16,
    L=64,
    n=16,
    W=512,
):
    """Attend to entries of `l` keys every `d`, to `n` blocks of `L` keys, and to the last `W`."""
    i, j = sg.index(q, k)
    grp = sg.head(q) // q.group
    kc, vc = (sg.compress(x, phi, width=l, stride=d) for x, phi in ((k, phi_k), (v, phi_v)))
    cmp = sg.attend(q, kc, vc, where=kc.end <= i)
    p = sg.score(q, kc, norm="softmax", where=kc.end <= i)
    blk = kc.blocks(L)
    imp = sg.reduce(p, "sum", by=(grp, i, blk))
    sel = sg.select(imp, topk=n, force=(blk < 1) | (blk == i // L) | (blk == i // L - 1))
    slc = sg.attend(q, k, v, where=(j <= i) & sel[grp, i, j // L])
    win = sg.attend(q, k, v, where=(j <= i) & (i - j < W))
    return sg.merge([cmp, slc, win], gates=g)


_PAPER = {"Hq": 64, "Hk": 4, "D": 192, "E": 128}
_SMALL = {"l": 4, "d": 2, "L": 8, "n": 3, "W": 5}
CONFIGS = (
    Config("nsa-27b", {"T": 8192, "S": 8192, **_PAPER}, note="the paper's model, 3B active"),
    Config("nsa-27b-decode", {"T": 1, "S": 65536, **_PAPER}),
    Config(
        "fla",
        {"T": 4096, "S": 4096, "Hq": 64, "Hk": 4, "D": 128, "E": 128},
        {"l": 64, "d": 64},
        "fla's port pools whole blocks",
    ),
)
TEST_CONFIGS = (
    Config("odd", {"T": 37, "S": 37, "Hq": 6, "Hk": 2, "D": 5, "E": 7}, _SMALL),
    Config("chunk", {"T": 7, "S": 43, "Hq": 4, "Hk": 4, "D": 9, "E": 3}, _SMALL),
    Config("decode", {"T": 1, "S": 71, "Hq": 3, "Hk": 1, "D": 8, "E": 8}, _SMALL),
    Config(
        "thrice",
        {"T": 29, "S": 53, "Hq": 7, "Hk": 1, "D": 6, "E": 10},
        {"l": 6, "d": 2, "L": 9, "n": 2, "W": 11},
        "blocks that are no multiple of the stride",
    ),
    Config("too-short", {"T": 3, "S": 3, "Hq": 2, "Hk": 1, "D": 4, "E": 4}, _SMALL, "no entry"),
    Config("dead-rows", {"T": 19, "S": 13, "Hq": 3, "Hk": 3, "D": 4, "E": 4}, _SMALL, "S < T"),
)
