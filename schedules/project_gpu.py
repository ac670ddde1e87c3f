"""Multiply by a weight on a GPU: a thread per output element, neighbours along the columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.operands import fields
from sparsegen.codegen.cpu.rows import Arguments, Sequence, find_sequence
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.vec import load_f32, store_f32
from sparsegen.codegen.gpu.launch import kernel, launch
from sparsegen.codegen.tvm import T, Value, cast, const, load
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import ProjectTask

FAMILY = "project"
REQUIRES = frozenset({"cuda"})
PRIORITY = 0


@dataclass(frozen=True)
class Knobs:
    """How outputs are spread. threads: of a block."""

    threads: int = 128


def accepts(task: ProjectTask, arch: Arch) -> str | None:
    """Return None: every shape, layout and dtype is possible."""
    return None


def default(task: ProjectTask, arch: Arch) -> Knobs:
    """Return blocks of four warps."""
    return Knobs()


def space(task: ProjectTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    yield from (Knobs(128), Knobs(256))


def apply(task: ProjectTask, knobs: Knobs, arch: Arch) -> Any:
    """for row, head, column: sum of x * w  ->  a thread each"""
    heads, columns = task.out.shape
    with kernel(task) as (builder, arguments):
        count = arguments[task.out].rows * (heads * columns)
        place = launch((count + (knobs.threads - 1)) // knobs.threads, knobs.threads)
        n = T.bind(place.block * knobs.threads + cast(place.thread, "int64"))
        with T.If(n < count), T.Then():
            row, head = T.bind(n // (heads * columns)), T.bind(n // columns % heads)
            total = _sum(task, arguments, row, head, T.bind(n % columns))
            store_f32(arguments[task.out].flat, task.out.dtype, total, n)
    return builder.get()


def _sum(task: ProjectTask, arguments: Arguments, row: Value, head: Value, column: Value) -> Value:
    total = cell("float32", const(0.0, "float32"))
    w, flat = task.w, arguments[task.w].flat
    outer, inner = w.shape[-2:]
    which = head if len(w.shape) == 3 else const(0, "int64")
    for field in fields(arguments, task.x):
        where = row
        if field.part.buffer.rows.paged:
            where = _physical(arguments, field.part.buffer.rows, row)
        with T.serial(const(field.part.size, "int64")) as k:
            element = T.bind(k + field.first)
            x = field.read(where, head, element)
            at = (column, element) if task.transposed else (element, column)
            y = load_f32(flat, w.dtype, (which * outer + at[0]) * inner + at[1])
            put(total, get(total) + x * y)
    return get(total)


def _physical(arguments: Arguments, rows: Any, row: Value) -> Value:
    """Return the row of pages that holds a packed row of keys."""
    cu = arguments.cu_k
    number = find_sequence(arguments, lambda b: cast(load(cu, b), "int64"), row)
    sequence = Sequence.at(arguments, number)
    # Rows behind the last sequence stand for no key, and are computed from the first one.
    local = T.bind(row - sequence.k_start)
    inside = T.bind(T.Select(local < cast(sequence.n_k, "int64"), local, const(0, "int64")))
    return T.bind(sequence.row(rows, cast(inside, "int32")))
