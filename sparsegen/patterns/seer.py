"""Gate blocks with learned summaries of queries and of keys: SeerAttention (arXiv 2410.13276)."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def seer(
    q: sg.Tensor["T Hq D"],
    k: sg.Tensor["S Hk D"],
    v: sg.Tensor["S Hk E"],
    w_q: sg.Tensor["Hq D g"],
    w_max: sg.Tensor["Hk D g"],
    w_min: sg.Tensor["Hk D g"],
    w_mean: sg.Tensor["Hk D g"],
    *,
    B=64,
    n=32,
):
    """Attend to `n` blocks of `B` keys per block of `B` queries; first and own are forced."""
    i, j = sg.index(q, k)
    h = sg.head(q)
    qg = sg.project(sg.compress(q, sg.mean, width=B, partial=True), w_q)
    pools = ((sg.max, w_max), (sg.min, w_min), (sg.mean, w_mean))
    parts = [sg.project(sg.compress(k, how, width=B, partial=True), w) for how, w in pools]
    kg = sg.cat(*parts)
    a, b = sg.index(sg.cat(qg, qg, qg), kg)
    p = sg.score(sg.cat(qg, qg, qg), kg, norm="softmax", where=b <= a)
    sel = sg.select(p, topk=n, force=(b == 0) | (b == a))
    return sg.attend(q, k, v, where=(j <= i) & sel[h, i // B, j // B])


CONFIGS = (
    Config("llama-3.1-8b", {"T": 8192, "S": 8192, "Hq": 32, "Hk": 8, "D": 128, "E": 128, "g": 128}),
    Config("qwen2.5-14b", {"T": 8192, "S": 8192, "Hq": 40, "Hk": 8, "D": 128, "E": 128, "g": 128}),
)
TEST_CONFIGS = (
    Config("odd", {"T": 37, "S": 37, "Hq": 6, "Hk": 2, "D": 5, "E": 7, "g": 3}, {"B": 5, "n": 3}),
    Config("chunk", {"T": 11, "S": 53, "Hq": 4, "Hk": 4, "D": 9, "E": 9, "g": 4}, {"B": 6, "n": 4}),
    Config(
        "one-block", {"T": 7, "S": 7, "Hq": 2, "Hk": 1, "D": 4, "E": 4, "g": 2}, {"B": 8, "n": 2}
    ),
    Config(
        "whole-blocks",
        {"T": 24, "S": 24, "Hq": 3, "Hk": 3, "D": 3, "E": 5, "g": 7},
        {"B": 4, "n": 2},
    ),
    Config(
        "n-beyond", {"T": 19, "S": 19, "Hq": 3, "Hk": 1, "D": 8, "E": 8, "g": 5}, {"B": 3, "n": 20}
    ),
)
