"""Summarise windows on a GPU: a thread per entry, head and channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.rows import Sequence, find_sequence
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.vec import load_f32, store_f32
from sparsegen.codegen.gpu.launch import kernel, launch
from sparsegen.codegen.gpu.pooling import Pool
from sparsegen.codegen.tvm import T, Value, cast, const, load
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import CompressTask

FAMILY = "compress"
REQUIRES = frozenset({"cuda"})
PRIORITY = 0


@dataclass(frozen=True)
class Knobs:
    """How outputs are spread. threads: of a block."""

    threads: int = 128


def accepts(task: CompressTask, arch: Arch) -> str | None:
    """Return None: every way of pooling, shape, layout and dtype is possible."""
    return None


def default(task: CompressTask, arch: Arch) -> Knobs:
    """Return blocks of four warps."""
    return Knobs()


def space(task: CompressTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    yield from (Knobs(128), Knobs(256))


def apply(task: CompressTask, knobs: Knobs, arch: Arch) -> Any:
    """for entry, head, channel: pool the window  ->  a thread each"""
    heads, dim = task.out.shape
    with kernel(task) as (builder, arguments):
        out = arguments[task.out]
        count = out.rows * (heads * dim)
        place = launch((count + (knobs.threads - 1)) // knobs.threads, knobs.threads)
        n = T.bind(place.block * knobs.threads + cast(place.thread, "int64"))
        cu = arguments.cu_k if task.role == "key" else arguments.cu_q

        def first(number: Value) -> Value:
            return cast(load(cu, number), "int64") // task.entries.stride + number

        with T.If(n < count), T.Then():
            row = T.bind(n // (heads * dim))
            number = find_sequence(arguments, first, row)
            sequence = Sequence.at(arguments, number)
            entry = T.bind(cast(row - first(number), "int32"))
            with T.If(entry < sequence.count(task.out.rows)), T.Then():
                pool = Pool(task, arguments, sequence, T.bind(n // dim % heads))
                d = T.bind(n % dim)
                value = _multiplied(pool, entry, d) if task.multiplies else pool.channel(entry, d)
                store_f32(out.flat, task.out.dtype, value, n)
    return builder.get()


def _multiplied(pool: Pool, e: Value, d: Value) -> Value:
    """Multiply a window by a column of a weight matrix [width in out]."""
    task = pool.task
    assert task.weight is not None
    _, inner, outer = task.weight.shape
    start, _ = pool.window(e)
    flat, total = pool.arguments[task.weight].flat, cell("float32", const(0.0, "float32"))
    with T.serial(task.entries.width) as m, T.serial(const(inner, "int64")) as c:
        x = pool.read(task.x, start + m, c)
        if task.bias is not None:
            x = x + pool.slot(task.bias, m, c)
        at = (cast(m, "int64") * inner + c) * outer + d
        put(total, get(total) + x * load_f32(flat, task.weight.dtype, at))
    return get(total)
