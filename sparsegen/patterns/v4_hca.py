"""Attend to all heavily compressed entries and a window, in one softmax: DeepSeek-V4 HCA."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def v4_hca(
    q: sg.Tensor["T H c"],
    kv: sg.Tensor["S 1 c"],
    x: sg.Tensor["S 1 c"],
    z: sg.Tensor["S 1 c"],
    ape: sg.Tensor["m c"],
    sink: sg.Tensor["H"],
    *,
    m=128,
    W=128,
):
    """Attend to every completed entry of `m` tokens and to the last `W` tokens."""
    i, j = sg.index(q, kv)
    kc = sg.compress(x, sg.softmax(z, bias=ape), width=m)
    _, e = sg.index(q, kc)
    near = (j <= i) & (i - j < W)
    return sg.attend(q, [kc, kv], [kc, kv], where=[e < (i + 1) // m, near], sink=sink)


CONFIGS = (
    Config("v4-flash", {"T": 4096, "S": 8192, "H": 64, "c": 512}),
    Config("v4-pro", {"T": 4096, "S": 8192, "H": 128, "c": 512}),
    Config("v4-flash-decode", {"T": 1, "S": 65536, "H": 64, "c": 512}),
)
TEST_CONFIGS = (
    Config("odd", {"T": 23, "S": 37, "H": 5, "c": 9}, {"m": 4, "W": 5}),
    Config("sevens", {"T": 29, "S": 29, "H": 2, "c": 4}, {"m": 7, "W": 3}),
    Config("decode", {"T": 1, "S": 71, "H": 7, "c": 16}, {"m": 6, "W": 11}),
    Config("too-short", {"T": 3, "S": 3, "H": 3, "c": 5}, {"m": 4, "W": 2}, "no entry"),
    Config("dead-rows", {"T": 13, "S": 9, "H": 3, "c": 5}, {"m": 2, "W": 3}, "S < T"),
)
