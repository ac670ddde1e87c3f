"""Attention over lists of keys whose values lie apart from them, for several key heads."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

import sparsegen as sg
from tests.harness import Case, listed
from tests.latent import LENGTHS, case_of


@sg.pattern
def own(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk E"],
    x: sg.Tensor["T Hk e"], y: sg.Tensor["S 1 e"], sink: sg.Tensor["Hq"], *, topk=150,
):  # fmt: skip
    """Attend to the keys that each key head lists, and to first ones."""
    i, j = sg.index(q, k)
    h = sg.head(x)
    sel = sg.select(sg.reduce(sg.score(x, y), "sum", by=(h, i, j)), topk=topk)
    where = (j <= i) & (sel[sg.head(q) // q.group, i, j] | (j < 3))
    o = sg.attend(q, k, v, where=where, sink=sink)
    return o, o.lse


@sg.pattern
def common(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk E"],
    x: sg.Tensor["T 1 e"], y: sg.Tensor["S 1 e"], *, topk=150,
):  # fmt: skip
    """Attend to the keys that one list names for all key heads."""
    i, j = sg.index(q, k)
    sel = sg.select(sg.reduce(sg.score(x, y), "sum", by=(i, j)), topk=topk)
    o = sg.attend(q, k, v, where=(j <= i) & sel[i, j])
    return o, o.lse


@sg.pattern
def twice(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk E"],
    a: sg.Tensor["S Hk D"], b: sg.Tensor["S Hk E"], x: sg.Tensor["T 1 e"], y: sg.Tensor["S 1 e"],
):  # fmt: skip
    """Attend to listed keys of one source, and to the last ones of another."""
    i, j = sg.index(q, k)
    sel = sg.select(sg.reduce(sg.score(x, y), "sum", by=(i, j)), topk=60)
    where = [(j <= i) & sel[i, j], (j <= i) & (i - j < 80)]
    o = sg.attend(q, [k, a], [v, b], where=where)
    return o, o.lse


def _odd_values(
    pattern: Any, heads: int, layout: str, sharpness: float, dtype: torch.dtype, width: int = 128
) -> Case:
    """Return a case with values that are not finite, whose weights are very small for some."""
    lengths, page = [(3, 90), (1, 70)], 16
    sizes = {"Hq": heads, "Hk": 2, "D": 128, "E": width, "e": 8}
    case = case_of(pattern, sizes, layout, lengths, page=page, dtype=dtype)
    case.inputs["q"] *= sharpness
    # Where the keys of a sequence lie.
    first = [torch.arange(s) for _, s in lengths]
    if layout == "paged":
        table = case.call["page_table"].long()
        places = [table[n][p // page] * page + p % page for n, p in enumerate(first)]
    else:
        places = [first[0], first[1] + lengths[0][1]]
    flat = {
        n: x.view(-1, *x.shape[2:]) if layout == "paged" and n not in "qx" else x
        for n, x in case.inputs.items()
    }
    for which, key, head, column, value in (
        (0, 10, 0, 3, math.inf), (0, 20, 0, width - 58, -math.inf), (0, 30, 1, 5, math.nan),
        (0, 40, 1, 6, math.inf), (0, 41, 1, 6, -math.inf), (0, 42, 1, width - 1, -math.inf),
        (1, 10, 0, 0, math.inf),
    ):  # fmt: skip
        flat["v"][places[which][key], head, column] = value
        if "b" in flat:
            flat["b"][places[which][key + 15], head, column - 1] = value
    want, rows = [], 0
    for place, (t, s) in zip(places, lengths, strict=True):
        one = {n: x[rows : rows + t] if n in "qx" else x[place] for n, x in flat.items()}
        given = {n: x.float().numpy() for n, x in one.items()}
        with np.errstate(all="ignore"):
            want.append(listed(sg.reference(case.program, given, q_offset=s - t)))
        rows += t
    return replace(case, want=[np.concatenate(parts) for parts in zip(*want, strict=True)])


_QSA = {"Hi": 2, "e": 8}
CASES: dict[str, Callable[[], Case]] = {
    **{
        f"groups of four {heads} {key_heads} {d} {layout}": partial(
            case_of, "qsa", {"Hq": heads, "Hk": key_heads, "D": d, "E": d, **_QSA}, layout,
            page=8, topk=20,
        )
        for heads, key_heads, d, layout in (
            (24, 2, 256, "paged"), (80, 2, 128, "paged"), (6, 2, 128, "ragged"),
            (48, 1, 256, "ragged"), (16, 2, 64, "ragged"), (3, 1, 192, "paged"),
        )
    },
    **{
        f"own lists {heads} {key_heads} {d} {layout}": partial(
            case_of, own, {"Hq": heads, "Hk": key_heads, "D": d, "E": 128, "e": 8}, layout, LENGTHS
        )
        for heads, key_heads, d, layout in (
            (12, 3, 192, "ragged"), (80, 2, 64, "ragged"), (20, 1, 64, "paged"),
            (100, 2, 192, "paged"),
        )
    },
    **{
        f"common lists {heads} {key_heads} {d}": partial(
            case_of, common, {"Hq": heads, "Hk": key_heads, "D": d, "E": 128, "e": 8}, "paged",
            LENGTHS,
        )
        for heads, key_heads, d in ((8, 4, 128), (160, 2, 128))
    },
    **{
        f"narrow {heads} {key_heads} {d} {e} {layout}": partial(
            case_of, pattern, {"Hq": heads, "Hk": key_heads, "D": d, "E": e, "e": 8}, layout,
            LENGTHS, page=page, dtype=dtype,
        )
        for pattern, heads, key_heads, d, e, layout, page, dtype in (
            (own, 40, 1, 64, 64, "ragged", 16, torch.bfloat16),
            (own, 140, 2, 128, 64, "paged", 16, torch.float16),
            (common, 128, 1, 192, 64, "paged", 8, torch.bfloat16),
            (common, 99, 3, 64, 64, "ragged", 16, torch.float16),
            (own, 80, 2, 192, 192, "paged", 64, torch.bfloat16),
            (common, 70, 1, 64, 320, "paged", 16, torch.bfloat16),
            (own, 66, 2, 64, 448, "ragged", 16, torch.float16),
        )
    },
    **{
        f"odd values, narrow {heads} {width} {layout} {sharpness}": partial(
            _odd_values, pattern, heads, layout, sharpness, torch.float16, width
        )
        for pattern, heads, width, layout, sharpness in (
            (common, 80, 64, "paged", 64), (common, 140, 192, "ragged", 1),
            (twice, 80, 64, "paged", 8), (twice, 70, 320, "ragged", 8),
        )
    },
    **{
        f"odd values {heads} {layout} {sharpness} {str(dtype)[6:]}": partial(
            _odd_values, common, heads, layout, sharpness, dtype
        )
        for heads in (8, 80)
        for layout, sharpness, dtype in (
            ("paged", 1, torch.bfloat16), ("paged", 64, torch.bfloat16),
            ("ragged", 8, torch.float16),
        )
    },
    **{
        f"odd values of two sources {heads} {layout}": partial(
            _odd_values, twice, heads, layout, sharpness, torch.float16
        )
        for heads, layout, sharpness in (
            (8, "ragged", 8), (8, "paged", 1), (80, "paged", 8), (80, "ragged", 1)
        )
    },
}  # fmt: skip
