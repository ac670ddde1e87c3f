"""Compute scores, weights and outputs of few heads: a computing group of `few`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.vec import LOG2E, load_f32
from sparsegen.codegen.gpu import pipeline, wgmma
from sparsegen.codegen.gpu.few_ring import Place, Turn
from sparsegen.codegen.gpu.launch import shuffle_xor
from sparsegen.codegen.gpu.listed_compute import LN2, LOW, NEVER
from sparsegen.codegen.gpu.listed_marks import Marks
from sparsegen.codegen.gpu.mma import pack, ptx
from sparsegen.codegen.gpu.pipeline import GROUP, meet
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    const,
    equal,
    load,
    maximum,
    minimum,
    scratch,
    select,
    store,
)

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.few import FewKernel

KEYS = 64  # of a chunk
EXCHANGED = 8  # registers of a thread that pass from group to group at a time
# Named barriers: of a computing group (two), and the end of a list.
OWN, SCAN = 1, 3


class Computing:
    """The computing group of every second chunk, from chunk `side` on.

    A thread holds the heads `_head(e)`, a quarter of them, of the keys or columns of values
    16 * warp + lane / 4 and 8 more.
    """

    def __init__(self, kernel: FewKernel, side: int) -> None:
        self.kernel, self.side, self.dtype = kernel, side, kernel.dtype
        self.warp, self.lane, self.thread = kernel.warp, kernel.lane, kernel.thread
        self.heads, self.values = kernel.heads, kernel.dim // 64
        self.quarter = self.heads // 4
        self.each = self.heads // 2  # registers of a product
        self.out = scratch(self.values * self.each, "float32")
        self.scores = scratch(self.each, "float32")
        self.packed = scratch(self.heads // 4, "uint32")
        self.peak, self.total = (scratch(self.quarter, "float32") for _ in range(2))
        self.next, self.shrink = (scratch(self.quarter, "float32") for _ in range(2))
        self.queries = wgmma.descriptor(wgmma.ALONG, kernel.queries.ptr_to([0]))
        self.weights = wgmma.descriptor(
            wgmma.ALONG, kernel.weights.ptr_to([side * self.heads * 64])
        )
        self.marks = Marks(kernel, side, OWN + side) if kernel.columns.apart else None

    def run(self) -> None:
        """Emit the loop over the tokens."""
        self.at = Place(self.kernel.ring)
        self.meetings = cell("int32", const(0, "int32"))
        self.kernel.each_tile(self._tile)

    def _tile(self, tile: Value, turn: Value) -> None:
        kernel = self.kernel
        for i in range(self.values * self.each):
            store(self.out, const(0.0, "float32"), i)
        for e in range(self.quarter):
            store(self.peak, const(LOW, "float32"), e)
            store(self.total, const(0.0, "float32"), e)
        kernel.query_ready.wait_tensor(turn)
        held = cell("int32", load(kernel.steps, 0))
        chunks = T.bind(get(held))
        if self.side == 1:
            with T.If(chunks < 2), T.Then():
                kernel.query_free.arrive()
        chunk = cell("int32", const(0, "int32"))
        with T.While(get(chunk) < chunks):
            ours = equal(T.bitwise_and(get(chunk), const(1, "int32")), self.side)
            with T.If(ours), T.Then():
                self._chunk(T.bind(get(chunk) + 2 >= chunks))
            self.at.advance()
            put(chunk, get(chunk) + 1)
        self._finish(tile)

    # --- a chunk --------------------------------------------------------------------------------

    def _chunk(self, last: Value) -> None:
        kernel, ring = self.kernel, self.kernel.ring
        turns = [self.at.after(n) for n in range(ring.parts)]
        self._add_scores(turns)
        with T.If(last), T.Then():
            kernel.query_free.arrive()
        self._softmax(turns[0].slot)
        pipeline.fence_tensor()
        meet(OWN + self.side, GROUP)
        self._weigh(turns)

    def _add_scores(self, turns: list[Turn]) -> None:
        kernel, ring = self.kernel, self.kernel.ring
        queries = wgmma.opaque(self.queries)
        wgmma.begin()
        for n, turn in enumerate(turns[: kernel.columns.keys // ring.part]):
            kernel.ready[turn.slot].wait_tensor(turn.round)
            keys = self._descriptor(wgmma.ALONG, turn.slot)
            tile = const(n * ring.part * self.heads * 128 >> 4, "uint64")
            wgmma.scores_across(
                self.scores, self.heads, keys, queries + tile, ring.part, self.dtype, clear=n == 0
            )
        wgmma.commit()
        wgmma.wait(0)
        wgmma.hold(self.scores, self.each)

    def _descriptor(self, kind: int, slot: Value) -> Value:
        return wgmma.descriptor(kind, self.kernel.keys.ptr_to([self.kernel.tile_of(slot)]))

    def _weigh(self, turns: list[Turn]) -> None:
        """Add weighted values, and free the keys as they have been used."""
        kernel, ring = self.kernel, self.kernel.ring
        weights = wgmma.opaque(self.weights)
        wgmma.hold(self.out, self.values * self.each)
        wgmma.begin()
        part = ring.part
        used = [range(n, min(n + part, self.values)) for n in range(0, self.values, part)]
        first = kernel.columns.first // part
        mine = turns[first : first + len(used)]
        for turn in turns:
            if turn not in mine:
                kernel.free[turn.slot].arrive()
        for n, tiles in enumerate(used):
            if kernel.columns.apart:
                kernel.ready[mine[n].slot].wait_tensor(mine[n].round)
            values = self._descriptor(wgmma.ACROSS, mine[n].slot)
            for order, tile in enumerate(tiles):
                wgmma.weigh_across(
                    self.out, tile * self.each, self.heads,
                    values + const(order * wgmma.TILE * 2 >> 4, "uint64"), weights, self.dtype,
                )  # fmt: skip
            wgmma.commit()
        for n in range(len(used)):
            wgmma.wait(len(used) - 1 - n)
            kernel.free[mine[n].slot].arrive()
        wgmma.hold(self.out, self.values * self.each)

    # --- weights --------------------------------------------------------------------------------

    def _register(self, e: int, half: int) -> int:
        """Return the register, of a product, of this thread's head e and half of the rows."""
        return e // 2 * 4 + 2 * half + e % 2

    def _head(self, e: int) -> Value:
        return 8 * (e // 2) + self.lane % 4 * 2 + e % 2

    def _softmax(self, slot: Value) -> None:
        """Turn scores into weights in shared memory; shrink sums and outputs."""
        kernel = self.kernel
        rate = const(kernel.rate, "float32")
        row = T.bind(slot * KEYS + self.warp * 16 + self.lane // 4)
        bias = [T.bind(load(kernel.bias, row + 8 * half)) for half in range(2)]
        for e in range(self.quarter):
            for half in range(2):
                n = self._register(e, half)
                store(self.scores, load(self.scores, n) + bias[half], n)
            low, high = (load(self.scores, self._register(e, half)) for half in range(2))
            store(self.next, maximum(low, high), e)
        self._across_rows(self.next, maximum)
        self._meet_warps(kernel.tops, self.next)
        for e in range(self.quarter):
            top = self._told(kernel.tops, self.side, e, maximum)
            top = T.bind(maximum(load(self.peak, e), top * rate))
            ptx("ex2.approx.ftz.f32", self.shrink[e], load(self.peak, e) - top)
            store(self.peak, top, e)
            store(self.total, load(self.total, e) * load(self.shrink, e), e)
        for e in range(self.quarter):
            for half in range(2):
                n = self._register(e, half)
                weight = load(self.scores, n) * rate - load(self.peak, e)
                ptx("ex2.approx.ftz.f32", self.scores[n], weight)
                store(self.total, load(self.total, e) + load(self.scores, n), e)
        for e in range(0, self.quarter, 2):
            for half in range(2):
                low, high = (load(self.scores, self._register(e + c, half)) for c in range(2))
                store(self.packed, pack(low, high, self.dtype), e + half)
        first = const(self.side * self.heads * 64, "int32")
        wgmma.store_across(self.packed, self.heads, kernel.weights, first, self.warp, self.lane)
        self._scale(self.shrink)

    def _scale(self, factor: Memory) -> None:
        """Multiply the outputs of each head."""
        for tile in range(self.values):
            for e in range(self.quarter):
                for half in range(2):
                    n = tile * self.each + self._register(e, half)
                    store(self.out, load(self.out, n) * load(factor, e), n)

    def _across_rows(self, numbers: Memory, combine: object) -> None:
        """Combine a number of each head over the rows of a warp; all lanes get the result."""
        assert callable(combine)
        for step in (4, 8, 16):
            for e in range(self.quarter):
                mine = T.bind(load(numbers, e))
                # Bound first: a combination that uses it twice must not shuffle twice.
                other = T.bind(shuffle_xor(mine, step))
                store(numbers, combine(mine, other), e)

    def _meet_warps(self, room: Memory, numbers: Memory) -> None:
        """Tell the other warps of the group a number of each head."""
        with T.If(self.lane < 4), T.Then():
            for e in range(self.quarter):
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

    def _meet_other(self) -> None:
        """Wait for the other computing group."""
        self.kernel.merged.arrive()
        self.kernel.merged.wait(get(self.meetings))
        put(self.meetings, get(self.meetings) + 1)

    # --- the end of a token ---------------------------------------------------------------------

    def _finish(self, tile: Value) -> None:
        """Put the outputs of both groups together; each writes half of the columns."""
        token, first_head, end = self.kernel.bounds(tile)
        if self.marks is not None:
            self.marks.note(self.out, self.values * self.each)
        self._normalise(token, first_head, end)
        odd = None if self.marks is None else self.marks.any(range(2))
        mine = self.values // 2
        first, others = self.side * mine, (1 - self.side) * mine
        kernel = self.kernel
        for start in range(0, mine * self.each, EXCHANGED):
            count = min(EXCHANGED, mine * self.each - start)
            for n in range(count):
                value = load(self.out, others * self.each + start + n)
                store(kernel.exchange, value, (self.side * EXCHANGED + n) * GROUP + self.thread)
            self._meet_other()
            for n in range(count):
                at = first * self.each + start + n
                theirs = ((1 - self.side) * EXCHANGED + n) * GROUP + self.thread
                store(self.out, load(self.out, at) + load(kernel.exchange, theirs), at)
            self._meet_other()
        if self.marks is not None:
            with T.If(odd), T.Then():
                self._mark(self.marks, token, first_head, range(first, first + mine))
        self._write(token, first_head, end, range(first, first + mine))

    def _mark(self, marks: Marks, token: Value, head: Value, tiles: range) -> None:
        """Replace outputs by what is not finite among the values."""
        marks.find(token, head, tiles)
        for tile in tiles:
            for half in range(2):
                column = T.bind(self.warp * 16 + self.lane // 4 + (tile * 64 + 8 * half))
                for e in range(self.quarter):
                    n, factor = tile * self.each + self._register(e, half), load(self.shrink, e)
                    found = marks.mark(load(self.out, n), column)
                    # The sum of weights is NaN where a score is, and so are all outputs.
                    store(self.out, select(T.isnan(factor), factor, found), n)

    def _normalise(self, token: Value, first: Value, end: Value) -> None:
        """Divide by the sum over the keys of both groups, and write the lse."""
        kernel, task = self.kernel, self.kernel.task
        zero = const(0.0, "float32")

        def add(a: Value, b: Value) -> Value:
            return a + b

        self._across_rows(self.total, add)
        with T.If(self.lane < 4), T.Then():
            for e in range(self.quarter):
                head = self._head(e)
                store(
                    kernel.sums,
                    load(self.total, e),
                    (self.side * 4 + self.warp) * self.heads + head,
                )
                with T.If(self.warp < 1), T.Then():
                    store(kernel.peaks, load(self.peak, e), self.side * self.heads + head)
        self._meet_other()
        base = T.bind(cast(token, "int64") * task.q.heads)
        for e in range(self.quarter):
            head = T.bind(self._head(e))
            peaks = [T.bind(load(kernel.peaks, s * self.heads + head)) for s in range(2)]
            peak = T.bind(maximum(*peaks))
            parts = [T.exp2(p - peak) for p in peaks]
            sums = [self._told(kernel.sums, s, e, add) for s in range(2)]
            total = T.bind(sums[0] * parts[0] + sums[1] * parts[1])
            whole = total
            head = T.bind(first + head) if kernel.each > 1 else head
            if task.sink is not None:
                near = minimum(head, const(task.q.heads - 1, "int32"))
                flat = kernel.arguments[task.sink].flat
                # Else addresses that all tokens share wait in registers.
                at = cast(wgmma.opaque(cast(near, "uint64")), "int64")
                sink = load_f32(flat, task.sink.dtype, at)
                whole = T.bind(total + T.exp2(sink * const(LOG2E, "float32") - peak))
            factor = T.exp2(load(self.peak, e) - peak) / whole
            store(self.shrink, select(equal(total, zero), zero, factor), e)
            if task.lse is not None and self.side == 0:
                ours = T.And(T.And(self.lane < 4, self.warp < 1), head < end)
                with T.If(ours), T.Then():
                    lse = T.log(total) + peak * const(LN2, "float32")
                    lse = select(equal(total, zero), const(NEVER, "float32"), lse)
                    store(kernel.arguments[task.lse].flat, lse, base + cast(head, "int64"))
        self._scale(self.shrink)

    def _write(self, token: Value, first: Value, end: Value, tiles: range) -> None:
        kernel, task = self.kernel, self.kernel.task
        flat = kernel.arguments[task.o].flat
        column = self.warp * 16 + self.lane // 4
        for e in range(self.quarter):
            head = T.bind(first + self._head(e))
            with T.If(head < end), T.Then():
                row = cast(token, "int64") * task.q.heads + cast(head, "int64")
                base = T.bind(row * kernel.dim + cast(column, "int64"))
                for tile in tiles:
                    for half in range(2):
                        value = load(self.out, tile * self.each + self._register(e, half))
                        at = base + (tile * 64 + 8 * half)
                        store(flat, cast(value, task.o.dtype), at)
