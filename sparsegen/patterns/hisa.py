"""Select tokens in two steps, first blocks and then tokens inside them: HISA (arXiv 2603.28458)."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def hisa(
    q: sg.Tensor["T Hq c"],
    kv: sg.Tensor["S 1 c"],
    q_idx: sg.Tensor["T Hi e"],
    k_idx: sg.Tensor["S 1 e"],
    w: sg.Tensor["T Hi"],
    *,
    B=128,
    n=64,
    topk=2048,
    d_v=512,
):
    """Attend to `topk` tokens out of `n` blocks of `B`; the first and the own block are forced."""
    i, j = sg.index(q, kv)
    kb = sg.compress(k_idx, sg.mean, width=B, partial=True)
    _, e = sg.index(q_idx, kb)
    coarse = sg.score(q_idx, kb, act=sg.relu, weights=w, scale=1, where=kb.end <= i)
    near = (e == 0) | (e == i // B)
    blocks = sg.select(sg.reduce(coarse, "sum", by=(i, e)), topk=n, force=near)
    seen = (j <= i) & blocks[i, j // B]
    fine = sg.score(q_idx, k_idx, act=sg.relu, weights=w, scale=1, where=seen)
    sel = sg.select(sg.reduce(fine, "sum", by=(i, j)), topk=topk)
    return sg.attend(q, kv, kv[..., :d_v], where=(j <= i) & sel[i, j])


_V32 = {"Hq": 128, "c": 576, "Hi": 64, "e": 128}
CONFIGS = (
    Config("deepseek-v3.2", {"T": 4096, "S": 16384, **_V32}),
    Config("deepseek-v3.2-decode", {"T": 1, "S": 65536, **_V32}),
)
TEST_CONFIGS = (
    Config(
        "odd",
        {"T": 23, "S": 37, "Hq": 5, "c": 9, "Hi": 3, "e": 7},
        {"B": 5, "n": 3, "topk": 6, "d_v": 7},
    ),
    Config(
        "prefill",
        {"T": 41, "S": 41, "Hq": 3, "c": 6, "Hi": 2, "e": 5},
        {"B": 4, "n": 2, "topk": 5, "d_v": 4},
    ),
    Config(
        "decode",
        {"T": 1, "S": 83, "Hq": 7, "c": 20, "Hi": 1, "e": 3},
        {"B": 9, "n": 4, "topk": 13, "d_v": 16},
    ),
    Config(
        "all-blocks",
        {"T": 17, "S": 17, "Hq": 1, "c": 4, "Hi": 5, "e": 2},
        {"B": 3, "n": 9, "topk": 4, "d_v": 3},
    ),
    Config(
        "dead-rows",
        {"T": 9, "S": 5, "Hq": 3, "c": 5, "Hi": 3, "e": 4},
        {"B": 2, "n": 2, "topk": 3, "d_v": 5},
    ),
)
