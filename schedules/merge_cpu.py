"""Merge attention results on a CPU: weights per row once, then one pass over each part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen import merging
from sparsegen.codegen.cpu import vec
from sparsegen.codegen.cpu.rows import Arguments, declare
from sparsegen.codegen.cpu.stream import get
from sparsegen.codegen.tvm import I, IRBuilder, T, Value, broadcast, const, store
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import MergeTask

FAMILY = "merge"
REQUIRES = frozenset({"cpu"})
PRIORITY = 0


@dataclass(frozen=True)
class Knobs:
    """How rows are walked. rows: rows (query, head) of a job; lanes: elements at a time."""

    rows: int = 64
    lanes: int = 16


def accepts(task: MergeTask, arch: Arch) -> str | None:
    """Return None: every shape and dtype is possible."""
    return None


def default(task: MergeTask, arch: Arch) -> Knobs:
    """Return one vector at a time."""
    return Knobs(lanes=vec.float_lanes(arch))


def space(task: MergeTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first = default(task, arch)
    yield first
    for rows in (16, 64, 256):
        for lanes in (first.lanes, 2 * first.lanes):
            knobs = Knobs(rows, lanes)
            if knobs == first:
                continue
            if lanes > task.o.shape[-1]:
                yield Rejected(asdict(knobs), f"{lanes} lanes, {task.o.shape[-1]} elements")
            else:
                yield knobs


def apply(task: MergeTask, knobs: Knobs, arch: Arch) -> Any:
    """for row, head: weights; for element: sum of weight * part  ->  parallel blocks of rows"""
    with IRBuilder() as builder, I.ir_module(), T.prim_func(s_tir=True):
        arguments = declare(task)
        count = T.bind(arguments[task.o].rows * task.o.shape[0])
        with (
            T.parallel((count + (knobs.rows - 1)) // knobs.rows) as block,
            T.serial(knobs.rows) as r,
        ):
            row = T.bind(block * knobs.rows + r)
            with T.If(row < count), T.Then():
                _row(task, arguments, knobs, row)
    return builder.get()


def _row(task: MergeTask, arguments: Arguments, knobs: Knobs, row: Value) -> None:
    weights, lse = merging.weights(task, arguments, row, exp=vec.exp, log=vec.log)
    if task.lse is not None:
        assert lse is not None
        store(arguments[task.lse].flat, get(lse), row)
    dim = task.o.shape[-1]

    def piece(at: Value, lanes: int) -> None:
        total = None
        for part, weight in zip(task.parts, weights, strict=True):
            x = vec.load_f32(arguments[part].flat, part.dtype, row * dim + at, lanes=lanes)
            x = x * broadcast(get(weight), lanes)
            total = x if total is None else total + x
        vec.store_f32(arguments[task.o].flat, task.o.dtype, total, row * dim + at)

    with T.serial(const(dim // knobs.lanes, "int64")) as n:
        piece(n * knobs.lanes, knobs.lanes)
    for at in range(dim // knobs.lanes * knobs.lanes, dim):
        piece(const(at, "int64"), 1)
