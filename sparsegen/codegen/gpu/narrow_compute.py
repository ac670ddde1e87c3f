"""Compute scores, weights and outputs of many heads, narrow values: a computing group of `few`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsegen.codegen.gpu import wgmma
from sparsegen.codegen.gpu.launch import across, add
from sparsegen.codegen.gpu.listed_marks import Marks
from sparsegen.codegen.gpu.mma import pack, ptx
from sparsegen.codegen.gpu.ring_compute import KEYS, Computing
from sparsegen.codegen.gpu.row_softmax import RowSoftmax
from sparsegen.codegen.tvm import Memory, T, Value, cast, load, select, store

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.few import FewKernel


class HeadsAsRows(Computing):
    """A group whose products have 64 heads as rows: weights go from registers to registers.

    A thread holds the heads 16 * warp + lane / 4 and 8 more.
    """

    def __init__(self, kernel: FewKernel, side: int) -> None:
        super().__init__(kernel, side, 2)
        self.softmax = RowSoftmax(
            kernel.rate, self.dtype, self.lane, self.scores, self.packed,
            self.peak, self.total, self.shrink,
        )  # fmt: skip

    def _head(self, e: int) -> Value:
        return self.warp * 16 + self.lane // 4 + 8 * e

    def _multiply(self, queries: Value, keys: Value, *, clear: bool) -> None:
        tiles = range(self.kernel.ring.part)
        wgmma.scores(self.scores, queries, keys, tiles, self.dtype, clear=clear)

    def _softmax(self, slot: Value) -> Memory:
        first = T.bind(slot * KEYS)
        self.softmax.weigh(self.kernel.bias, first, self.peak, lambda: self._scale(self.shrink))
        return self.packed

    def _add_values(self, tiles: range, values: Value, weights: Memory | Value) -> None:
        first = tiles.start * self.each
        wgmma.weigh(self.out, 64 * len(tiles), weights, values, self.dtype, first)

    def _scale(self, factor: Memory) -> None:
        for n in range(self.values * self.each):
            store(self.out, load(self.out, n) * load(factor, n // 2 % 2), n)

    def _tell(self) -> None:
        for e in range(2):
            store(self.total, across(load(self.total, e), add, 4), e)
        with T.If(self._first()), T.Then():
            for e in range(2):
                at = T.bind(self.side * self.heads + self._head(e))
                store(self.kernel.sums, load(self.total, e), at)
                store(self.kernel.peaks, load(self.peak, e), at)

    def _sum(self, side: int, e: int) -> Value:
        return load(self.kernel.sums, side * self.heads + self._head(e))

    def _first(self) -> Value:
        return self.lane % 4 < 1

    def _mark(self, marks: Marks, token: Value, head: Value, tiles: range) -> None:
        marks.find(token, head, tiles)
        for n in range(tiles.start * self.each, tiles.stop * self.each):
            column, factor = self._column(n), load(self.shrink, n // 2 % 2)
            found = marks.mark(load(self.out, n), column)
            # The sum of weights is NaN where a score is, and so are all outputs.
            store(self.out, select(T.isnan(factor), factor, found), n)

    def _write(self, token: Value, first: Value, end: Value, tiles: range) -> None:
        """Write two columns at a time."""
        kernel, task = self.kernel, self.kernel.task
        flat = kernel.arguments[task.o].flat
        for e in range(2):
            head = T.bind(first + self._head(e))
            with T.If(head < end), T.Then():
                row = cast(token, "int64") * task.q.heads + cast(head, "int64")
                base = T.bind(row * kernel.dim + cast(self.lane % 4 * 2, "int64"))
                for j in range(tiles.start * 8, tiles.stop * 8):
                    low, high = (load(self.out, 4 * j + 2 * e + c) for c in range(2))
                    if task.o.dtype == self.dtype:
                        to = flat.ptr_to([base + 8 * j])
                        ptx("st.global.b32", to, pack(low, high, self.dtype))
                    else:
                        store(flat, low, base + 8 * j)
                        store(flat, high, base + (8 * j + 1))

    def _column(self, n: int) -> Value:
        """Return the column of register `n` of the outputs."""
        return self.lane % 4 * 2 + (n // 4 * 8 + n % 2)
