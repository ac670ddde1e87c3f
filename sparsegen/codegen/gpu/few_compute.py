"""Compute scores, weights and outputs of few heads: a computing group of `few`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsegen.codegen.gpu import pipeline, wgmma
from sparsegen.codegen.gpu.launch import add, shuffle_xor
from sparsegen.codegen.gpu.listed_marks import Marks
from sparsegen.codegen.gpu.mma import pack, ptx
from sparsegen.codegen.gpu.pipeline import GROUP, meet
from sparsegen.codegen.gpu.ring_compute import KEYS, OWN, Computing
from sparsegen.codegen.tvm import Memory, T, Value, cast, const, load, maximum, select, store

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.few import FewKernel


class HeadsAsColumns(Computing):
    """A group whose products have heads as columns: few of them cost little.

    A thread holds the heads `_head(e)`, a quarter of them, of the keys or columns of values
    16 * warp + lane / 4 and 8 more.
    """

    def __init__(self, kernel: FewKernel, side: int) -> None:
        super().__init__(kernel, side, kernel.heads // 4)
        self.weights = wgmma.descriptor(
            wgmma.ALONG, kernel.weights.ptr_to([side * self.heads * 64])
        )

    def _register(self, e: int, half: int) -> int:
        """Return the register, of a product, of this thread's head e and half of the rows."""
        return e // 2 * 4 + 2 * half + e % 2

    def _head(self, e: int) -> Value:
        return 8 * (e // 2) + self.lane % 4 * 2 + e % 2

    def _multiply(self, queries: Value, keys: Value, *, clear: bool) -> None:
        part = self.kernel.ring.part
        wgmma.scores_across(self.scores, self.heads, keys, queries, part, self.dtype, clear=clear)

    def _add_values(self, tiles: range, values: Value, weights: Memory | Value) -> None:
        for order, tile in enumerate(tiles):
            wgmma.weigh_across(
                self.out, tile * self.each, self.heads,
                values + const(order * wgmma.TILE * 2 >> 4, "uint64"), weights, self.dtype,
            )  # fmt: skip

    def _softmax(self, slot: Value) -> Value:
        kernel = self.kernel
        rate = const(kernel.rate, "float32")
        row = T.bind(slot * KEYS + self.warp * 16 + self.lane // 4)
        bias = [T.bind(load(kernel.bias, row + 8 * half)) for half in range(2)]
        for e in range(self.held):
            for half in range(2):
                n = self._register(e, half)
                store(self.scores, load(self.scores, n) + bias[half], n)
            low, high = (load(self.scores, self._register(e, half)) for half in range(2))
            store(self.next, maximum(low, high), e)
        self._across_rows(self.next, maximum)
        self._meet_warps(kernel.tops, self.next)
        for e in range(self.held):
            top = self._told(kernel.tops, self.side, e, maximum)
            top = T.bind(maximum(load(self.peak, e), top * rate))
            ptx("ex2.approx.ftz.f32", self.shrink[e], load(self.peak, e) - top)
            store(self.peak, top, e)
            store(self.total, load(self.total, e) * load(self.shrink, e), e)
        for e in range(self.held):
            for half in range(2):
                n = self._register(e, half)
                weight = load(self.scores, n) * rate - load(self.peak, e)
                ptx("ex2.approx.ftz.f32", self.scores[n], weight)
                store(self.total, load(self.total, e) + load(self.scores, n), e)
        for e in range(0, self.held, 2):
            for half in range(2):
                low, high = (load(self.scores, self._register(e + c, half)) for c in range(2))
                store(self.packed, pack(low, high, self.dtype), e + half)
        first = const(self.side * self.heads * 64, "int32")
        wgmma.store_across(self.packed, self.heads, kernel.weights, first, self.warp, self.lane)
        self._scale(self.shrink)
        pipeline.fence_tensor()
        meet(OWN + self.side, GROUP)
        return wgmma.opaque(self.weights)

    def _scale(self, factor: Memory) -> None:
        for tile in range(self.values):
            for e in range(self.held):
                for half in range(2):
                    n = tile * self.each + self._register(e, half)
                    store(self.out, load(self.out, n) * load(factor, e), n)

    def _across_rows(self, numbers: Memory, combine: object) -> None:
        """Combine a number of each head over the rows of a warp; all lanes get the result."""
        assert callable(combine)
        for step in (4, 8, 16):
            for e in range(self.held):
                mine = T.bind(load(numbers, e))
                # Bound first: a combination that uses it twice must not shuffle twice.
                other = T.bind(shuffle_xor(mine, step))
                store(numbers, combine(mine, other), e)

    def _meet_warps(self, room: Memory, numbers: Memory) -> None:
        """Tell the other warps of the group a number of each head."""
        with T.If(self.lane < 4), T.Then():
            for e in range(self.held):
                at = (self.side * 4 + self.warp) * self.heads + self._head(e)
                store(room, load(numbers, e), at)
        meet(OWN + self.side, GROUP)

    def _told(self, room: Memory, side: int, e: int, combine: object) -> Value:
        """Return the combination of what the warps of a group told."""
        assert callable(combine)
        found = load(room, side * 4 * self.heads + self._head(e))
        for warp in range(1, 4):
            other = T.bind(load(room, (side * 4 + warp) * self.heads + self._head(e)))
            found = T.bind(combine(found, other))
        return found

    def _tell(self) -> None:
        self._across_rows(self.total, add)
        with T.If(self.lane < 4), T.Then():
            for e in range(self.held):
                head = self._head(e)
                store(
                    self.kernel.sums,
                    load(self.total, e),
                    (self.side * 4 + self.warp) * self.heads + head,
                )
                with T.If(self.warp < 1), T.Then():
                    store(self.kernel.peaks, load(self.peak, e), self.side * self.heads + head)

    def _sum(self, side: int, e: int) -> Value:
        return self._told(self.kernel.sums, side, e, add)

    def _first(self) -> Value:
        return T.And(self.lane < 4, self.warp < 1)

    def _mark(self, marks: Marks, token: Value, head: Value, tiles: range) -> None:
        marks.find(token, head, tiles)
        for tile in tiles:
            for half in range(2):
                column = T.bind(self.warp * 16 + self.lane // 4 + (tile * 64 + 8 * half))
                for e in range(self.held):
                    n, factor = tile * self.each + self._register(e, half), load(self.shrink, e)
                    found = marks.mark(load(self.out, n), column)
                    # The sum of weights is NaN where a score is, and so are all outputs.
                    store(self.out, select(T.isnan(factor), factor, found), n)

    def _write(self, token: Value, first: Value, end: Value, tiles: range) -> None:
        kernel, task = self.kernel, self.kernel.task
        flat = kernel.arguments[task.o].flat
        column = self.warp * 16 + self.lane // 4
        for e in range(self.held):
            head = T.bind(first + self._head(e))
            with T.If(head < end), T.Then():
                row = cast(token, "int64") * task.q.heads + cast(head, "int64")
                base = T.bind(row * kernel.dim + cast(column, "int64"))
                for tile in tiles:
                    for half in range(2):
                        value = load(self.out, tile * self.each + self._register(e, half))
                        at = base + (tile * 64 + 8 * half)
                        store(flat, cast(value, task.o.dtype), at)
