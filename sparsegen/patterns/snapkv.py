"""Keep the keys that the last queries attend most: SnapKV (arXiv 2404.14469).

SnapKV also smooths the mass with a running maximum over seven neighbours, which is left out here.
"""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def snapkv(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk E"], *, last=32, budget=1024
):
    """Attend to `budget` keys per key head, the `last` ones among them; return them too."""
    i, j = sg.index(q, k)
    grp = sg.head(q) // q.group
    p = sg.score(q, k, norm="softmax", where=(j <= i) & (i >= i.stop - last))
    kept = sg.select(sg.reduce(p, "sum", by=(grp, j)), topk=budget, force=j >= j.stop - last)
    o = sg.attend(q, k, v, where=(j <= i) & kept[grp, j])
    return o, kept.indices


CONFIGS = (
    Config("mistral-7b", {"T": 4096, "S": 4096, "Hq": 32, "Hk": 8, "D": 128, "E": 128}),
    Config(
        "llama-3-8b-16k",
        {"T": 16384, "S": 16384, "Hq": 32, "Hk": 8, "D": 128, "E": 128},
        {"budget": 4096},
    ),
)
_SMALL = {"last": 5, "budget": 9}
TEST_CONFIGS = (
    Config("odd", {"T": 37, "S": 37, "Hq": 6, "Hk": 2, "D": 5, "E": 7}, _SMALL),
    Config("chunk", {"T": 13, "S": 53, "Hq": 4, "Hk": 4, "D": 9, "E": 9}, _SMALL),
    Config("few-queries", {"T": 3, "S": 41, "Hq": 3, "Hk": 1, "D": 3, "E": 3}, _SMALL),
    Config("forced-beyond", {"T": 29, "S": 29, "Hq": 2, "Hk": 1, "D": 4, "E": 4}, {"budget": 7}),
    Config("dead-rows", {"T": 19, "S": 13, "Hq": 3, "Hk": 3, "D": 8, "E": 8}, _SMALL, "S < T"),
)
