"""Emit attention on Hopper over lists of keys, for few heads that share them, or narrow values.

Tensor cores take 64 rows at least, so keys and columns of values are rows, and heads are columns:
scores are K Q^T, outputs V^T P^T. More than 32 heads are rows, 64 of a tile, where registers have
room for all columns of narrow values: scores are Q K^T, outputs P V. A block walks over tokens,
with each key head, and the keys of a token, those of ranges and of lists one after the other, in
chunks of 64:

    gather   warp group 2 copies rows of keys, and of values that are no part of them, into a ring,
             some columns at a time
    even     warp group 0: the even chunks, from scores to weighted values
    odd      warp group 1: the odd chunks

Both have maxima, sums and outputs of their own, which meet at the end of a token.
"""

from __future__ import annotations

from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.attend import shared_heads
from sparsegen.codegen.cpu.rows import Arguments
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.vec import LOG2E
from sparsegen.codegen.gpu import pipeline
from sparsegen.codegen.gpu.few_compute import HeadsAsColumns
from sparsegen.codegen.gpu.few_ring import Place, Ring
from sparsegen.codegen.gpu.gather import Gather
from sparsegen.codegen.gpu.launch import device
from sparsegen.codegen.gpu.listed_compute import NEVER, ROWS
from sparsegen.codegen.gpu.listed_cut import Columns, Cut, Heads
from sparsegen.codegen.gpu.listed_marks import marks_bytes
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.narrow_compute import HeadsAsRows
from sparsegen.codegen.gpu.pipeline import GROUP, Barrier
from sparsegen.codegen.gpu.ring_compute import KEYS, SCAN
from sparsegen.codegen.gpu.slots import STEP, Rows
from sparsegen.codegen.gpu.wgmma import TILE
from sparsegen.codegen.tvm import (
    T,
    Value,
    cast,
    const,
    load,
    maximum,
    select,
    store,
)
from sparsegen.lowering.tasks import AttendTask

MOST = 32  # heads that are columns
_LONGEST = 16  # slots of a ring
_ALIGNED = 128  # bytes lost between things in shared memory


def few(task: AttendTask) -> bool:
    """Tell whether few heads share keys."""
    return shared_heads(task) <= MOST


def narrow(task: AttendTask) -> bool:
    """Tell whether many heads share keys, whose values are narrow and no two halves of tiles."""
    dim = task.sources[0].v.dim
    return not few(task) and dim < 256 and dim % 128 > 0


def rounded_heads(task: AttendTask) -> int:
    """Return the heads of a tile, those that stand for nothing too."""
    return -(-shared_heads(task) // 8) * 8 if few(task) else ROWS


def _exchanged(task: AttendTask) -> int:
    """Return how many registers of a thread pass from group to group at a time."""
    return 8 if few(task) else 16


def _bytes(task: AttendTask, ring: Ring) -> int:
    """Return the shared memory a block takes, at most."""
    heads, slots = rounded_heads(task), ring.slots
    tiles = slots * ring.part * TILE * 2
    weights = 2 * heads * KEYS * 2 if few(task) else 0
    operands = task.q.dim * heads * 2 + weights
    numbers = 2 * _exchanged(task) * GROUP + slots * KEYS + 2 * (2 * 4 * heads) + 2 * heads + 8
    marks = marks_bytes(task.sources[0].v.dim) if Columns.of(task).apart else 0
    return tiles + operands + numbers * 4 + marks + (3 + 2 * slots) * 8 + _ALIGNED


def ring_of(task: AttendTask, arch: Arch) -> Ring:
    """Return the longest ring; one that could not hold more than a chunk has no slots."""
    columns = Columns.of(task)
    part = next(n for n in (3, 2, 1) if columns.all % n == 0 and columns.first % n == 0)
    parts = columns.all // part
    rings = (Ring(part, parts, n) for n in range(_LONGEST, parts, -1))
    fitting = (ring for ring in rings if _bytes(task, ring) <= arch.shared_bytes)
    return next(fitting, Ring(part, parts, 0))


class FewKernel:
    """Emits the function of one task into the current builder frame."""

    def __init__(
        self, task: AttendTask, columns: Columns, cut: Cut, ring: Ring, dtype: str,
        arguments: Arguments,
    ) -> None:  # fmt: skip
        self.task, self.cut, self.dtype, self.arguments = task, cut, dtype, arguments
        self.columns, self.ring = columns, ring
        self.heads = rounded_heads(task)
        self.split = Heads.of(task, self.heads)
        self.exchanged, self.few = _exchanged(task), few(task)
        self.dim = task.sources[0].v.dim
        self.rate = task.scale * LOG2E

    def emit(self) -> None:
        """Emit the launch and the body."""
        tokens = cast(load(self.arguments.cu_q, self.arguments.batch), "int32")
        # Registers pass from group to group, so how many a block starts with must be known.
        with device(), T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1}):
            self._emit(tokens)

    def _emit(self, tokens: Value) -> None:
        self.block = T.cta_id([self.cut.blocks])
        group = T.warpgroup_id([3])
        self.warp, self.lane = T.warp_id_in_wg([4]), T.lane_id([32])
        thread = T.thread_id([3 * GROUP])
        self.thread = T.bind(thread % GROUP)
        self.count = T.bind(tokens * self.split.count)
        self._allocate()
        pipeline.init(self.barriers, thread)
        computing = HeadsAsColumns if self.few else HeadsAsRows
        with T.If(group < 1):
            with T.Then():
                pipeline.take_registers(self.cut.compute)
                computing(self, 0).run()
            with T.Else(), T.If(group < 2):
                with T.Then():
                    pipeline.take_registers(self.cut.compute)
                    computing(self, 1).run()
                with T.Else():
                    pipeline.give_registers(self.cut.copy)
                    self._gather()

    def _allocate(self) -> None:
        pool = T.SMEMPool()
        heads, dtype, slots = self.heads, self.dtype, self.ring.slots
        self.keys = pool.alloc((slots * self.ring.part * TILE,), dtype, align=1024)
        self.queries = pool.alloc((self.columns.keys * heads * 64,), dtype, align=1024)
        if self.few:
            self.weights = pool.alloc((2 * heads * 64,), dtype, align=1024)
        self.exchange = pool.alloc((2 * self.exchanged * GROUP,), "float32", align=16)
        self.bias = pool.alloc((slots * KEYS,), "float32", align=16)
        self.tops, self.sums = (
            pool.alloc((2 * 4 * heads,), "float32", align=16) for _ in range(2)
        )  # by group, then by warp
        self.peaks = pool.alloc((2 * heads,), "float32", align=16)
        self.last = pool.alloc((4,), "int32", align=16)
        self.steps = pool.alloc((1,), "int32", align=16)
        if self.columns.apart:
            self.odd, self.seen = (pool.alloc((n,), "int32", align=4) for n in (8, 2 * self.dim))
        converted = any(p.buffer.dtype == "float32" for p in self.task.q.parts)
        self.query_ready = Barrier.allocate(pool, (GROUP if converted else 0) + GROUP + 1)
        self.query_free = Barrier.allocate(pool, 2 * GROUP)
        self.merged = Barrier.allocate(pool, 2 * GROUP)
        self.ready, self.free = (
            Barrier.allocate_row(pool, slots, n) for n in (GROUP + GROUP // 8, GROUP)
        )
        pool.commit()
        self.barriers = [
            self.query_ready, self.query_free, self.merged,
            *self.ready.all, *self.free.all,
        ]  # fmt: skip

    def tile_of(self, slot: Value) -> Value:
        """Return the element of the ring at which a slot begins."""
        return slot * (self.ring.part * TILE)

    def each_tile(self, body: Any) -> None:
        """Emit a loop over the tiles of this block: body(tile, number of tiles before it)."""
        pipeline.each_turn(self.block, self.cut.blocks, self.count, body)

    def bounds(self, tile: Value) -> tuple[Value, Value, Value]:
        """Return the token of a tile, its first head, and the end of its heads (int32)."""
        each = self.split.count
        if each == 1:
            return tile, const(0, "int32"), const(self.task.q.heads, "int32")
        if not self.few:
            return T.bind(tile // each), *self.split.bounds(tile)
        head = T.bind(tile % each * self.split.shared)
        return T.bind(tile // each), head, T.bind(head + self.split.shared)

    # --- the gathering group --------------------------------------------------------------------

    def _gather(self) -> None:
        self.at = Place(self.ring)
        self.gather = Gather(self.task, self.arguments, self.thread)
        self.each_tile(self._gather_tile)
        ptx("cp.async.wait_all")

    def _gather_tile(self, tile: Value, turn: Value) -> None:
        gather = self.gather
        token, head, end = self.bounds(tile)
        place = gather.place(token, head)
        slots = place.slots
        last = slots.last(self.thread, self.lane, self.warp, self.last, SCAN)
        chunks = T.bind(maximum((last + (KEYS - 1)) // KEYS, const(1, "int32")))
        rows = Rows(slots, gather.first, KEYS // STEP)
        rows.fetch(const(0, "int32"))
        rows.resolve(const(0, "int32"))
        chunk = cell("int32", const(0, "int32"))
        with T.While(get(chunk) < chunks):
            rows.take()
            more = T.bind(get(chunk) + 1 < chunks)
            start = T.bind((get(chunk) + 1) * KEYS)
            with T.If(more), T.Then():
                rows.fetch(start)
            self._copy_chunk(rows, place.key)
            with T.If(more), T.Then():
                rows.resolve(start)
            # The first keys are on their way before queries wait for the token before.
            with T.If(get(chunk) < 1), T.Then():
                self._copy_queries(token, head, end, turn, chunks)
            self.at.advance()
            put(chunk, get(chunk) + 1)

    def _copy_chunk(self, rows: Rows, head: Value) -> None:
        gather, part = self.gather, self.ring.part
        for n in range(self.ring.parts):
            turn = self.at.after(n)
            self.free[turn.slot].wait(turn.round - 1)
            tiles = range(n * part, (n + 1) * part)

            def copy(which: int, tiles: range = tiles, slot: Value = turn.slot) -> None:
                source, place = self.task.sources[which], self.tile_of(slot)
                for r in range(KEYS // STEP):
                    gather.copy_keys(source, rows, r, r, head, tiles, self.keys, place)

            rows.each_source(0, copy)
            # Copies end in the order in which a thread starts them. So slots become ready in order,
            # and a computing group that skips chunks of the other never waits two rounds ahead.
            self.ready[turn.slot].arrive_after_copies()
            with T.If(gather.piece < 1), T.Then():
                if n == 0:
                    self._tell(rows, turn.slot)
                self.ready[turn.slot].arrive()

    def _tell(self, rows: Rows, slot: Value) -> None:
        """Write which keys of a chunk are there."""
        for r in range(KEYS // STEP):
            seen = select(rows.exists(r), const(0.0, "float32"), const(NEVER, "float32"))
            store(self.bias, seen, slot * KEYS + (r * STEP) + self.gather.first)

    def _copy_queries(
        self, token: Value, head: Value, end: Value, turn: Value, chunks: Value
    ) -> None:
        self.query_free.wait(turn - 1)
        # Computing groups have read the number for the token before when they free its queries.
        with T.If(self.thread < 1), T.Then():
            store(self.steps, chunks, 0)
            self.query_ready.arrive()
        self.gather.copy_queries(token, head, end, self.queries, self.heads)
        self.query_ready.arrive_after_copies()
        if self.query_ready.arrivals > GROUP + 1:
            self.query_ready.arrive()
