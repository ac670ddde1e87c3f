"""Emit attention on Hopper over lists of keys, for many heads that share them.

A block walks over (token, 64 heads) tiles, and the keys of a token, those of ranges and of lists
one after the other, in pairs of chunks of 64 keys:

    gather   warp group 2 copies rows of keys, and of values that are no part of them, into two
             buffers, half of the columns at a time
    even     warp group 0: scores of the even chunk, softmax, values' left columns of both chunks
    odd      warp group 1: scores of the odd chunk, softmax, values' right columns of both chunks

The two exchange weights through shared memory. The maximum passes from even to odd and back, so
that both shrink their sums alike. The schedule is that of FlashMLA's sparse prefill.
"""

from __future__ import annotations

from typing import Any

from sparsegen.codegen.cpu.rows import Arguments
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.vec import LOG2E
from sparsegen.codegen.gpu import cluster, pipeline
from sparsegen.codegen.gpu.boxes import BoxedRows, Boxes
from sparsegen.codegen.gpu.gather import Gather
from sparsegen.codegen.gpu.launch import FULL, device
from sparsegen.codegen.gpu.listed_compute import COPIED, NEVER, ROWS, SCAN, Even, Odd
from sparsegen.codegen.gpu.listed_cut import Columns, Cut, Heads
from sparsegen.codegen.gpu.listed_marks import marks_bytes
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.pipeline import GROUP, Barrier
from sparsegen.codegen.gpu.slots import STEP, Rows
from sparsegen.codegen.gpu.wgmma import TILE
from sparsegen.codegen.tvm import T, Value, cast, const, load, maximum, select, store
from sparsegen.lowering.tasks import AttendTask


def shared_bytes(task: AttendTask) -> int:
    """Return the shared memory a block takes."""
    columns = Columns.of(task)
    weights = 1 if _spare(columns) else 2
    marks = marks_bytes(task.sources[0].v.dim) if columns.apart else 0
    return (columns.keys + 2 * columns.all + weights) * TILE * 2 + marks + 2048


def _spare(columns: Columns) -> bool:
    """Tell whether there are columns of the keys, no values, that are free after the scores."""
    return not columns.apart and columns.keys > columns.values


class ListedKernel:
    """Emits the function of one task into the current builder frame."""

    def __init__(
        self, task: AttendTask, columns: Columns, cut: Cut, dtype: str, arguments: Arguments
    ) -> None:
        self.task, self.cut, self.dtype, self.arguments = task, cut, dtype, arguments
        self.columns = columns
        self.dim = task.sources[0].v.dim
        self.halves = columns.halves()
        self.heads = Heads.of(task, ROWS)
        self.rate = task.scale * LOG2E

    def emit(self) -> None:
        """Emit the launch and the body."""
        tokens = cast(load(self.arguments.cu_q, self.arguments.batch), "int32")
        self.boxes = Boxes(self.task, self.arguments) if self.cut.boxes else None
        # Registers pass from group to group, so how many a block starts with must be known.
        with device(), T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1}):
            self._emit(tokens)

    def _emit(self, tokens: Value) -> None:
        self.block = T.cta_id([self.cut.blocks])
        self.rank = cluster.enter(self.block) if self.cut.cluster else None
        group = T.warpgroup_id([3])
        self.warp, self.lane = T.warp_id_in_wg([4]), T.lane_id([32])
        thread = T.thread_id([3 * GROUP])
        self.thread = T.bind(thread % GROUP)
        self.count = T.bind(tokens * self.heads.count)
        self._allocate()
        pipeline.init(self.barriers, thread)
        if self.rank is not None:
            cluster.meet()
        with T.If(group < 1):
            with T.Then():
                pipeline.take_registers(self.cut.compute)
                Even(self).run()
            with T.Else(), T.If(group < 2):
                with T.Then():
                    pipeline.take_registers(self.cut.compute)
                    Odd(self).run()
                with T.Else():
                    pipeline.give_registers(self.cut.copy)
                    self._gather()
        if self.rank is not None:
            cluster.meet()

    def _allocate(self) -> None:
        pool = T.SMEMPool()
        columns, dtype = self.columns, self.dtype
        self.queries = pool.alloc((columns.keys * TILE,), dtype, align=1024)
        self.keys = [pool.alloc((columns.all * TILE,), dtype, align=1024) for _ in range(2)]
        odd = pool.alloc((TILE,), dtype, align=1024)
        if _spare(columns):
            even, self.first = self.keys[0], columns.values * TILE
        else:
            even, self.first = pool.alloc((TILE,), dtype, align=1024), 0
        self.weights = [even, odd]
        self.tops = [pool.alloc((ROWS,), "float32", align=16) for _ in range(2)]
        self.sums = pool.alloc((2 * ROWS,), "float32", align=16)
        self.bias = pool.alloc((2 * ROWS,), "float32", align=16)
        self.last = pool.alloc((4,), "int32", align=16)
        self.steps = pool.alloc((1,), "int32", align=16)
        if columns.apart:
            self.odd, self.seen = (pool.alloc((n,), "int32", align=4) for n in (8, 2 * self.dim))
        converted = any(p.buffer.dtype == "float32" for p in self.task.q.parts)
        self.query_ready = Barrier.allocate(pool, (GROUP if converted else 0) + GROUP + 1)
        self.query_free = Barrier.allocate(pool, 2 * GROUP)
        # By buffer, then by half of the columns, then by piece of it. One thread starts boxes.
        writers = GROUP if self.boxes is None else 1
        self.ready = [
            [[Barrier.allocate(pool, writers) for _ in self.pieces(half)] for half in range(2)]
            for _ in range(2)
        ]
        # Boxes are written into the other block of a cluster too, of which a lane a warp arrives.
        users = GROUP if self.rank is None else GROUP + GROUP // 32
        self.free = [[Barrier.allocate(pool, users) for _ in range(2)] for _ in range(2)]
        self.known = Barrier.allocate(pool, 16)
        # Maxima, by computing group; a lane of four tells those of two rows.
        self.told = [Barrier.allocate(pool, GROUP // 4) for _ in range(2)]
        pool.commit()
        self.barriers = [
            self.query_ready, self.query_free, self.known, *self.told,
            *(b for pair in self.free for b in pair),
            *(b for pair in self.ready for half in pair for b in half),
        ]  # fmt: skip

    def pieces(self, half: int) -> list[tuple[int, ...]]:
        """Return tiles of a half of the keys that scores wait for together: those of a box."""
        tiles = self.halves[half][0]
        return [tuple(tiles)] if self.boxes is None else [(tile,) for tile in tiles]

    def each_tile(self, body: Any) -> None:
        """Emit a loop over the tiles of this block: body(tile, number of tiles before it)."""
        pipeline.each_turn(self.block, self.cut.blocks, self.count, body)

    def let_go(self, buffer: int, half: int) -> None:
        """Give a half of a buffer back, for all threads of the computing group that used it."""
        barrier = self.free[buffer][half]
        barrier.arrive()
        if self.rank is not None:
            ptx("bar.warp.sync", const(FULL, "uint32"))
            with T.If(self.lane < 1), T.Then():
                cluster.arrive(barrier, 1 - self.rank)

    # --- the gathering group --------------------------------------------------------------------

    def _gather(self) -> None:
        self.done = cell("int32", const(0, "int32"))
        self.gather = Gather(self.task, self.arguments, self.thread)
        self.each_tile(self._gather_tile)
        ptx("cp.async.wait_all")

    def _gather_tile(self, tile: Value, turn: Value) -> None:
        gather, keys = self.gather, 2 * ROWS
        token, heads = T.bind(tile // self.heads.count), self.heads
        first = heads.bounds(tile)[0] if heads.shared < heads.all else const(0, "int32")
        place = gather.place(token, first)
        slots = place.slots
        last = slots.last(self.thread, self.lane, self.warp, self.last, SCAN)
        pairs = T.bind(maximum((last + (keys - 1)) // keys, const(1, "int32")))
        each = slots, gather.first, keys // STEP
        rows = Rows(*each) if self.boxes is None else BoxedRows(self.boxes, *each)
        rows.fetch(const(0, "int32"))
        self.query_free.wait(turn - 1)
        # Computing groups have read the number for the tile before when they free its queries.
        with T.If(self.thread < 1), T.Then():
            store(self.steps, pairs, 0)
            self.query_ready.arrive()
        gather.copy_queries(place.token, *heads.bounds(tile), self.queries, ROWS)
        self.query_ready.arrive_after_copies()
        if self.query_ready.arrivals > GROUP + 1:
            self.query_ready.arrive()
        rows.resolve(const(0, "int32"))
        pair = cell("int32", const(0, "int32"))
        before = T.bind(get(self.done))
        with T.While(get(pair) < pairs):
            rows.take()
            more = T.bind(get(pair) + 1 < pairs)
            start = T.bind((get(pair) + 1) * keys)
            with T.If(more), T.Then():
                rows.fetch(start)
            phase = T.bind(before + get(pair) - 1)
            # In the order in which the computing groups let go of them.
            for order, (buffer, half) in enumerate(((0, 0), (1, 1), (0, 1), (1, 0))):
                self._wait_free(buffer, half, phase)
                self._copy_half(rows, place.key, buffer, half)
                if order == 1:
                    with T.If(more), T.Then():
                        rows.resolve(start)
            with T.If(gather.piece < 1), T.Then():
                for n in range(8):
                    seen = select(rows.exists(n), const(0.0, "float32"), const(NEVER, "float32"))
                    store(self.bias, seen, n * STEP + gather.first)
                self.known.arrive()
            put(pair, get(pair) + 1)
        put(self.done, before + pairs)

    def _wait_free(self, buffer: int, half: int, phase: Value) -> None:
        free = self.free[buffer][half]
        if self.rank is None:
            free.wait(phase)
        else:
            free.wait_cluster(phase)

    def _copy_half(self, rows: Rows, head: Value, buffer: int, half: int) -> None:
        gather, ready = self.gather, self.ready[buffer][half]
        runs = [(tiles, const(tiles.start * TILE, "int32")) for tiles in self.halves[half]]

        def by_rows() -> None:
            rows.each_source(buffer, copy)

        def copy(which: int) -> None:
            source, target = self.task.sources[which], self.keys[buffer]
            for n in range(ROWS // STEP):
                for tiles, place in runs:
                    gather.copy_keys(source, rows, 4 * buffer + n, n, head, tiles, target, place)

        if not isinstance(rows, BoxedRows):
            by_rows()
            ready[0].arrive_after_copies()
            return
        whole, row = rows.found[buffer]
        with T.If(get(whole) > 0):
            with T.Then(), T.If(self.thread < 1), T.Then():
                pieces = list(zip(self.pieces(half), ready, strict=True))
                rows.boxes.copy(gather, pieces, get(row), self.keys[buffer], self.rank)
            with T.Else():
                # Seldom, so that computing groups need no fence for boxes.
                by_rows()
                ptx("cp.async.wait_all")
                pipeline.fence_tensor()
                pipeline.meet(COPIED, GROUP)
                with T.If(self.thread < 1), T.Then():
                    for barrier in ready:
                        barrier.arrive()
