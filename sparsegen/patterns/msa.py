"""Select blocks per key head by the best score of an index head: MiniMax MSA (arXiv 2606.13392)."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def msa(
    q: sg.Tensor["T Hq D"],
    k: sg.Tensor["S Hk D"],
    v: sg.Tensor["S Hk E"],
    q_idx: sg.Tensor["T Hk e"],
    k_idx: sg.Tensor["S 1 e"],
    *,
    B=128,
    n=16,
):
    """Attend to the `n` blocks of `B` keys of the largest index score, the own one forced."""
    i, j = sg.index(q, k)
    h, g = sg.head(q), sg.head(q_idx)
    s = sg.score(q_idx, k_idx, where=j <= i)
    best = sg.reduce(s, "max", by=(g, i, j // B))
    sel = sg.select(best, topk=n, force=j // B == i // B)
    return sg.attend(q, k, v, where=(j <= i) & sel[h // q.group, i, j // B])


_M3 = {"Hq": 64, "Hk": 4, "D": 128, "E": 128, "e": 128}
CONFIGS = (
    Config("minimax-m3", {"T": 4096, "S": 8192, **_M3}),
    Config("minimax-m3-decode", {"T": 1, "S": 65536, **_M3}),
)
TEST_CONFIGS = (
    Config("odd", {"T": 37, "S": 37, "Hq": 6, "Hk": 2, "D": 5, "E": 7, "e": 3}, {"B": 5, "n": 3}),
    Config("chunk", {"T": 13, "S": 53, "Hq": 4, "Hk": 4, "D": 9, "E": 9, "e": 4}, {"B": 7, "n": 2}),
    Config(
        "decode", {"T": 1, "S": 71, "Hq": 3, "Hk": 1, "D": 17, "E": 3, "e": 9}, {"B": 9, "n": 4}
    ),
    Config(
        "n-beyond", {"T": 11, "S": 11, "Hq": 2, "Hk": 1, "D": 4, "E": 4, "e": 4}, {"B": 3, "n": 9}
    ),
    Config(
        "dead-rows", {"T": 19, "S": 13, "Hq": 3, "Hk": 3, "D": 8, "E": 8, "e": 2}, {"B": 3, "n": 2}
    ),
)
