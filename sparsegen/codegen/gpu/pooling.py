"""Pool a channel of a window of positions: mean, max, min, weights of slots, softmax of gates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparsegen.codegen.cpu.operands import fields
from sparsegen.codegen.cpu.rows import Arguments, Sequence
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.vec import load_f32
from sparsegen.codegen.tvm import T, Value, cast, const, maximum, minimum, select
from sparsegen.lowering.tasks import Buffer, CompressTask, Operand

LOWEST = -1e30  # a peak before any gate, from which no infinity is subtracted


@dataclass(frozen=True)
class Pool:
    """The windows of one head of a sequence.

    head  of the operand and of the result (int64)
    """

    task: CompressTask
    arguments: Arguments
    sequence: Sequence
    head: Value

    def channel(self, e: Value, d: Value) -> Value:
        """Return channel d (int64) of entry e (int32) as float32."""
        return self._softmax(e, d) if self.task.how == "softmax" else self._reduced(e, d)

    def window(self, e: Value) -> tuple[Value, Value]:
        """Return the first position of a window and how many exist."""
        s, entries = self.sequence, self.task.entries
        key = self.task.role == "key"
        start = T.bind(e * entries.stride)
        size = minimum((s.n_k if key else s.n_q) - start, const(entries.width, "int32"))
        return T.bind(start if key else start + s.q_off), T.bind(size)

    def read(self, operand: Operand, j: Value, d: Value) -> Value:
        """Return one element of position j; `d` chooses the part at run time."""
        found = cell("float32", const(0.0, "float32"))
        for field in fields(self.arguments, operand):
            inside = T.And(d >= field.first, d < field.first + field.part.size)
            with T.If(inside), T.Then():
                row = T.bind(self.sequence.row(field.part.buffer.rows, j))
                put(found, field.read(row, self.head, d))
        return T.bind(get(found))

    def slot(self, buffer: Buffer | None, m: Value, d: Value | None) -> Value:
        """Return the weight of slot m, or the bias of slot m for channel d."""
        assert buffer is not None
        at = cast(m, "int64") if d is None else cast(m, "int64") * buffer.shape[1] + d
        return load_f32(self.arguments[buffer].flat, buffer.dtype, at)

    def _reduced(self, e: Value, d: Value) -> Value:
        how = self.task.how
        start, size = self.window(e)
        begin = {"max": -math.inf, "min": math.inf}.get(how, 0.0)
        combine: dict[str, Callable[[Value, Value], Value]] = {"max": _larger, "min": _smaller}
        total = cell("float32", const(begin, "float32"))
        with T.serial(size) as m:
            x = self.read(self.task.x, start + m, d)
            if how == "linear":
                if self.task.bias is not None:
                    x = x + self.slot(self.task.bias, m, d)
                x = x * self.slot(self.task.weight, m, None)
            put(total, combine.get(how, lambda a, b: a + b)(get(total), x))
        return get(total) / cast(size, "float32") if how == "mean" else get(total)

    def _softmax(self, e: Value, d: Value) -> Value:
        """Pool by softmax(gate + bias) over the window, and the window before it."""
        task, width = self.task, self.task.entries.width
        assert task.gate is not None
        start, size = self.window(e)
        peak, total, out = (cell("float32", const(x, "float32")) for x in (LOWEST, 0.0, 0.0))

        def add(x: Operand, gate: Operand, first: Value, slots: int) -> None:
            with T.serial(size) as m:
                z = self.read(gate, first + m, d)
                if task.bias is not None:
                    z = T.bind(z + self.slot(task.bias, m + slots, d))
                value = self.read(x, first + m, d)
                top = T.bind(maximum(get(peak), z))
                old, new = T.bind(T.exp(get(peak) - top)), T.bind(T.exp(z - top))
                put(peak, top)
                put(total, get(total) * old + new)
                put(out, get(out) * old + new * value)

        if task.previous is not None:
            with T.If(e > 0), T.Then():
                add(*task.previous, start - width, 0)
        add(task.x, task.gate, start, width if task.previous is not None else 0)
        return get(out) / get(total)


def _larger(a: Value, b: Value) -> Value:
    """Return the larger of two numbers; NaN where one is NaN."""
    b = T.bind(b)
    return select(T.Or(b > a, T.isnan(b)), b, a)


def _smaller(a: Value, b: Value) -> Value:
    """Return the smaller of two numbers; NaN where one is NaN."""
    b = T.bind(b)
    return select(T.Or(b < a, T.isnan(b)), b, a)
