"""Merge attention results on a CPU: weights per row once, then one pass over each part."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen import merging
from sparsegen.codegen.cpu import vec
from sparsegen.codegen.cpu.nest import Nest, whole, workspace
from sparsegen.codegen.cpu.rows import Arguments, declare
from sparsegen.codegen.cpu.stream import get
from sparsegen.codegen.cpu.vec import load_f32, store_f32
from sparsegen.codegen.tvm import I, IRBuilder, T, const, minimum, store
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
    """for row, head: weights; for row, head, element: sum of weight * part  ->  blocks of rows"""
    nest = Nest()
    with IRBuilder() as builder, I.ir_module(), T.prim_func(s_tir=True):
        _emit(task, knobs, nest, declare(task))
    return nest.schedule(builder.get(), task.name)


def _emit(task: MergeTask, knobs: Knobs, nest: Nest, arguments: Arguments) -> None:
    heads, dim = task.o.shape
    count = T.bind(arguments[task.o].rows * heads)
    with nest.jobs(task, arguments, (count + (knobs.rows - 1)) // knobs.rows) as v:
        first = T.bind(v * knobs.rows)
        rows = T.bind(minimum(count - first, const(knobs.rows, "int64")))
        weights = workspace((knobs.rows, len(task.parts)))
        with nest.block("weigh", rows) as (r,):
            # Said here, because TVM would also find the cells of the computation.
            T.reads(*(whole(arguments[b].flat) for b in task.reads))
            lses = [] if task.lse is None else [arguments[task.lse].flat[first + r]]
            T.writes(*(weights[r, p] for p in range(len(task.parts))), *lses)
            found, lse = merging.weights(task, arguments, first + r, exp=vec.exp, log=vec.log)
            for p, weight in enumerate(found):
                store(weights, get(weight), r, p)
            if task.lse is not None:
                assert lse is not None
                store(arguments[task.lse].flat, get(lse), first + r)
        with nest.block("add", rows, dim) as (r, d):
            at = (first + r) * dim + d
            parts = (load_f32(arguments[p].flat, p.dtype, at) for p in task.parts)
            products = [x * weights[r, p] for p, x in enumerate(parts)]
            total = functools.reduce(operator.add, products)
            store_f32(arguments[task.o].flat, task.o.dtype, total, at)
        nest.vectorize("add", dim, knobs.lanes)
