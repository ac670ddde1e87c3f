"""Write the outputs of a tile of an attend kernel, and keep what is not finite apart.

A weight of 0 times a value that is infinite or NaN is NaN, and a product on tensor cores takes the
values of a whole chunk: what one row of a tile sees would reach the rows that do not see it. A tile
whose outputs are not all finite is therefore computed again in three passes. The first two mark the
outputs of rows that see a value that is NaN or, upward, +inf, or, downward, -inf: weights become 1
where they are not 0, such values 1 and all others 0. The last takes values that are not finite as
0, and the marks say which of its sums they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.cpu.vec import LOG2E, load_f32, store_f32
from sparsegen.codegen.gpu import mma
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.tvm import T, Value, cast, const, equal, load, select, store

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.attend import Tile

INF = math.inf
FAST, FINITE, UPWARD, DOWNWARD = (const(n, "int32") for n in range(4))


def part_of(x: Value, mode: Value) -> Value:
    """Return what a value (bound float32) counts as in a pass that keeps marks apart."""
    zero, one = const(0.0, "float32"), const(1.0, "float32")
    low, high = (T.bind(equal(x, const(end, "float32"))) for end in (-INF, INF))
    odd = T.bind(T.Or(T.isnan(x), T.Or(low, high)))
    marked = T.And(odd, T.Not(select(equal(mode, UPWARD), low, high)))
    return select(equal(mode, FINITE), select(odd, zero, x), select(marked, one, zero))


class Outputs:
    """The outputs of a tile: which elements a thread has, and where they go."""

    def __init__(self, tile: Tile) -> None:
        self.tile, self.kernel, self.task = tile, tile.kernel, tile.task
        self.softmax, self.columns = tile.softmax, tile.kernel.width // 8
        # Two elements of 16 bits beside each other are written together.
        self.paired = self.kernel.dim % 2 == 0 and self.task.o.dtype != "float32"

    def any_not_finite(self) -> Value:
        """Tell whether this thread has a sum that is not finite (int32)."""
        found = cell("int32", const(0, "int32"))
        with T.unroll(self.softmax.tiles * self.kernel.width // 2) as n:
            x = T.bind(load(self.softmax.out, n))
            # Not `x <= -inf or x >= inf`, as the simplifier makes of its negation: x may be NaN.
            finite = T.And(x > const(-INF, "float32"), x < const(INF, "float32"))
            put(found, select(finite, get(found), const(1, "int32")))
        return get(found)

    def mark(self, mode: Value) -> None:
        """Write which elements saw what this pass looks for: 1, and 2 for the second one."""
        argument = self.kernel.arguments[self.task.o]
        flat, dtype = argument.flat, self.task.o.dtype
        zero, one, two = (const(x, "float32") for x in (0.0, 1.0, 2.0))
        for which in range(self.softmax.rows):
            with self._row(which) as (row, _), self._elements(which, row) as (n, at):
                seen = T.bind(load(self.softmax.out, n) > zero)
                found = cell("float32", select(seen, one, zero))
                with T.If(equal(mode, DOWNWARD)), T.Then():
                    put(found, load_f32(flat, dtype, at) + select(seen, two, zero))
                store_f32(flat, dtype, get(found), at)

    def write(self, mode: Value) -> None:
        """Write the outputs, and the lse; after passes apart, with the marks."""
        task, arguments, tile = self.task, self.kernel.arguments, self.tile
        zero, one = const(0.0, "float32"), const(1.0, "float32")
        for which in range(self.softmax.rows):
            total = T.bind(load(self.softmax.total, which))
            # A row that sees nothing is 0, whatever its sums hold. NaN is no 0.
            some = T.bind(T.Not(equal(total, zero)))
            natural = const(self.kernel.natural, "float32")
            peak = T.bind(load(self.softmax.peak, which) * natural)
            with self._row(which) as (row, head):
                whole = total
                if task.sink is not None:
                    sink = load_f32(arguments[task.sink].flat, task.sink.dtype, head)
                    whole = T.bind(total + T.exp2((sink - peak) * const(LOG2E, "float32")))
                rate = cell("float32", zero)
                with T.If(some), T.Then():
                    put(rate, one / whole)
                scale = T.bind(get(rate))
                if self.paired:
                    with T.If(equal(mode, FINITE)):
                        with T.Then():
                            self._write(which, row, some, scale, marks=True)
                        with T.Else():
                            self._write_pairs(which, row, some, scale)
                else:
                    self._write(which, row, some, scale, marks=equal(mode, FINITE))
                if task.lse is not None:
                    ours = T.And((tile.lane % 4) < 1, tile.part < 1)
                    with T.If(ours), T.Then():
                        lse = cell("float32", const(-INF, "float32"))
                        with T.If(some), T.Then():
                            put(lse, peak + T.log(total))
                        store(arguments[task.lse].flat, get(lse), row)

    def _write(
        self, which: int, row: Value, some: Value, scale: Value, *, marks: Value | bool
    ) -> None:
        flat, dtype = self.kernel.arguments[self.task.o].flat, self.task.o.dtype
        with self._elements(which, row) as (n, at):
            value = cell("float32", const(0.0, "float32"))
            with T.If(some), T.Then():
                put(value, load(self.softmax.out, n) * scale)
            with T.If(const(True, "bool") if marks is True else marks), T.Then():
                put(value, get(value) + _marked(T.bind(load_f32(flat, dtype, at))))
            store_f32(flat, dtype, get(value), at)

    def _write_pairs(self, which: int, row: Value, some: Value, scale: Value) -> None:
        """Write elements of 16 bits two at a time."""
        out, dim = self.softmax.out, self.kernel.dim
        zero = const(0, "uint32")
        first = pin(self.tile.column + self.tile.lane % 4 * 2)
        start = pin(row * dim + cast(first, "int64"))
        argument = self.kernel.arguments[self.task.o]
        for n in range(self.columns):
            at = self._number(which, n)
            pair = mma.pack(load(out, at) * scale, load(out, at + 1) * scale, self.task.o.dtype)
            with T.If(first < dim - 8 * n), T.Then():
                to = argument.flat.ptr_to([start + 8 * n])
                ptx("st.global.b32", to, select(some, pair, zero))

    def _number(self, which: int, n: Value) -> Value:
        return (which // 2 * self.columns + n) * 4 + which % 2 * 2

    @contextmanager
    def _row(self, which: int) -> Iterator[tuple[Value, Value]]:
        """Yield a row of the thread, of queries and heads, and its head (int64), if it exists."""
        tile, heads = self.tile, self.tile.shape.heads
        r = pin(tile.row + (tile.lane // 4 + which // 2 * 16 + which % 2 * 8))
        head = pin(cast(tile.head + r % heads, "int64"))
        first = cast(tile.first + r // heads, "int64")
        row = pin((tile.sequence.q_start + first) * self.task.q.heads + head)
        with T.If(r < tile.present * heads), T.Then():
            yield row, head

    @contextmanager
    def _elements(self, which: int, row: Value) -> Iterator[tuple[Value, Value]]:
        """Walk the elements of a row: yields the sum's register, and where it goes."""
        tile, dim = self.tile, self.kernel.dim
        with T.unroll(self.columns) as n, T.unroll(2) as c:
            d = T.bind(tile.column + n * 8 + tile.lane % 4 * 2 + c)
            with T.If(d < dim), T.Then():
                yield self._number(which, n) + c, T.bind(row * dim + cast(d, "int64"))


def _marked(marks: Value) -> Value:
    """Return what is added to an output for its marks (bound float32)."""
    zero, low, high, nan = (const(x, "float32") for x in (0.0, -INF, INF, math.nan))
    both, down, up = (marks > const(x, "float32") for x in (2.5, 1.5, 0.5))
    return select(both, nan, select(down, low, select(up, high, zero)))
