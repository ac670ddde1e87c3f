"""Summarise windows of positions: blocks of a job, and their transformation.

A job takes some windows of one head of a sequence. Channels are pooled independently, a panel of
vectors at a time, which stay in registers while the slots of a window go by. A softmax over slots
keeps its gates and values in memory of the job, since three passes over them vectorize and one
does not. A learned matrix makes the job a product of the windows, copied as rows.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sparsegen.codegen.cpu import vec
from sparsegen.codegen.cpu.gemm import Gemm, Tiling
from sparsegen.codegen.cpu.nest import Nest, registers, whole, workspace
from sparsegen.codegen.cpu.operands import Field, fields
from sparsegen.codegen.cpu.rows import Arguments, Sequence
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    const,
    load,
    maximum,
    minimum,
    select,
    store,
)
from sparsegen.lowering.tasks import Buffer, CompressTask, Operand, Rows


@dataclass(frozen=True)
class Panel:
    """`count` runs of `width` channels, from channel `first` on, in vectors of `lanes`."""

    tag: str
    first: int
    count: int
    width: int
    lanes: int


def panels(cuts: list[int], lanes: int, vectors: int) -> Iterator[Panel]:
    """Yield panels of all channels, none of which lies across a cut.

    Args:
        cuts: ascending; the first is 0 and the last the number of channels.
    """
    for first, end in itertools.pairwise(cuts):
        for width in (lanes * vectors, lanes):
            count = (end - first) // width
            if count:
                yield Panel(f"{first}_{width}", first, count, width, lanes)
                first += count * width
        if first < end:
            left = end - first
            yield Panel(f"{first}_{left}", first, 1, left, left)


@dataclass(frozen=True)
class Windows:
    """The windows of a job.

    head    of the operand and of the result (int64)
    entry   the first window's number in its sequence (int64)
    count   how many windows there are, at most `most` (int64)
    """

    nest: Nest
    task: CompressTask
    arguments: Arguments
    sequence: Sequence
    head: Value
    entry: Value
    count: Value
    most: int

    def pool(self, lanes: int, vectors: int) -> None:
        """Emit the blocks that pool by channel, `vectors` vectors of channels at a time."""
        where = self._physical()
        operands = [self.task.x, self.task.gate, *(self.task.previous or ())]
        cuts = sorted({c for o in operands if o is not None for c in _cuts(o)})
        one = self._softmax if self.task.how == "softmax" else self._reduced
        for panel in panels(cuts, lanes, vectors):
            one(panel, where)

    def multiply(self, tiling: Tiling) -> None:
        """Emit the blocks that multiply windows by a weight [width in out]."""
        task, width = self.task, self.task.entries.width
        weight = task.weight
        assert weight is not None
        _, inner, outer = weight.shape
        where, rows = self._physical(), workspace((self.most, width * inner))
        for n, field in enumerate(fields(self.arguments, task.x)):
            with self.nest.block(f"x{n}", self.count, width, field.part.size) as (e, m, d):
                x = self._read(field, where, e * task.entries.stride + m, d + field.first)
                if task.bias is not None:
                    x = x + self._bias(task.bias, m, d + field.first)
                store(rows, x, e, m * inner + d + field.first)
            self.nest.vectorize(f"x{n}", field.part.size, tiling.lanes)
        flat = self.arguments[weight].flat
        Gemm(
            nest=self.nest, tiling=tiling, total=width * inner, columns=outer, x=rows,
            weight=lambda k, c, lanes: vec.load_f32(flat, weight.dtype, k * outer + c, lanes=lanes),
            transposed=False, result=self._write,
        ).emit(self.count, const(0, "int64"))  # fmt: skip

    # --- access -----------------------------------------------------------------------------------

    @property
    def _start(self) -> Value:
        """Return the position of the first window, as `Sequence.row` counts (int64)."""
        first = self.entry * self.task.entries.stride
        return first if self.task.role == "key" else first + cast(self.sequence.q_off, "int64")

    @property
    def _back(self) -> int:
        """Return how many positions before a window belong to it."""
        return self.task.entries.width if self.task.previous is not None else 0

    @property
    def _slots(self) -> int:
        """Return how many positions a window and the one before it have."""
        return self.task.entries.width + self._back

    def _length(self) -> Value:
        """Return how many positions the sequence has from the first window on (int64)."""
        s = self.sequence
        length = cast(s.n_k if self.task.role == "key" else s.n_q, "int64")
        return length - self.entry * self.task.entries.stride

    def _physical(self) -> Memory | None:
        """Look up the rows of a job, from `_back` before its first window on, if they are paged."""
        operands = (self.task.x, self.task.gate, *(self.task.previous or ()))
        parts = [p for o in operands if o is not None for p in o.parts]
        paged = [p.buffer.rows for p in parts if p.buffer.rows.paged]
        if not paged:
            return None
        entries = self.task.entries
        most = (self.most - 1) * entries.stride + entries.width + self._back
        where = workspace((most,), "int64")
        there = minimum(const(most - self._back, "int64"), self._length()) + self._back
        none = const(0, "int64")
        with self.nest.block("locate", select(self.count > 0, there, none)) as (m,):
            T.reads(whole(self.arguments.pages))
            T.writes(where[m])
            store(where, self._row(paged[0], m - self._back), m)
        return where

    def _row(self, rows: Rows, m: Value) -> Value:
        """Return the row of the m-th position after the start of the first window."""
        position = self._start + m
        if self._back:  # nothing before the first position is used, but it may be looked up
            position = maximum(position, const(0, "int64"))
        return self.sequence.row(rows, position)

    def _read(self, field: Field, where: Memory | None, m: Value, d: Value) -> Value:
        """Return a channel of the m-th position after the start of the first window."""
        rows = field.part.buffer.rows
        if rows.paged:
            assert where is not None
            return field.read(load(where, m + self._back), self.head, d)
        return field.read(self.sequence.row(rows, self._start + m), self.head, d)

    def _bias(self, buffer: Buffer, m: Value, d: Value) -> Value:
        """Return the bias of slot m for channel d."""
        return vec.load_f32(self.arguments[buffer].flat, buffer.dtype, m * buffer.shape[1] + d)

    def _write(self, e: Value, d: Value, value: Value) -> None:
        out = self.task.out
        row = self.sequence.row(out.rows, self.entry) + e
        at = (row * out.shape[0] + self.head) * out.shape[1] + d
        vec.store_f32(self.arguments[out].flat, out.dtype, value, at)

    # --- one value for each channel ---------------------------------------------------------------

    def _reduced(self, p: Panel, where: Memory | None) -> None:
        task, width = self.task, self.task.entries.width
        begin = {"max": -math.inf, "min": math.inf}.get(task.how, 0.0)
        combine = _COMBINE.get(task.how, operator.add)
        field = _covering(self.arguments, task.x, p)
        with self.nest.scope(f"windows_{p.tag}", self.count, p.count) as (e, run):
            first, channel = e * task.entries.stride, run * p.width + p.first
            size = const(width, "int64")
            if task.entries.partial:
                size = minimum(size, self._length() - first)
            held = registers((p.width,))
            with self.nest.block(f"reduce_{p.tag}", p.width, size, reduce=1) as (j, m):
                with T.init():
                    store(held, const(begin, "float32"), j)
                x = self._read(field, where, first + m, channel + j)
                if task.bias is not None:
                    x = x + self._bias(task.bias, m, channel + j)
                if task.weight is not None:
                    flat = self.arguments[task.weight].flat
                    x = x * vec.load_f32(flat, task.weight.dtype, m)
                store(held, combine(held[j], x), j)
            with self.nest.block(f"write_{p.tag}", p.width) as (j,):
                value = held[j] / cast(size, "float32") if task.how == "mean" else held[j]
                self._write(e, channel + j, value)
        self._reduce(f"reduce_{p.tag}", p)
        self.nest.vectorize(f"write_{p.tag}", p.width, p.lanes)

    # --- softmax over the slots -------------------------------------------------------------------

    def _softmax(self, p: Panel, where: Memory | None) -> None:
        task, nest, width, slots = self.task, self.nest, self.task.entries.width, self._slots
        assert task.gate is not None
        with nest.scope(f"windows_{p.tag}", self.count, p.count) as (e, run):
            start, channel = e * task.entries.stride, run * p.width + p.first
            gates, shares, values = (workspace((slots, p.width)) for _ in range(3))

            def copy(name: str, operands: tuple[Operand, Operand], to: Value, slot: int) -> None:
                """Copy the window that the bias counts from `slot` on to where slots begin."""
                x, gate = (_covering(self.arguments, o, p) for o in operands)
                size, shift = (before, -width) if name == "before" else (own, 0)
                with nest.block(f"{name}_{p.tag}", size, p.width) as (m, j):
                    at, d = start + m + shift, channel + j
                    z = self._read(gate, where, at, d)
                    if task.bias is not None:
                        z = z + self._bias(task.bias, m + slot, d)
                    store(gates, z, to + m, j)
                    store(values, self._read(x, where, at, d), to + m, j)
                nest.vectorize(f"{name}_{p.tag}", p.width, p.lanes)

            none, own = const(0, "int64"), const(width, "int64")
            before = none
            if task.previous is not None:  # there is none before the first window of a sequence
                before = select(self.entry + e > 0, own, none)
                copy("before", task.previous, none, 0)
            copy("own", (task.x, task.gate), before, self._back)
            count = before + width
            top, total, value = (registers((p.width,)) for _ in range(3))
            with nest.block(f"top_{p.tag}", p.width, count, reduce=1) as (j, m):
                with T.init():
                    store(top, const(-math.inf, "float32"), j)
                store(top, maximum(top[j], gates[m, j]), j)
            with nest.block(f"share_{p.tag}", count, p.width) as (m, j):
                store(shares, vec.exp(gates[m, j] - top[j]), m, j)
            with nest.block(f"total_{p.tag}", p.width, count, reduce=1) as (j, m):
                with T.init():
                    store(total, const(0.0, "float32"), j)
                store(total, total[j] + shares[m, j], j)
            with nest.block(f"value_{p.tag}", p.width, count, reduce=1) as (j, m):
                with T.init():
                    store(value, const(0.0, "float32"), j)
                store(value, value[j] + shares[m, j] * values[m, j], j)
            with nest.block(f"write_{p.tag}", p.width) as (j,):
                self._write(e, channel + j, value[j] / total[j])
        for name in ("top", "total", "value"):
            self._reduce(f"{name}_{p.tag}", p)
        for name in ("share", "write"):
            nest.vectorize(f"{name}_{p.tag}", p.width, p.lanes)

    def _reduce(self, name: str, p: Panel) -> None:
        """Take a slot after the other, all vectors of a panel for each."""

        def step(sch: Any) -> None:
            block = sch.get_sblock(name)
            j, m = sch.get_loops(block)[-2:]
            vector, lane = sch.split(j, [None, p.lanes])
            sch.reorder(m, vector, lane)
            sch.unroll(vector)
            sch.vectorize(lane)
            init = sch.decompose_reduction(block, m)
            sch.vectorize(sch.get_loops(init)[-1])

        self.nest.after(step)


def _cuts(operand: Operand) -> list[int]:
    """Return where the parts of an operand begin, and its end."""
    cuts = [0]
    for part in operand.parts:
        cuts.append(cuts[-1] + part.size)
    return cuts


def _covering(arguments: Arguments, operand: Operand, p: Panel) -> Field:
    """Return the field that has the channels of a panel."""
    return next(f for f in fields(arguments, operand) if p.first < f.first + f.part.size)


def _larger(a: Value, b: Value) -> Value:
    """Return the larger of two numbers; NaN where one is NaN."""
    return select(vec.is_number(a), select(b <= a, a, b), a)


def _smaller(a: Value, b: Value) -> Value:
    """Return the smaller of two numbers; NaN where one is NaN."""
    return select(vec.is_number(a), select(a <= b, a, b), a)


_COMBINE: dict[str, Callable[[Value, Value], Value]] = {"max": _larger, "min": _smaller}
