"""Select pages by an upper bound of their scores: Quest (arXiv 2406.10774).

The bound is sum over channels of max(q * min, q * max), which equals the score of
[relu(q) | -relu(-q)] against [max | min].
"""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def quest(q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk E"], *, B=16, n=128):
    """Attend to the `n` pages of `B` keys of the largest bound; the last page is forced."""
    i, j = sg.index(q, k)
    h = sg.head(q)
    high, low = (sg.compress(k, how, width=B, partial=True) for how in (sg.max, sg.min))
    _, e = sg.index(q, high)
    signs = sg.cat(sg.relu(q), -sg.relu(-q))
    bound = sg.score(signs, sg.cat(high, low), where=high.end <= i)
    sel = sg.select(bound, topk=n, force=e == i // B)
    return sg.attend(q, k, v, where=(j <= i) & sel[h, i, j // B])


CONFIGS = (
    Config(
        "longchat-7b",
        {"T": 1, "S": 32768, "Hq": 32, "Hk": 32, "D": 128, "E": 128},
        note="2048 tokens of 32K",
    ),
    Config("llama-3-8b", {"T": 1, "S": 32768, "Hq": 32, "Hk": 8, "D": 128, "E": 128}),
)
TEST_CONFIGS = (
    Config("odd", {"T": 37, "S": 37, "Hq": 6, "Hk": 2, "D": 5, "E": 7}, {"B": 5, "n": 3}),
    Config("chunk", {"T": 13, "S": 53, "Hq": 4, "Hk": 4, "D": 9, "E": 9}, {"B": 7, "n": 2}),
    Config("decode", {"T": 1, "S": 71, "Hq": 3, "Hk": 1, "D": 17, "E": 3}, {"B": 9, "n": 4}),
    Config("one-page", {"T": 11, "S": 29, "Hq": 2, "Hk": 1, "D": 4, "E": 4}, {"B": 4, "n": 1}),
    Config("dead-rows", {"T": 19, "S": 13, "Hq": 3, "Hk": 3, "D": 8, "E": 8}, {"B": 3, "n": 2}),
)
