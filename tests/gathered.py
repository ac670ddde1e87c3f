"""Attention over lists of keys whose values lie apart from them, for several key heads."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

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


def _odd_values(heads: int, sharpness: float, dtype: torch.dtype) -> Case:
    """Return a case with values that are not finite, whose weights are very small for some."""
    lengths = [(3, 90), (1, 70)]
    sizes = {"Hq": heads, "Hk": 2, "D": 128, "E": 128, "e": 8}
    case = case_of(common, sizes, "ragged", lengths, dtype=dtype)
    case.inputs["q"] *= sharpness
    for key, head, column, value in (
        (10, 0, 3, math.inf), (20, 0, 70, -math.inf), (30, 1, 5, math.nan), (40, 1, 6, math.inf),
        (41, 1, 6, -math.inf), (42, 1, 127, -math.inf), (100, 0, 0, math.inf),
    ):  # fmt: skip
        case.inputs["v"][key, head, column] = value
    want, rows, keys = [], 0, 0
    for t, s in lengths:
        one = {n: case.inputs[n][rows : rows + t].float().numpy() for n in "qx"}
        one |= {n: case.inputs[n][keys : keys + s].float().numpy() for n in "kvy"}
        with np.errstate(all="ignore"):
            want.append(listed(sg.reference(case.program, one, q_offset=s - t)))
        rows, keys = rows + t, keys + s
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
            (48, 1, 256, "ragged"),
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
        f"odd values {heads} {sharpness} {str(dtype)[6:]}": partial(
            _odd_values, heads, sharpness, dtype
        )
        for heads in (8, 80)
        for sharpness, dtype in ((1, torch.bfloat16), (64, torch.bfloat16), (8, torch.float16))
    },
}  # fmt: skip
