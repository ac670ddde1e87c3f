"""Attend in the latent space of multi-head latent attention, absorbed: DeepSeek-V2 (2405.04434).

The key is [latent | rope], the value is the latent, and one pair serves all heads; the projections
move to the query and the output, since q . (W c) = (W' q) . c.
"""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def mla_decode(
    q_nope: sg.Tensor["T H n"],
    q_rope: sg.Tensor["T H r"],
    c_kv: sg.Tensor["S 1 c"],
    k_rope: sg.Tensor["S 1 r"],
    w_uk: sg.Tensor["H n c"],
    w_uv: sg.Tensor["H c v"],
    *,
    scale=192**-0.5,
):
    """Attend to the past; `scale` is that of the original heads, (n + r) ** -0.5 times YaRN's."""
    i, j = sg.index(q_nope, c_kv)
    latent = sg.project(q_nope, w_uk)
    q, k = sg.cat(latent, q_rope), sg.cat(c_kv, k_rope)
    o = sg.attend(q, k, c_kv, where=j <= i, scale=scale)
    return sg.project(o, w_uv)


_V3 = {"H": 128, "n": 128, "r": 64, "c": 512, "v": 128}
CONFIGS = (
    Config(
        "deepseek-v3",
        {"T": 1, "S": 8192, **_V3},
        {"scale": 0.1352338},
        "YaRN with mscale 1: 192 ** -0.5 * 1.368888 ** 2",
    ),
    Config(
        "deepseek-v2",
        {"T": 1, "S": 8192, **_V3},
        {"scale": 0.1147214},
        "YaRN with mscale 0.707: 192 ** -0.5 * 1.589626",
    ),
    Config(
        "deepseek-v2-lite",
        {"T": 1, "S": 8192, **_V3, "H": 16},
        {"scale": 0.1147214},
    ),
    Config(
        "glm-5",
        {"T": 1, "S": 8192, "H": 64, "n": 192, "r": 64, "c": 512, "v": 256},
        {"scale": 256**-0.5},
    ),
)
TEST_CONFIGS = (
    Config("odd", {"T": 1, "S": 13, "H": 3, "n": 5, "r": 3, "c": 7, "v": 5}),
    Config("speculative", {"T": 3, "S": 37, "H": 5, "n": 9, "r": 2, "c": 11, "v": 3}),
    Config("prefill", {"T": 17, "S": 17, "H": 2, "n": 4, "r": 1, "c": 19, "v": 6}),
    Config("one-head", {"T": 2, "S": 71, "H": 1, "n": 8, "r": 8, "c": 40, "v": 8}),
    Config("dead-rows", {"T": 7, "S": 4, "H": 7, "n": 3, "r": 5, "c": 9, "v": 2}, note="S < T"),
)
