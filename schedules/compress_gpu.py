"""Summarise windows on a GPU: a thread per entry, head and channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.operands import fields
from sparsegen.codegen.cpu.rows import Arguments, Sequence, find_sequence
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.vec import load_f32, store_f32
from sparsegen.codegen.gpu.launch import add, kernel, launch
from sparsegen.codegen.tvm import T, Value, cast, const, load, maximum, minimum
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import Buffer, CompressTask, Operand

FAMILY = "compress"
REQUIRES = frozenset({"cuda"})
PRIORITY = 0

LOWEST = -1e30


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
                pool = _Pool(task, arguments, sequence, T.bind(n // dim % heads), T.bind(n % dim))
                store_f32(out.flat, task.out.dtype, pool.entry(entry), n)
    return builder.get()


@dataclass(frozen=True)
class _Pool:
    task: CompressTask
    arguments: Arguments
    sequence: Sequence
    head: Value
    d: Value

    def entry(self, e: Value) -> Value:
        if self.task.how == "softmax":
            return self._softmax(e)
        if self.task.weight is not None and len(self.task.weight.shape) == 3:
            return self._multiplied(e)
        return self._pooled(e)

    def _read(self, operand: Operand, j: Value, d: Value) -> Value:
        """Return one element of position j; `d` chooses the part at run time."""
        found = cell("float32", const(0.0, "float32"))
        for field in fields(self.arguments, operand):
            inside = T.And(d >= field.first, d < field.first + field.part.size)
            with T.If(inside), T.Then():
                row = T.bind(self.sequence.row(field.part.buffer.rows, j))
                put(found, field.read(row, self.head, d))
        return T.bind(get(found))

    def _window(self, e: Value) -> tuple[Value, Value]:
        """Return the first position of a window and how many exist."""
        s, entries = self.sequence, self.task.entries
        key = self.task.role == "key"
        start = T.bind(e * entries.stride)
        size = minimum((s.n_k if key else s.n_q) - start, const(entries.width, "int32"))
        return T.bind(start if key else start + s.q_off), T.bind(size)

    def _slot(self, buffer: Buffer | None, m: Value, d: Value | None) -> Value:
        """Return the weight of slot m, or the bias of slot m for channel d."""
        assert buffer is not None
        at = cast(m, "int64") if d is None else cast(m, "int64") * buffer.shape[1] + d
        return load_f32(self.arguments[buffer].flat, buffer.dtype, at)

    def _pooled(self, e: Value) -> Value:
        how = self.task.how
        start, size = self._window(e)
        begin = {"max": LOWEST, "min": -LOWEST}.get(how, 0.0)
        combine: dict[str, Callable[[Value, Value], Value]] = {"max": maximum, "min": minimum}
        total = cell("float32", const(begin, "float32"))
        with T.serial(size) as m:
            x = self._read(self.task.x, start + m, self.d)
            if how == "linear":
                if self.task.bias is not None:
                    x = x + self._slot(self.task.bias, m, self.d)
                x = x * self._slot(self.task.weight, m, None)
            put(total, combine.get(how, add)(get(total), x))
        return get(total) / cast(size, "float32") if how == "mean" else get(total)

    def _softmax(self, e: Value) -> Value:
        """Pool by softmax(gate + bias) over the window, and the window before it."""
        task, width = self.task, self.task.entries.width
        assert task.gate is not None
        start, size = self._window(e)
        peak, total, out = (cell("float32", const(x, "float32")) for x in (LOWEST, 0.0, 0.0))

        def window(x: Operand, gate: Operand, first: Value, slots: int) -> None:
            with T.serial(size) as m:
                z = self._read(gate, first + m, self.d)
                if task.bias is not None:
                    z = T.bind(z + self._slot(task.bias, m + slots, self.d))
                value = self._read(x, first + m, self.d)
                top = T.bind(maximum(get(peak), z))
                old, new = T.bind(T.exp(get(peak) - top)), T.bind(T.exp(z - top))
                put(peak, top)
                put(total, get(total) * old + new)
                put(out, get(out) * old + new * value)

        if task.previous is not None:
            with T.If(e > 0), T.Then():
                window(*task.previous, start - width, 0)
        window(task.x, task.gate, start, width if task.previous is not None else 0)
        return get(out) / get(total)

    def _multiplied(self, e: Value) -> Value:
        """Multiply a window by the column of a weight matrix [width in out]."""
        task = self.task
        assert task.weight is not None
        _, inner, outer = task.weight.shape
        start, _ = self._window(e)
        flat, total = self.arguments[task.weight].flat, cell("float32", const(0.0, "float32"))
        with T.serial(task.entries.width) as m, T.serial(const(inner, "int64")) as c:
            x = self._read(task.x, start + m, c)
            if task.bias is not None:
                x = x + self._slot(task.bias, m, c)
            at = (cast(m, "int64") * inner + c) * outer + self.d
            put(total, get(total) + x * load_f32(flat, task.weight.dtype, at))
        return get(total)
