"""Select groups of four tokens by pooled index keys; the open group is always on: Qwen QSA."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def qsa(
    q: sg.Tensor["T Hq D"],
    k: sg.Tensor["S Hk D"],
    v: sg.Tensor["S Hk E"],
    q_idx: sg.Tensor["T Hi e"],
    k_idx: sg.Tensor["S 1 e"],
    *,
    m=4,
    topk=512,
):
    """Attend to `topk` groups of `m` tokens with the largest sum of relu(q_idx . mean(k_idx))."""
    i, j = sg.index(q, k)
    kc = sg.compress(k_idx, sg.mean, width=m)
    _, e = sg.index(q_idx, kc)
    s = sg.score(q_idx, kc, act=sg.relu, where=kc.end <= i)
    sel = sg.select(sg.reduce(s, "sum", by=(i, e)), topk=topk)
    return sg.attend(q, k, v, where=(j <= i) & (sel[i, j // m] | (j // m == (i + 1) // m)))


_QWEN = {"Hq": 24, "Hk": 2, "D": 256, "E": 256, "Hi": 4, "e": 128}
CONFIGS = (
    Config("qwen4-exp", {"T": 4096, "S": 8192, **_QWEN}),
    Config("qwen4-exp-decode", {"T": 1, "S": 65536, **_QWEN}),
)
TEST_CONFIGS = (
    Config(
        "odd", {"T": 37, "S": 37, "Hq": 6, "Hk": 2, "D": 5, "E": 7, "Hi": 3, "e": 3}, {"topk": 3}
    ),
    Config(
        "chunk", {"T": 13, "S": 53, "Hq": 4, "Hk": 4, "D": 9, "E": 9, "Hi": 1, "e": 4}, {"topk": 5}
    ),
    Config(
        "decode", {"T": 1, "S": 71, "Hq": 3, "Hk": 1, "D": 17, "E": 3, "Hi": 2, "e": 9}, {"topk": 4}
    ),
    Config(
        "groups-of-three",
        {"T": 19, "S": 29, "Hq": 2, "Hk": 1, "D": 4, "E": 4, "Hi": 4, "e": 4},
        {"m": 3, "topk": 2},
    ),
    Config("dead-rows", {"T": 19, "S": 13, "Hq": 3, "Hk": 3, "D": 8, "E": 8, "Hi": 2, "e": 2}),
)
