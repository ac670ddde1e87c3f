"""Summarise windows on a CPU: one entry and head at a time, channels in SIMD lanes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu import vec
from sparsegen.codegen.cpu.rows import Arguments, Sequence, declare, find_sequence
from sparsegen.codegen.pooling import Pool, by_matrix
from sparsegen.codegen.tvm import (
    I,
    IRBuilder,
    Memory,
    T,
    Value,
    broadcast,
    cast,
    const,
    load,
    minimum,
    store,
)
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import CompressTask

FAMILY = "compress"
REQUIRES = frozenset({"cpu"})
PRIORITY = 0


@dataclass(frozen=True)
class Knobs:
    """How a learned compressor is tiled. entries: entries that share one read of the weight."""

    entries: int = 4


def accepts(task: CompressTask, arch: Arch) -> str | None:
    """Return None: every way of pooling, shape, layout and dtype is possible."""
    return None


def default(task: CompressTask, arch: Arch) -> Knobs:
    """Return four entries for a weight matrix, one where there is none to share."""
    return Knobs(entries=8 if by_matrix(task) else 1)


def space(task: CompressTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first = default(task, arch)
    yield first
    for entries in (1, 2, 4, 8, 16):
        if entries == first.entries:
            continue
        if not by_matrix(task):
            yield Rejected(asdict(Knobs(entries)), "there is no weight matrix to share")
        else:
            yield Knobs(entries)


def apply(task: CompressTask, knobs: Knobs, arch: Arch) -> Any:
    """for entries, head: pool the window  ->  parallel over blocks of entries and heads"""
    with IRBuilder() as builder, I.ir_module(), T.prim_func(s_tir=True):
        _Compression(task, knobs, arch, declare(task)).emit()
    return builder.get()


@dataclass(frozen=True)
class _Compression:
    task: CompressTask
    knobs: Knobs
    arch: Arch
    arguments: Arguments

    def emit(self) -> None:
        task, many = self.task, self.knobs.entries
        heads = task.out.shape[0]
        cu = self.arguments.cu_k if task.role == "key" else self.arguments.cu_q
        stride = task.entries.stride

        def first(number: Value) -> Value:
            start = cast(load(cu, number), "int64")
            return start // (stride * many) + 2 * number

        total = T.bind(first(self.arguments.batch))
        with T.parallel(total * heads) as n:
            head = T.bind(n % heads)
            index = T.bind(n // heads)
            number = find_sequence(self.arguments, first, index)
            sequence = Sequence.at(self.arguments, number)
            entry = T.bind(cast((index - first(number)) * many, "int32"))
            count = T.bind(minimum(sequence.count(task.out.rows) - entry, const(many, "int32")))
            with T.If(count > 0), T.Then():
                self._entries(sequence, entry, count, head)

    def _entries(self, sequence: Sequence, entry: Value, count: Value, head: Value) -> None:
        if by_matrix(self.task):
            self._multiplied(sequence, entry, count, head)
            return
        pool = self._pool(sequence, head)
        with T.serial(count) as e:
            here = T.bind(entry + e)
            with T.serial(const(self.task.out.shape[1], "int64")) as d:
                self._write(sequence, here, head, d, pool.channel(here, d))

    def _pool(self, sequence: Sequence, head: Value) -> Pool:
        return Pool(self.task, self.arguments, sequence, head, vec.exp)

    def _write(self, sequence: Sequence, e: Value, head: Value, d: Value, value: Value) -> None:
        out = self.task.out
        at = (sequence.row(out.rows, e) * out.shape[0] + head) * out.shape[1] + d
        vec.store_f32(self.arguments[out].flat, out.dtype, value, at)

    def _multiplied(self, sequence: Sequence, entry: Value, count: Value, head: Value) -> None:
        """Multiply windows by a weight matrix [width in out]; output channels in lanes."""
        task, many = self.task, self.knobs.entries
        weight, (_, inner, outer) = task.weight, task.weight.shape  # type: ignore[union-attr]
        assert weight is not None
        width = vec.float_lanes(self.arch)
        windows = self._copied(sequence, entry, count, head)
        flat = self.arguments[weight].flat
        depth = task.entries.width * inner

        def columns(first: Value, lanes: int) -> None:
            sums = [T.alloc_buffer((lanes,), "float32") for _ in range(many)]
            for s in sums:
                store(s, const(0.0, "float32", lanes), 0)
            with T.serial(const(depth, "int64")) as m:
                w = T.bind(vec.load_f32(flat, weight.dtype, m * outer + first, lanes=lanes))
                for e, s in enumerate(sums):
                    x = broadcast(load(windows, e * depth + m), lanes)
                    store(s, load(s, 0, lanes=lanes) + x * w, 0)
            for e, s in enumerate(sums):
                with T.If(count > e), T.Then():
                    self._write(sequence, entry + e, head, first, load(s, 0, lanes=lanes))

        with T.serial(const(outer // width, "int64")) as n:
            columns(n * width, width)
        for at in range(outer // width * width, outer):
            columns(const(at, "int64"), 1)

    def _copied(self, sequence: Sequence, entry: Value, count: Value, head: Value) -> Memory:
        """Copy the windows of a job as float32, the slot bias added."""
        task, many, inner = self.task, self.knobs.entries, self.task.x.dim
        depth = task.entries.width * inner
        windows = T.alloc_buffer((many * depth,), "float32")
        pool = self._pool(sequence, head)
        with T.serial(const(many, "int64")) as e:
            here = minimum(cast(e, "int32"), count - 1)
            start, _ = pool.window(T.bind(entry + here))
            with (
                T.serial(const(task.entries.width, "int64")) as m,
                T.serial(const(inner, "int64")) as d,
            ):
                x = pool.read(task.x, start + cast(m, "int32"), d)
                if task.bias is not None:
                    x = x + pool.slot(task.bias, m, d)
                store(windows, x, e * depth + m * inner + d)
        return windows
