"""Attend with multi-head latent attention unfolded to full heads: DeepSeek-V2 (2405.04434)."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def mla_prefill(
    q_nope: sg.Tensor["T H n"],
    q_rope: sg.Tensor["T H r"],
    c_kv: sg.Tensor["S 1 c"],
    k_rope: sg.Tensor["S 1 r"],
    w_uk: sg.Tensor["H n c"],
    w_uv: sg.Tensor["H c v"],
    *,
    scale=192**-0.5,
):
    """Attend to the past; the rope key is one vector for all heads."""
    i, j = sg.index(q_nope, c_kv)
    q = sg.cat(q_nope, q_rope)
    k = sg.cat(sg.project(c_kv, w_uk), k_rope)
    return sg.attend(q, k, sg.project(c_kv, w_uv), where=j <= i, scale=scale)


_V3 = {"H": 128, "n": 128, "r": 64, "c": 512, "v": 128}
CONFIGS = (
    Config("deepseek-v3", {"T": 4096, "S": 4096, **_V3}, {"scale": 0.1352338}, "192 / 128 heads"),
    Config("deepseek-v2-lite", {"T": 4096, "S": 4096, **_V3, "H": 16}, {"scale": 0.1147214}),
    Config(
        "glm-5",
        {"T": 4096, "S": 4096, "H": 64, "n": 192, "r": 64, "c": 512, "v": 256},
        {"scale": 256**-0.5},
    ),
)
TEST_CONFIGS = (
    Config("odd", {"T": 13, "S": 13, "H": 3, "n": 5, "r": 3, "c": 7, "v": 5}),
    Config("chunk", {"T": 5, "S": 37, "H": 5, "n": 9, "r": 2, "c": 11, "v": 3}),
    Config("decode", {"T": 1, "S": 17, "H": 2, "n": 4, "r": 1, "c": 19, "v": 6}),
    Config("one-head", {"T": 29, "S": 71, "H": 1, "n": 8, "r": 8, "c": 40, "v": 8}),
    Config("dead-rows", {"T": 7, "S": 4, "H": 7, "n": 3, "r": 5, "c": 9, "v": 2}, note="S < T"),
)
