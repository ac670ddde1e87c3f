"""Select columns and diagonals by what the last queries attend: MInference (arXiv 2407.02490)."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def vertical_slash(
    q: sg.Tensor["T Hq D"],
    k: sg.Tensor["S Hk D"],
    v: sg.Tensor["S Hk E"],
    *,
    last=64,
    columns=1000,
    slashes=6096,
    first=30,
    recent=100,
):
    """Attend to `columns` keys j and `slashes` distances i - j that the `last` queries favour."""
    i, j = sg.index(q, k)
    h = sg.head(q)
    p = sg.score(q, k, norm="softmax", where=(j <= i) & (i >= i.stop - last))
    vertical = sg.select(sg.reduce(p, "sum", by=(h, j)), topk=columns, force=j < first)
    slash = sg.select(sg.reduce(p, "sum", by=(h, i - j)), topk=slashes, force=i - j < recent)
    return sg.attend(q, k, v, where=(j <= i) & (vertical[h, j] | slash[h, i - j]))


CONFIGS = (
    Config("llama-3-8b-262k", {"T": 16384, "S": 16384, "Hq": 32, "Hk": 8, "D": 128, "E": 128}),
    Config(
        "llama-3-8b-262k-light",
        {"T": 16384, "S": 16384, "Hq": 32, "Hk": 8, "D": 128, "E": 128},
        {"columns": 30, "slashes": 800},
    ),
)
_SMALL = {"last": 5, "columns": 4, "slashes": 6, "first": 1, "recent": 2}
TEST_CONFIGS = (
    Config("odd", {"T": 37, "S": 37, "Hq": 6, "Hk": 2, "D": 5, "E": 7}, _SMALL),
    Config("chunk", {"T": 13, "S": 53, "Hq": 4, "Hk": 4, "D": 9, "E": 9}, _SMALL),
    Config("few-queries", {"T": 3, "S": 41, "Hq": 3, "Hk": 1, "D": 3, "E": 3}, _SMALL),
    Config("many", {"T": 29, "S": 29, "Hq": 2, "Hk": 1, "D": 4, "E": 4}, {**_SMALL, "columns": 40}),
    Config("dead-rows", {"T": 19, "S": 13, "Hq": 3, "Hk": 3, "D": 8, "E": 8}, _SMALL, "S < T"),
)
