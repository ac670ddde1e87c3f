"""Select compressed entries beside a window, in one softmax: DeepSeek-V4 CSA.

Entry e pools the window before it, from one projection, and its own window, from another; the gates
are softmax-normalised per channel. The indexer has a compressor of its own. Keys are the values.
"""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def v4_csa(
    q: sg.Tensor["T H c"],
    kv: sg.Tensor["S 1 c"],
    x_prev: sg.Tensor["S 1 c"],
    z_prev: sg.Tensor["S 1 c"],
    x: sg.Tensor["S 1 c"],
    z: sg.Tensor["S 1 c"],
    ape: sg.Tensor["slots c"],
    q_idx: sg.Tensor["T Hi e"],
    w: sg.Tensor["T Hi"],
    y_prev: sg.Tensor["S 1 e"],
    u_prev: sg.Tensor["S 1 e"],
    y: sg.Tensor["S 1 e"],
    u: sg.Tensor["S 1 e"],
    ape_idx: sg.Tensor["slots e"],
    sink: sg.Tensor["H"],
    *,
    m=4,
    topk=512,
    W=128,
    scale_idx=128**-0.5,
):
    """Attend to the `topk` best completed entries of `m` tokens and to the last `W` tokens."""
    i, j = sg.index(q, kv)
    kc = sg.compress(x, sg.softmax(z, bias=ape, previous=(x_prev, z_prev)), width=m)
    ki = sg.compress(y, sg.softmax(u, bias=ape_idx, previous=(y_prev, u_prev)), width=m)
    _, e = sg.index(q_idx, ki)
    past = e < (i + 1) // m
    s = sg.score(q_idx, ki, act=sg.relu, weights=w, scale=scale_idx, where=past)
    sel = sg.select(sg.reduce(s, "sum", by=(i, e)), topk=topk)
    near = (j <= i) & (i - j < W)
    return sg.attend(q, [kc, kv], [kc, kv], where=[past & sel[i, e], near], sink=sink)


_FLASH = {"H": 64, "c": 512, "Hi": 64, "e": 128, "slots": 8}
CONFIGS = (
    Config("v4-flash", {"T": 4096, "S": 8192, **_FLASH}, {"topk": 512}),
    Config("v4-pro", {"T": 4096, "S": 8192, **_FLASH, "H": 128}, {"topk": 1024}),
    Config("v4-flash-decode", {"T": 1, "S": 65536, **_FLASH}, {"topk": 512}),
)
TEST_CONFIGS = (
    Config(
        "odd",
        {"T": 23, "S": 37, "H": 5, "c": 9, "Hi": 3, "e": 7, "slots": 8},
        {"topk": 3, "W": 5},
    ),
    Config(
        "threes",
        {"T": 29, "S": 29, "H": 2, "c": 4, "Hi": 1, "e": 3, "slots": 6},
        {"m": 3, "topk": 4, "W": 7},
    ),
    Config(
        "decode",
        {"T": 1, "S": 71, "H": 7, "c": 16, "Hi": 2, "e": 5, "slots": 8},
        {"topk": 6, "W": 11},
    ),
    Config(
        "too-short",
        {"T": 3, "S": 3, "H": 3, "c": 5, "Hi": 2, "e": 4, "slots": 8},
        {"topk": 2, "W": 2},
        "no entry",
    ),
    Config(
        "dead-rows",
        {"T": 13, "S": 9, "H": 3, "c": 5, "Hi": 2, "e": 4, "slots": 4},
        {"m": 2, "topk": 2, "W": 3},
    ),
)
