"""Compute over a ring of keys: a group of every second chunk, however heads lie in products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.vec import LOG2E, load_f32
from sparsegen.codegen.gpu import wgmma
from sparsegen.codegen.gpu.few_ring import Place, Turn
from sparsegen.codegen.gpu.listed_compute import LN2, LOW, NEVER
from sparsegen.codegen.gpu.listed_marks import Marks
from sparsegen.codegen.gpu.pipeline import GROUP
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
# Named barriers: of a computing group (two), and the end of a list.
OWN, SCAN = 1, 3


class Computing(ABC):
    """The computing group of every second chunk, from chunk `side` on.

    held  heads of which a thread holds some keys, or some columns of values
    """

    def __init__(self, kernel: FewKernel, side: int, held: int) -> None:
        self.kernel, self.side, self.dtype = kernel, side, kernel.dtype
        self.warp, self.lane, self.thread = kernel.warp, kernel.lane, kernel.thread
        self.heads, self.values, self.held = kernel.heads, kernel.dim // 64, held
        self.each = self.heads // 2  # registers of a product
        self.out = scratch(self.values * self.each, "float32")
        self.scores = scratch(self.each, "float32")
        self.packed = scratch(self.heads // 4, "uint32")
        self.peak, self.total = (scratch(held, "float32") for _ in range(2))
        self.next, self.shrink = (scratch(held, "float32") for _ in range(2))
        self.queries = wgmma.descriptor(wgmma.ALONG, kernel.queries.ptr_to([0]))
        self.marks = Marks(kernel, side, OWN + side) if kernel.columns.apart else None

    # --- how heads lie --------------------------------------------------------------------------

    @abstractmethod
    def _head(self, e: int) -> Value:
        """Return which head of a tile is the thread's head `e`."""

    @abstractmethod
    def _multiply(self, queries: Value, keys: Value, *, clear: bool) -> None:
        """Add the scores of the columns of a slot of the ring."""

    @abstractmethod
    def _softmax(self, slot: Value) -> Memory | Value:
        """Turn scores into weights, which are returned; shrink sums and outputs."""

    @abstractmethod
    def _add_values(self, tiles: range, values: Value, weights: Memory | Value) -> None:
        """Add weighted values, of tiles of 64 columns that lie side by side."""

    @abstractmethod
    def _scale(self, factor: Memory) -> None:
        """Multiply the outputs of each head."""

    @abstractmethod
    def _tell(self) -> None:
        """Write sums of weights, and maxima, where the other group reads them."""

    @abstractmethod
    def _sum(self, side: int, e: int) -> Value:
        """Return the sum of weights that a group told of the thread's head `e`."""

    @abstractmethod
    def _first(self) -> Value:
        """Tell whether the thread is the first one of its heads."""

    @abstractmethod
    def _mark(self, marks: Marks, token: Value, head: Value, tiles: range) -> None:
        """Replace outputs by what is not finite among the values."""

    @abstractmethod
    def _write(self, token: Value, first: Value, end: Value, tiles: range) -> None:
        """Write outputs."""

    # --- the loop over tokens -------------------------------------------------------------------

    def run(self) -> None:
        """Emit the loop over the tokens."""
        self.at = Place(self.kernel.ring)
        self.meetings = cell("int32", const(0, "int32"))
        self.kernel.each_tile(self._tile)

    def _tile(self, tile: Value, turn: Value) -> None:
        kernel = self.kernel
        for i in range(self.values * self.each):
            store(self.out, const(0.0, "float32"), i)
        for e in range(self.held):
            store(self.peak, const(LOW, "float32"), e)
            store(self.total, const(0.0, "float32"), e)
        kernel.query_ready.wait_tensor(turn)
        steps = cell("int32", load(kernel.steps, 0))
        chunks = T.bind(get(steps))
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

    def _chunk(self, last: Value) -> None:
        kernel, ring = self.kernel, self.kernel.ring
        turns = [self.at.after(n) for n in range(ring.parts)]
        self._add_scores(turns)
        with T.If(last), T.Then():
            kernel.query_free.arrive()
        self._weigh(turns, self._softmax(turns[0].slot))

    def _add_scores(self, turns: list[Turn]) -> None:
        kernel, ring = self.kernel, self.kernel.ring
        queries = wgmma.opaque(self.queries)
        wgmma.begin()
        for n, turn in enumerate(turns[: kernel.columns.keys // ring.part]):
            kernel.ready[turn.slot].wait_tensor(turn.round)
            keys = self._descriptor(wgmma.ALONG, turn.slot)
            tile = const(n * ring.part * self.heads * 128 >> 4, "uint64")
            self._multiply(queries + tile, keys, clear=n == 0)
        wgmma.commit()
        wgmma.wait(0)
        wgmma.hold(self.scores, self.each)

    def _descriptor(self, kind: int, slot: Value) -> Value:
        return wgmma.descriptor(kind, self.kernel.keys.ptr_to([self.kernel.tile_of(slot)]))

    def _weigh(self, turns: list[Turn], weights: Memory | Value) -> None:
        """Add weighted values, and free the keys as they have been used."""
        kernel, ring = self.kernel, self.kernel.ring
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
            self._add_values(tiles, values, weights)
            wgmma.commit()
        for n in range(len(used)):
            wgmma.wait(len(used) - 1 - n)
            kernel.free[mine[n].slot].arrive()
        wgmma.hold(self.out, self.values * self.each)

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
        halves = self.kernel.columns.split
        left = len(halves[0])  # at least as many as there are right ones
        mine, others = halves[self.side], halves[1 - self.side]
        kernel, room = self.kernel, self.kernel.exchanged
        for start in range(0, left * self.each, room):
            for n in range(min(room, len(others) * self.each - start)):
                value = load(self.out, others.start * self.each + start + n)
                store(kernel.exchange, value, (self.side * room + n) * GROUP + self.thread)
            self._meet_other()
            for n in range(min(room, len(mine) * self.each - start)):
                at = mine.start * self.each + start + n
                theirs = ((1 - self.side) * room + n) * GROUP + self.thread
                store(self.out, load(self.out, at) + load(kernel.exchange, theirs), at)
            self._meet_other()
        if self.marks is not None and mine:
            with T.If(odd), T.Then():
                self._mark(self.marks, token, first_head, mine)
        self._write(token, first_head, end, mine)

    def _normalise(self, token: Value, first: Value, end: Value) -> None:
        """Divide by the sum over the keys of both groups, and write the lse."""
        kernel, task = self.kernel, self.kernel.task
        zero = const(0.0, "float32")
        self._tell()
        self._meet_other()
        base = T.bind(cast(token, "int64") * task.q.heads)
        for e in range(self.held):
            head = T.bind(self._head(e))
            peaks = [T.bind(load(kernel.peaks, s * self.heads + head)) for s in range(2)]
            peak = T.bind(maximum(*peaks))
            parts = [T.exp2(p - peak) for p in peaks]
            sums = [self._sum(s, e) for s in range(2)]
            total = T.bind(sums[0] * parts[0] + sums[1] * parts[1])
            whole = total
            head = T.bind(first + head) if kernel.split.count > 1 else head
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
                ours = T.And(self._first(), head < end)
                with T.If(ours), T.Then():
                    lse = T.log(total) + peak * const(LN2, "float32")
                    lse = select(equal(total, zero), const(NEVER, "float32"), lse)
                    store(kernel.arguments[task.lse].flat, lse, base + cast(head, "int64"))
        self._scale(self.shrink)
