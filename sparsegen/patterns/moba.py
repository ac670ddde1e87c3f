"""Route every head to the blocks whose mean key fits it best: MoBA (arXiv 2502.13189)."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def moba(q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk E"], *, B=512, n=3):
    """Attend to `n` blocks of `B` keys: the own one, causally, and the best of the past."""
    i, j = sg.index(q, k)
    h = sg.head(q)
    kb = sg.compress(k, sg.mean, width=B)
    sel = sg.select(sg.score(q, kb, where=kb.end < i // B * B), topk=n - 1)
    return sg.attend(q, k, v, where=(j <= i) & (sel[h, i, j // B] | (j // B == i // B)))


_LLAMA = {"Hq": 32, "Hk": 8, "D": 128, "E": 128}
CONFIGS = (
    Config("8k", {"T": 8192, "S": 8192, **_LLAMA}, {"B": 512, "n": 3}, "Llama-8B-1M-MoBA"),
    Config("32k", {"T": 32768, "S": 32768, **_LLAMA}, {"B": 2048, "n": 3}),
    Config("1m", {"T": 4096, "S": 1048576, **_LLAMA}, {"B": 4096, "n": 12}),
)
TEST_CONFIGS = (
    Config("odd", {"T": 37, "S": 37, "Hq": 6, "Hk": 2, "D": 5, "E": 7}, {"B": 5, "n": 3}),
    Config("chunk", {"T": 13, "S": 53, "Hq": 4, "Hk": 4, "D": 9, "E": 9}, {"B": 7, "n": 4}),
    Config("decode", {"T": 1, "S": 71, "Hq": 3, "Hk": 1, "D": 17, "E": 3}, {"B": 9, "n": 2}),
    Config("one-block", {"T": 11, "S": 11, "Hq": 2, "Hk": 1, "D": 4, "E": 4}, {"B": 16, "n": 2}),
    Config("dead-rows", {"T": 19, "S": 13, "Hq": 3, "Hk": 3, "D": 8, "E": 8}, {"B": 3, "n": 3}),
)
