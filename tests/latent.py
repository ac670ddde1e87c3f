"""Attention whose values are part of its keys: patterns, and calls that cover its kernels."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

import sparsegen as sg
from sparsegen.patterns import Config
from tests.harness import Case, batch, listed

# Queries and keys of sequences: none, fewer than a chunk, whole chunks, one key more.
LENGTHS = [(2, 200), (0, 5), (1, 1), (3, 64), (2, 0), (1, 129)]


@sg.pattern
def causal(q: sg.Tensor["T H c"], kv: sg.Tensor["S 1 c"], *, d_v=128):
    i, j = sg.index(q, kv)
    o = sg.attend(q, kv, kv[..., :d_v], where=j <= i)
    return o, o.lse


@sg.pattern
def window(q: sg.Tensor["T H c"], kv: sg.Tensor["S 1 c"], sink: sg.Tensor["H"], *, d_v=128):
    i, j = sg.index(q, kv)
    where = (j <= i) & ((i - j < 70) | (j < 9))
    o = sg.attend(q, kv, kv[..., :d_v], where=where, sink=sink)
    return o, o.lse


@sg.pattern
def joined(
    q_c: sg.Tensor["T H c"],
    q_r: sg.Tensor["T H r"],
    c: sg.Tensor["S 1 c"],
    r: sg.Tensor["S 1 r"],
    x: sg.Tensor["T 1 e"],
    y: sg.Tensor["S 1 e"],
    sink: sg.Tensor["H"],
    *,
    topk=150,
):
    i, j = sg.index(q_c, c)
    sel = sg.select(sg.reduce(sg.score(x, y), "sum", by=(i, j)), topk=topk)
    q, k = sg.cat(q_c, q_r), sg.cat(c, r)
    o = sg.attend(q, k, c, where=(j <= i) & sel[i, j], sink=sink)
    return o, o.lse


@sg.pattern
def blocks(
    q: sg.Tensor["T H c"], kv: sg.Tensor["S 1 c"], x: sg.Tensor["T 1 e"], y: sg.Tensor["S 1 e"]
):
    i, j = sg.index(q, kv)
    s = sg.score(x, y, where=j <= i)
    sel = sg.select(sg.reduce(s, "max", by=(i, j // 32)), topk=3)
    where = (j <= i) & (sel[i, j // 32] | (i - j < 50))
    return sg.attend(q, kv, kv[..., :128], where=where)


def case_of(
    pattern: Any, sizes: dict[str, int], layout: str, lengths: Any = LENGTHS, *, page: int = 16,
    dtype: torch.dtype = torch.bfloat16, knobs: dict[str, Any] | None = None, **hyper: Any,
) -> Case:  # fmt: skip
    """Return a call of a pattern for sequences of (queries, keys)."""
    config = Config("", {"T": 1, "S": 1, **sizes}, hyper)
    case = batch(pattern, config, layout, lengths, page=page, dtype=dtype)
    if knobs is None:
        return case
    schedule = {"attend": sg.Schedule("attend_sm90", **knobs)}
    return replace(case, options={**case.options, "schedule": schedule})


def _poisoned(heads: int, value: float) -> Case:
    """Return a case in which one key is not finite."""
    lengths = [(2, 90), (1, 70)]
    case = case_of(causal, {"H": heads, "c": 192}, "ragged", lengths)
    case.inputs["kv"][80] = value
    want, rows, keys = [], 0, 0
    for t, s in lengths:
        one = {"q": case.inputs["q"][rows : rows + t], "kv": case.inputs["kv"][keys : keys + s]}
        with np.errstate(all="ignore"):
            given = {n: x.float().numpy() for n, x in one.items()}
            want.append(listed(sg.reference(case.program, given, q_offset=s - t)))
        rows, keys = rows + t, keys + s
    return replace(case, want=[np.concatenate(parts) for parts in zip(*want, strict=True)])


@sg.pattern
def beside(
    q: sg.Tensor["T H c"], a: sg.Tensor["S 1 c"], b: sg.Tensor["S 1 c"], x: sg.Tensor["T 1 e"],
    y: sg.Tensor["S 1 e"], *, d_v=128, topk=150,
):  # fmt: skip
    i, j = sg.index(q, a)
    sel = sg.select(sg.reduce(sg.score(x, y), "sum", by=(i, j)), topk=topk)
    # Lists of both sources lie on either side of what every query sees of one of them.
    where = [(j <= i) & (sel[i, j] | (i - j < 3)), (j <= i) & sel[i, j]]
    o = sg.attend(q, [a, b], [a[..., :d_v], b[..., :d_v]], where=where)
    return o, o.lse


@sg.pattern
def pooled(q: sg.Tensor["T H c"], x: sg.Tensor["S 1 c"]):
    i, _ = sg.index(q, x)
    kv = sg.compress(x, sg.mean, width=4)
    _, e = sg.index(q, kv)
    # Entries are rounded to 16 bits, which the tolerance of the lse does not allow for.
    return sg.attend(q, kv, kv, where=e < (i + 1) // 4)


_PROJECTED = {"n": 16, "r": 64, "c": 128, "v": 16}
_JOINED = {"c": 128, "r": 64, "e": 8}
_FEW_KEYS = [(1, 130), (2, 3)]
_LONGER = [*LENGTHS, (3, 410)]
CASES: dict[str, Callable[[], Case]] = {
    **{
        f"range {heads} {layout}": partial(case_of, causal, {"H": heads, "c": 192}, layout)
        for heads, layout in ((5, "ragged"), (24, "paged"), (40, "ragged"), (40, "paged"))
    },
    **{
        f"width {h} {c} {v}": partial(
            case_of, causal, {"H": h, "c": c}, "paged", _FEW_KEYS, page=64, d_v=v
        )
        for h, c, v in ((9, 576, 512), (128, 576, 512), (33, 256, 256), (8, 512, 512))
    },
    **{
        f"more tokens than blocks {heads}": partial(
            case_of, causal, {"H": heads, "c": 192}, "ragged", [(280, 290), (1, 7)],
            dtype=torch.float16,
        )
        for heads in (3, 65)
    },
    **{
        f"ranges and a sink {heads} {layout}": partial(
            case_of, window, {"H": heads, "c": 128}, layout, page=4
        )
        for heads, layout in ((16, "paged"), (40, "ragged"))
    },
    **{
        f"list, joined, a sink {heads} {layout}": partial(
            case_of, joined, {"H": heads, **_JOINED}, layout, page=8, dtype=torch.float16
        )
        for heads, layout in ((16, "paged"), (16, "ragged"), (40, "paged"))
    },
    **{
        f"projected {heads}": partial(case_of, "mla_decode", {"H": heads, **_PROJECTED}, "paged")
        for heads in (16, 40)
    },
    **{
        f"blocks beside a window {heads}": partial(
            case_of, blocks, {"H": heads, "c": 192, "e": 8}, "ragged"
        )
        for heads in (16, 40)
    },
    **{
        f"entries and a window {heads} {layout}": partial(
            case_of, "v4_hca", {"H": heads, "c": 128}, layout, _LONGER,
            page=8, dtype=dtype, m=4, W=70,
        )
        for heads, layout, dtype in (
            (16, "paged", torch.float16), (40, "paged", torch.bfloat16),
            (40, "ragged", torch.bfloat16), (8, "ragged", torch.float16),
        )
    },
    **{
        f"listed entries and a window {heads} {layout}": partial(
            case_of, "v4_csa", {"H": heads, "c": 128, "Hi": 2, "e": 8, "slots": 8}, layout, _LONGER,
            page=8, topk=topk, W=20,
        )
        for heads, layout, topk in (
            (16, "paged", 70), (40, "paged", 10), (72, "ragged", 70), (5, "ragged", 10)
        )
    },
    **{
        f"entries {heads} {layout}": partial(
            case_of, pooled, {"H": heads, "c": 128}, layout, _LONGER, page=64
        )
        for heads, layout in ((16, "ragged"), (70, "ragged"), (70, "paged"))
    },
    **{
        f"lists of two sources {heads}": partial(
            case_of, beside, {"H": heads, "c": 192, "e": 8}, "paged", page=16
        )
        for heads in (16, 40)
    },
    **{
        f"narrow lists of two sources {heads} {c} {v}": partial(
            case_of, beside, {"H": heads, "c": c, "e": 8}, layout, lengths, dtype=dtype, d_v=v
        )
        for heads, c, v, layout, lengths, dtype in (
            (40, 64, 64, "ragged", [(270, 290), (1, 7)], torch.bfloat16),
            (130, 192, 64, "paged", LENGTHS, torch.float16),
            (64, 576, 64, "paged", _LONGER, torch.bfloat16),
            (70, 192, 192, "ragged", _LONGER, torch.bfloat16),
            (65, 384, 320, "paged", LENGTHS, torch.float16),
        )
    },
    **{
        f"{name}, {layout}": partial(
            case_of, "mla_decode", {"H": 70, **_PROJECTED}, layout,
            [*LENGTHS, (tokens, tokens + 10), (0, 0)], page=64, knobs=knobs,
        )
        for name, layout, tokens, knobs in (
            ("no boxes", "paged", 140, {"boxes": False}),
            ("boxes", "ragged", 140, {"boxes": True}),
            ("boxes", "paged", 70, {"boxes": True}),
            ("boxes for both", "ragged", 70, {"boxes": True, "cluster": True}),
            ("boxes for both", "paged", 70, {"boxes": True, "cluster": True}),
        )
    },
    **{
        f"{value} {heads}": partial(_poisoned, heads, value)
        for heads, value in ((8, math.nan), (8, math.inf), (40, math.nan), (40, -math.inf))
    },
}  # fmt: skip
