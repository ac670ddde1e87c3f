"""Select tokens by a light indexer: DeepSeek sparse attention (V3.2, arXiv 2512.02556)."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def dsa(
    q: sg.Tensor["T Hq c"],
    kv: sg.Tensor["S 1 c"],
    q_idx: sg.Tensor["T Hi e"],
    k_idx: sg.Tensor["S 1 e"],
    w: sg.Tensor["T Hi"],
    *,
    topk=2048,
    d_v=512,
):
    """Attend to the `topk` tokens of the largest sum over w * relu(q_idx . k_idx)."""
    i, j = sg.index(q, kv)
    s = sg.score(q_idx, k_idx, act=sg.relu, weights=w, scale=1, where=j <= i)
    sel = sg.select(sg.reduce(s, "sum", by=(i, j)), topk=topk)
    return sg.attend(q, kv, kv[..., :d_v], where=(j <= i) & sel[i, j])


_V32 = {"Hq": 128, "c": 576, "Hi": 64, "e": 128}
CONFIGS = (
    Config("deepseek-v3.2", {"T": 4096, "S": 8192, **_V32}, note="scale 0.1352338"),
    Config("deepseek-v3.2-decode", {"T": 1, "S": 32768, **_V32}),
    Config(
        "glm-5", {"T": 4096, "S": 8192, "Hq": 64, "c": 576, "Hi": 32, "e": 128}, note="GLM-5 / 5.1"
    ),
)
TEST_CONFIGS = (
    Config("odd", {"T": 13, "S": 29, "Hq": 5, "c": 9, "Hi": 3, "e": 7}, {"topk": 6, "d_v": 7}),
    Config("prefill", {"T": 41, "S": 41, "Hq": 3, "c": 6, "Hi": 2, "e": 5}, {"topk": 9, "d_v": 4}),
    Config("decode", {"T": 1, "S": 83, "Hq": 7, "c": 20, "Hi": 1, "e": 3}, {"topk": 13, "d_v": 16}),
    Config(
        "one-token", {"T": 17, "S": 17, "Hq": 1, "c": 4, "Hi": 5, "e": 2}, {"topk": 1, "d_v": 3}
    ),
    Config(
        "k-beyond", {"T": 11, "S": 19, "Hq": 2, "c": 8, "Hi": 4, "e": 8}, {"topk": 50, "d_v": 8}
    ),
    Config("dead-rows", {"T": 9, "S": 5, "Hq": 3, "c": 5, "Hi": 3, "e": 4}, {"topk": 3, "d_v": 5}),
)
