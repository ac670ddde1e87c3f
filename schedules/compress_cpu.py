"""Summarise windows on a CPU: one entry and head at a time, channels in SIMD lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu import vec
from sparsegen.codegen.cpu.operands import fields
from sparsegen.codegen.cpu.rows import Arguments, Sequence, declare, find_sequence
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
    maximum,
    minimum,
    store,
)
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import Buffer, CompressTask, Operand

FAMILY = "compress"
REQUIRES = frozenset({"cpu"})
PRIORITY = 0

LOWEST = -1e30


@dataclass(frozen=True)
class Knobs:
    """How a learned compressor is tiled. entries: entries that share one read of the weight."""

    entries: int = 4


def accepts(task: CompressTask, arch: Arch) -> str | None:
    """Return None: every way of pooling, shape, layout and dtype is possible."""
    return None


def default(task: CompressTask, arch: Arch) -> Knobs:
    """Return four entries for a weight matrix, one where there is none to share."""
    return Knobs(entries=8 if _matrix(task) else 1)


def space(task: CompressTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first = default(task, arch)
    yield first
    for entries in (1, 2, 4, 8, 16):
        if entries == first.entries:
            continue
        if not _matrix(task):
            yield Rejected(asdict(Knobs(entries)), "there is no weight matrix to share")
        else:
            yield Knobs(entries)


def _matrix(task: CompressTask) -> bool:
    return task.weight is not None and len(task.weight.shape) == 3


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
        if _matrix(self.task):
            self._multiplied(sequence, entry, count, head)
            return
        with T.serial(count) as e:
            here = T.bind(entry + e)
            pool = self._softmax if self.task.how == "softmax" else self._pooled
            with T.serial(const(self.task.out.shape[1], "int64")) as d:
                self._write(sequence, here, head, d, pool(sequence, here, head, d))

    def _write(self, sequence: Sequence, e: Value, head: Value, d: Value, value: Value) -> None:
        out = self.task.out
        at = (sequence.row(out.rows, e) * out.shape[0] + head) * out.shape[1] + d
        vec.store_f32(self.arguments[out].flat, out.dtype, value, at)

    def _read(self, operand: Operand, sequence: Sequence, j: Value, head: Value, d: Value) -> Value:
        """Return one element of position j; `d` chooses the part at run time."""
        found = T.alloc_buffer((1,), "float32")
        for field in fields(self.arguments, operand):
            inside = T.And(d >= field.first, d < field.first + field.part.size)
            with T.If(inside), T.Then():
                row = sequence.row(field.part.buffer.rows, j)
                store(found, field.read(row, head, d), 0)
        return T.bind(load(found, 0))

    def _window(self, sequence: Sequence, e: Value) -> tuple[Value, Value]:
        """Return the first position of a window and how many exist."""
        length = sequence.n_k if self.task.role == "key" else sequence.n_q
        offset = sequence.q_off if self.task.role == "query" else const(0, "int32")
        start = T.bind(e * self.task.entries.stride)
        size = minimum(length - start, const(self.task.entries.width, "int32"))
        return T.bind(start + offset), T.bind(size)

    def _pooled(self, sequence: Sequence, e: Value, head: Value, d: Value) -> Value:
        how = self.task.how
        start, size = self._window(sequence, e)
        begin = {"max": LOWEST, "min": -LOWEST}.get(how, 0.0)
        total = T.alloc_buffer((1,), "float32")
        store(total, const(begin, "float32"), 0)
        combine: dict[str, Callable[[Value, Value], Value]] = {"max": maximum, "min": minimum}
        with T.serial(size) as m:
            x = self._read(self.task.x, sequence, start + m, head, d)
            if how == "linear":
                if self.task.bias is not None:
                    x = x + self._slot(self.task.bias, m, d)
                x = x * self._slot(self.task.weight, m, None)
            add = combine.get(how, lambda a, b: a + b)
            store(total, add(load(total, 0), x), 0)
        result = load(total, 0)
        return result / cast(size, "float32") if how == "mean" else result

    def _slot(self, buffer: Buffer | None, m: Value, d: Value | None) -> Value:
        """Return the weight of slot m, or the bias of slot m for channel d."""
        assert buffer is not None
        at = cast(m, "int64") if d is None else cast(m, "int64") * buffer.shape[1] + d
        return vec.load_f32(self.arguments[buffer].flat, buffer.dtype, at)

    def _softmax(self, sequence: Sequence, e: Value, head: Value, d: Value) -> Value:
        """Pool by softmax(gate + bias) over the window, and the window before it."""
        task, width = self.task, self.task.entries.width
        assert task.gate is not None
        start, size = self._window(sequence, e)
        state = T.alloc_buffer((3,), "float32")  # maximum, sum of weights, weighted sum
        for n, value in enumerate((LOWEST, 0.0, 0.0)):
            store(state, const(value, "float32"), n)

        def window(x: Operand, gate: Operand, first: Value, slots: int) -> None:
            with T.serial(size) as m:
                z = self._read(gate, sequence, first + m, head, d)
                if task.bias is not None:
                    z = T.bind(z + self._slot(task.bias, m + slots, d))
                value = self._read(x, sequence, first + m, head, d)
                top = T.bind(maximum(load(state, 0), z))
                old = T.bind(vec.exp(load(state, 0) - top))
                new = T.bind(vec.exp(z - top))
                store(state, top, 0)
                store(state, load(state, 1) * old + new, 1)
                store(state, load(state, 2) * old + new * value, 2)

        if task.previous is not None:
            with T.If(e > 0), T.Then():
                window(*task.previous, start - width, 0)
        window(task.x, task.gate, start, width if task.previous is not None else 0)
        return load(state, 2) / load(state, 1)

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
        with T.serial(const(many, "int64")) as e:
            here = minimum(cast(e, "int32"), count - 1)
            start, _ = self._window(sequence, T.bind(entry + here))
            with (
                T.serial(const(task.entries.width, "int64")) as m,
                T.serial(const(inner, "int64")) as d,
            ):
                x = self._read(task.x, sequence, start + cast(m, "int32"), head, d)
                if task.bias is not None:
                    x = x + self._slot(task.bias, m, d)
                store(windows, x, e * depth + m * inner + d)
        return windows
