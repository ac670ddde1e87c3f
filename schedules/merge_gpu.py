"""Merge attention results on a GPU: a warp per row and head, lanes along the elements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen import merging
from sparsegen.codegen.cpu.rows import Arguments
from sparsegen.codegen.cpu.stream import get
from sparsegen.codegen.cpu.vec import load_f32, store_f32
from sparsegen.codegen.gpu.launch import kernel, launch
from sparsegen.codegen.tvm import T, Value, cast, const, equal, store
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import MergeTask

FAMILY = "merge"
REQUIRES = frozenset({"cuda"})
PRIORITY = 0


@dataclass(frozen=True)
class Knobs:
    """How rows are walked. warps: rows (query, head) of a block."""

    warps: int = 4


def accepts(task: MergeTask, arch: Arch) -> str | None:
    """Return None: every shape and dtype is possible."""
    return None


def default(task: MergeTask, arch: Arch) -> Knobs:
    """Return four warps."""
    return Knobs()


def space(task: MergeTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    yield from (Knobs(4), Knobs(2), Knobs(8))


def apply(task: MergeTask, knobs: Knobs, arch: Arch) -> Any:
    """for row, head: weights; for element: sum of weight * part  ->  a warp each"""
    with kernel(task) as (builder, arguments):
        count = arguments[task.o].rows * task.o.shape[0]
        place = launch((count + (knobs.warps - 1)) // knobs.warps, 32 * knobs.warps)
        row = T.bind(place.block * knobs.warps + cast(place.warp, "int64"))
        with T.If(row < count), T.Then():
            _row(task, arguments, row, cast(place.lane, "int64"))
    return builder.get()


def _row(task: MergeTask, arguments: Arguments, row: Value, lane: Value) -> None:
    weights, lse = merging.weights(task, arguments, row, exp=T.exp, log=T.log)
    if task.lse is not None:
        assert lse is not None
        with T.If(equal(lane, const(0, "int64"))), T.Then():
            store(arguments[task.lse].flat, get(lse), row)
    dim = task.o.shape[-1]
    with T.serial(const(-(-dim // 32), "int64")) as n:
        at = T.bind(n * 32 + lane)
        with T.If(at < dim), T.Then():
            total = None
            for part, weight in zip(task.parts, weights, strict=True):
                x = load_f32(arguments[part].flat, part.dtype, row * dim + at) * get(weight)
                total = x if total is None else total + x
            store_f32(arguments[task.o].flat, task.o.dtype, total, row * dim + at)
