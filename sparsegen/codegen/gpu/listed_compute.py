"""Compute scores, weights and outputs over lists of keys: the two computing groups of `listed`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.vec import LOG2E, load_f32
from sparsegen.codegen.gpu import pipeline, wgmma
from sparsegen.codegen.gpu.launch import across, add
from sparsegen.codegen.gpu.listed_marks import Marks
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.pipeline import GROUP, meet, pass_by
from sparsegen.codegen.gpu.row_softmax import RowSoftmax
from sparsegen.codegen.gpu.wgmma import TILE
from sparsegen.codegen.tvm import (
    T,
    Value,
    cast,
    const,
    equal,
    load,
    minimum,
    scratch,
    select,
    store,
)

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.listed import ListedKernel
    from sparsegen.codegen.tvm import Memory

ROWS = 64  # heads of a tile, keys of a chunk
BOTH = 2 * GROUP
NEVER = float("-inf")
LOW = -1e30  # a maximum before any score
LN2 = 0.6931471805599453
# Named barriers: the weights of even and of odd, their sums, their outputs (one each), the end of a
# list, and rows where boxes are expected.
WEIGHTS_EVEN, WEIGHTS_ODD, SUMS, OUT, SCAN, COPIED = 1, 2, 3, 4, 6, 7


class Computing:
    """What both computing groups do: `side` 0 is even, 1 is odd."""

    side: int

    def __init__(self, kernel: ListedKernel) -> None:
        self.kernel, self.dtype = kernel, kernel.dtype
        self.tiles = kernel.columns.split[self.side]  # of the values
        self.half = 64 * len(self.tiles)
        self.warp, self.lane, self.thread = kernel.warp, kernel.lane, kernel.thread
        self.out = scratch(self.half // 2, "float32")
        self.scores, self.packed = scratch(32, "float32"), scratch(16, "uint32")
        self.peak, self.total = scratch(2, "float32"), scratch(2, "float32")
        self.next, self.shrink = scratch(2, "float32"), scratch(2, "float32")
        self.softmax = RowSoftmax(
            kernel.rate, kernel.dtype, self.lane, self.scores, self.packed,
            self.peak, self.total, self.shrink,
        )  # fmt: skip
        keys, weights = kernel.keys, kernel.weights
        column = (kernel.columns.first + self.tiles.start) * TILE
        self.queries = wgmma.descriptor(wgmma.ALONG, kernel.queries.ptr_to([0]))
        self.keys = wgmma.descriptor(wgmma.ALONG, keys[self.side].ptr_to([0]))
        self.values = [wgmma.descriptor(wgmma.ACROSS, k.ptr_to([column])) for k in keys]
        first = (kernel.first, 0)[1 - self.side]
        other = weights[1 - self.side].ptr_to([first])
        self.others = wgmma.descriptor(wgmma.ALONG, other)
        apart = kernel.columns.apart
        self.marks = Marks(kernel, self.side, OUT + self.side) if apart else None

    def run(self) -> None:
        """Emit the loop over the tiles."""
        self.done = cell("int32", const(0, "int32"))
        self.kernel.each_tile(self._tile)

    def _tile(self, tile: Value, turn: Value) -> None:
        for i in range(self.half // 2):
            store(self.out, const(0.0, "float32"), i)
        for half in range(2):
            store(self.peak, const(LOW, "float32"), half)
            store(self.total, const(0.0, "float32"), half)
        self.kernel.query_ready.wait_tensor(turn)
        pairs = cell("int32", load(self.kernel.steps, 0))
        self.pairs = T.bind(get(pairs))
        before = T.bind(get(self.done))
        self._walk(before)
        put(self.done, before + self.pairs)
        self._finish(tile)

    def _walk(self, before: Value) -> None:
        raise NotImplementedError

    def _add_scores(self, half: int, phase: Value, *, clear: bool) -> None:
        kernel = self.kernel
        ready = kernel.ready[self.side][half]
        for barrier, tiles in zip(ready, kernel.pieces(half), strict=True):
            # Boxes come by the proxy that tensor cores read by.
            if kernel.boxes is None:
                barrier.wait_tensor(phase)
            else:
                barrier.wait(phase)
            # A compiler that knows the descriptors keeps one per product in registers, and spills.
            queries, keys = wgmma.opaque(self.queries), wgmma.opaque(self.keys)
            wgmma.scores(self.scores, queries, keys, tiles, self.dtype, clear=clear)
            clear = False

    def _softmax(self, least: Memory) -> None:
        """Turn scores into weights of a maximum that is at least `least`; shrink the sums."""
        self.softmax.weigh(self.kernel.bias, self.side * ROWS, least, self._shrink_out)

    def _shrink_out(self) -> None:
        for i in range(self.half // 2):
            store(self.out, load(self.out, i) * load(self.shrink, i // 2 % 2), i)

    def _hold(self) -> None:
        wgmma.hold(self.out, self.half // 2)

    def _tell_top(self) -> None:
        with T.If(self.lane % 4 < 1), T.Then():
            for half in range(2):
                at = self.thread // 4 * 2 + half
                store(self.kernel.tops[self.side], load(self.peak, half), at)
            self.kernel.told[self.side].arrive()

    def _let_go_of_queries(self, pair: Memory) -> None:
        """Give the queries back, once the scores of the last chunk are there."""
        with T.If(get(pair) + 1 >= self.pairs), T.Then():
            self.kernel.query_free.arrive()

    def _told_top(self, half: int) -> Value:
        return load(self.kernel.tops[1 - self.side], self.thread // 4 * 2 + half)

    def _finish(self, tile: Value) -> None:
        """Write the columns of this group, and the even one the lse."""
        kernel, task = self.kernel, self.kernel.task
        zero = const(0.0, "float32")
        for half in range(2):
            store(self.total, across(load(self.total, half), add, 4), half)
        with T.If(self.lane % 4 < 1), T.Then():
            for half in range(2):
                at = self.side * ROWS + self.thread // 4 * 2 + half
                store(kernel.sums, load(self.total, half), at)
        if self.marks is not None:
            self.marks.note(self.out, self.half // 2)
        meet(SUMS, BOTH)
        token = T.bind(tile // kernel.heads.count)
        head, end = kernel.heads.bounds(tile)
        base = T.bind(cast(token, "int64") * task.q.heads)
        for half in range(2):
            other = load(kernel.sums, (1 - self.side) * ROWS + self.thread // 4 * 2 + half)
            total = T.bind(load(self.total, half) + other)
            peak = T.bind(load(self.peak, half))
            h = T.bind(head + self.warp * 16 + self.lane // 4 + 8 * half)
            whole = total
            if task.sink is not None:
                near = minimum(h, const(task.q.heads - 1, "int32"))
                flat = kernel.arguments[task.sink].flat
                # Else an address that all tiles share waits in registers, of which none is left.
                at = cast(wgmma.opaque(cast(near, "uint64")), "int64")
                sink = load_f32(flat, task.sink.dtype, at)
                whole = T.bind(total + T.exp2(sink * const(LOG2E, "float32") - peak))
            inverse = const(1.0, "float32") / whole
            store(self.shrink, select(equal(total, zero), zero, inverse), half)
            if task.lse is not None and self.side == 0:
                ours = T.And(self.lane % 4 < 1, h < end)
                with T.If(ours), T.Then():
                    lse = T.log(total) + peak * const(LN2, "float32")
                    lse = select(equal(total, zero), const(NEVER, "float32"), lse)
                    store(kernel.arguments[task.lse].flat, lse, base + cast(h, "int64"))
        if self.marks is not None:
            self._mark(self.marks, token, head)
        self._write(base, head, end)
        # Boxes are written by another proxy than outputs were.
        if kernel.boxes is not None:
            pipeline.fence_tensor()
        kernel.let_go(1, self.side)

    def _mark(self, marks: Marks, token: Value, head: Value) -> None:
        """Replace sums by what is not finite among the values."""
        with T.If(marks.any(range(self.side, self.side + 1))), T.Then():
            marks.find(token, head, self.tiles)
            for n in range(self.half // 2):
                column = self.tiles.start * 64 + self.lane % 4 * 2 + (n // 4 * 8 + n % 2)
                store(self.out, marks.mark(load(self.out, n), column), n)

    def _write(self, base: Value, head: Value, end: Value) -> None:
        """Bring outputs through the odd buffer into rows of 16-byte pieces."""
        kernel, task = self.kernel, self.kernel.task
        flat = kernel.arguments[task.o].flat
        if task.o.dtype != self.dtype:
            self._write_wide(flat, base, head, end)
            return
        staged = kernel.keys[1]
        first, piece = T.bind(self.thread // 8), T.bind(self.thread % 8)
        for n, tile in enumerate(self.tiles):
            place = (kernel.columns.first + tile) * TILE
            wgmma.pack_tile(self.packed, self.out, self.dtype, 32 * n, self.shrink)
            wgmma.store_tile(self.packed, staged, place, self.warp, self.lane)
            meet(OUT + self.side, GROUP)
            for r in range(4):
                row = T.bind(head + (first + 16 * r))
                with T.If(row < end), T.Then():
                    at = (base + cast(row, "int64")) * kernel.dim + (tile * 64)
                    there = place + wgmma.swizzled(first, piece) + r * 16 * 64
                    value = load(staged, there, lanes=8)
                    store(flat, value, at + cast(piece * 8, "int64"))

    def _write_wide(self, flat: Memory, base: Value, head: Value, end: Value) -> None:
        """Write float32, in pairs that fill sectors."""
        kernel = self.kernel
        column = self.tiles.start * 64 + self.lane % 4 * 2
        for half in range(2):
            h = T.bind(head + self.warp * 16 + self.lane // 4 + 8 * half)
            with T.If(h < end), T.Then():
                at = T.bind((base + cast(h, "int64")) * kernel.dim + cast(column, "int64"))
                for n in range(self.half // 8):
                    for c in range(2):
                        value = load(self.out, 4 * n + 2 * half + c) * load(self.shrink, half)
                        store(flat, value, at + (8 * n + c))


class Even(Computing):
    """Scores of even chunks, left columns of the values."""

    side = 0

    def _walk(self, before: Value) -> None:
        kernel = self.kernel
        wgmma.begin()
        self._add_scores(0, before, clear=True)
        self._add_scores(1, before, clear=False)
        wgmma.commit()
        wgmma.wait(0)
        wgmma.hold(self.scores, 32)
        pair = cell("int32", const(0, "int32"))
        with T.While(get(pair) < self.pairs):
            phase = T.bind(before + get(pair))
            kernel.known.wait(phase)
            self._let_go_of_queries(pair)
            self._softmax(self.peak)
            self._tell_top()
            self._hold()
            wgmma.begin()
            wgmma.weigh(self.out, self.half, self.packed, self.values[0], self.dtype)
            wgmma.commit()
            wgmma.wait(0)
            self._hold()
            kernel.let_go(0, 0)
            kernel.told[1].wait(phase)
            for half in range(2):
                top = T.bind(self._told_top(half))
                ptx("ex2.approx.ftz.f32", self.shrink[half], load(self.peak, half) - top)
                store(self.peak, top, half)
                store(self.total, load(self.total, half) * load(self.shrink, half), half)
            wgmma.pack_tile(self.packed, self.scores, self.dtype, 0, self.shrink)
            wgmma.store_tile(self.packed, kernel.weights[0], kernel.first, self.warp, self.lane)
            pipeline.fence_tensor()
            pass_by(WEIGHTS_EVEN, BOTH)
            meet(WEIGHTS_ODD, BOTH)
            self._shrink_out()
            self._hold()
            wgmma.begin()
            wgmma.weigh_shared(self.out, self.half, self.others, self.values[1], self.dtype)
            wgmma.commit()
            with T.If(get(pair) + 1 < self.pairs):
                with T.Then():
                    self._add_scores(0, phase + 1, clear=True)
                    wgmma.commit()
                    wgmma.wait(1)
                    kernel.let_go(1, 0)
                    self._add_scores(1, phase + 1, clear=False)
                    wgmma.commit()
                    wgmma.wait(0)
                    wgmma.hold(self.scores, 32)
                with T.Else():
                    wgmma.wait(0)
            self._hold()
            put(pair, get(pair) + 1)


class Odd(Computing):
    """Scores of odd chunks, right columns of the values."""

    side = 1

    def _walk(self, before: Value) -> None:
        kernel = self.kernel
        pair = cell("int32", const(0, "int32"))
        with T.While(get(pair) < self.pairs):
            phase = T.bind(before + get(pair))
            wgmma.begin()
            self._add_scores(1, phase, clear=True)
            # Keys of 64 columns have no right ones.
            self._add_scores(0, phase, clear=not kernel.halves[1][0])
            wgmma.commit()
            wgmma.wait(0)
            wgmma.hold(self.scores, 32)
            kernel.known.wait(phase)
            kernel.told[0].wait(phase)
            self._let_go_of_queries(pair)
            for half in range(2):
                store(self.next, self._told_top(half), half)
            self._softmax(self.next)
            self._tell_top()
            self._hold()
            wgmma.begin()
            wgmma.weigh(self.out, self.half, self.packed, self.values[1], self.dtype)
            wgmma.commit()
            wgmma.store_tile(self.packed, kernel.weights[1], 0, self.warp, self.lane)
            meet(WEIGHTS_EVEN, BOTH)
            wgmma.weigh_shared(self.out, self.half, self.others, self.values[0], self.dtype)
            wgmma.commit()
            pipeline.fence_tensor()
            pass_by(WEIGHTS_ODD, BOTH)
            wgmma.wait(1)
            with T.If(get(pair) + 1 < self.pairs), T.Then():
                kernel.let_go(1, 1)
            wgmma.wait(0)
            self._hold()
            kernel.let_go(0, 1)
            put(pair, get(pair) + 1)
