"""Emit attention over a list of keys per token on Hopper, one key head, values a prefix of keys.

A block walks over (token, 64 heads) tiles, and a token's list in pairs of chunks of 64 keys:

    gather   warp group 2 copies rows of keys into two buffers, half of the columns at a time
    even     warp group 0: scores of the even chunk, softmax, values' left columns of both chunks
    odd      warp group 1: scores of the odd chunk, softmax, values' right columns of both chunks

The two exchange weights through shared memory. The maximum passes from even to odd and back, so
that both shrink their sums alike. The schedule is that of FlashMLA's sparse prefill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsegen.codegen.cpu.lists import TokenLists
from sparsegen.codegen.cpu.rows import Arguments, Sequence, find_sequence
from sparsegen.codegen.cpu.stream import Bounds, cell, get, put
from sparsegen.codegen.cpu.vec import LOG2E
from sparsegen.codegen.gpu import pipeline, wgmma
from sparsegen.codegen.gpu.launch import across
from sparsegen.codegen.gpu.listed_compute import NEVER, ROWS, SCAN, Even, Odd
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.pipeline import GROUP, Barrier, meet
from sparsegen.codegen.gpu.view import ThreadView
from sparsegen.codegen.gpu.wgmma import TILE
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    const,
    load,
    maximum,
    minimum,
    scratch,
    select,
    store,
)
from sparsegen.lowering.tasks import AttendTask, Operand

_KEEP = 0x14F0000000000000  # L2: evict last
_COPY = "cp.async.cg.shared.global.L2::cache_hint.L2::256B"


@dataclass(frozen=True)
class Cut:
    """How a kernel is cut.

    blocks          persistent blocks
    compute, copy   registers of a thread of the computing groups, and of the gathering one
    """

    blocks: int
    compute: int
    copy: int


def shared_bytes(task: AttendTask) -> int:
    """Return the shared memory a block takes."""
    tiles = task.q.dim // 64
    spare = 1 if tiles > task.sources[0].v.dim // 64 else 2
    return (3 * tiles + spare) * TILE * 2 + 2048


class ListedKernel:
    """Emits the function of one task into the current builder frame."""

    def __init__(self, task: AttendTask, cut: Cut, dtype: str, arguments: Arguments) -> None:
        self.task, self.cut, self.dtype, self.arguments = task, cut, dtype, arguments
        (self.source,) = task.sources
        (self.clause,) = self.source.clauses
        self.tiles = task.q.dim // 64
        self.dim = self.source.v.dim
        self.half = self.dim // 2  # columns of the values of a computing group
        self.left = range(self.half // 64)
        self.right = range(self.half // 64, self.tiles)
        self.groups = -(-task.q.heads // ROWS)
        self.rate = task.scale * LOG2E

    def emit(self) -> None:
        """Emit the launch and the body."""
        lists = dict(self.task.lists)
        listed = self.clause.keys
        assert listed is not None
        width = cast(self.arguments[lists[listed.member].buffer].shape[-1], "int32")
        tokens = cast(load(self.arguments.cu_q, self.arguments.batch), "int32")
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        self.block = T.cta_id([self.cut.blocks])
        group = T.warpgroup_id([3])
        self.warp, self.lane = T.warp_id_in_wg([4]), T.lane_id([32])
        thread = T.thread_id([3 * GROUP])
        self.thread = T.bind(thread % GROUP)
        self.pairs = T.bind((width + (2 * ROWS - 1)) // (2 * ROWS))
        self.count = T.bind(tokens * self.groups)
        self._allocate()
        pipeline.init(self.barriers, thread)
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

    def _allocate(self) -> None:
        pool = T.SMEMPool()
        tiles, dtype = self.tiles, self.dtype
        self.queries = pool.alloc((tiles * TILE,), dtype, align=1024)
        self.keys = [pool.alloc((tiles * TILE,), dtype, align=1024) for _ in range(2)]
        odd = pool.alloc((TILE,), dtype, align=1024)
        # Columns that are no values are free once the scores are there.
        if tiles > self.dim // 64:
            even, self.first = self.keys[0], self.dim // 64 * TILE
        else:
            even, self.first = pool.alloc((TILE,), dtype, align=1024), 0
        self.weights = [even, odd]
        self.top = pool.alloc((ROWS,), "float32", align=16)
        self.sums = pool.alloc((2 * ROWS,), "float32", align=16)
        self.bias = pool.alloc((2 * ROWS,), "float32", align=16)
        self.last = pool.alloc((4,), "int32", align=16)
        self.steps = pool.alloc((1,), "int32", align=16)
        self.query_ready = Barrier.allocate(pool, GROUP + 1)
        self.query_free = Barrier.allocate(pool, GROUP)
        # By buffer, then by half of the columns.
        self.ready, self.free = (
            [[Barrier.allocate(pool, GROUP) for _ in range(2)] for _ in range(2)] for _ in range(2)
        )
        self.known = Barrier.allocate(pool, 16)
        pool.commit()
        self.barriers = [
            self.query_ready, self.query_free, self.known,
            *(b for kind in (self.ready, self.free) for pair in kind for b in pair),
        ]  # fmt: skip

    def each_tile(self, body: Any) -> None:
        """Emit a loop over the tiles of this block: body(tile, number of tiles before it)."""
        tile, turn = cell("int32", self.block), cell("int32", const(0, "int32"))
        with T.While(get(tile) < self.count):
            body(T.bind(get(tile)), T.bind(get(turn)))
            put(tile, get(tile) + self.cut.blocks)
            put(turn, get(turn) + 1)

    # --- the gathering group --------------------------------------------------------------------

    def _gather(self) -> None:
        self.done = cell("int32", const(0, "int32"))
        self.each_tile(self._gather_tile)
        ptx("cp.async.wait_all")

    def _column(self, operand: Operand, tile: int) -> tuple[Memory, int, int, int]:
        """Return the flat buffer, heads, row length and first column of a tile of an operand."""
        column = tile * 64
        for part in operand.parts:
            if column < part.size:
                heads, dim = part.buffer.shape[-2:]
                return self.arguments[part.buffer].flat, heads, dim, part.start + column
            column -= part.size
        raise AssertionError(tile)

    def _gather_tile(self, tile: Value, turn: Value) -> None:
        token = T.bind(tile // self.groups)
        number = find_sequence(self.arguments, lambda b: load(self.arguments.cu_q, b), token)
        sequence = Sequence.at(self.arguments, number)
        i = T.bind(sequence.q_off + (token - cast(sequence.q_start, "int32")))
        one = const(1, "int32")
        view = ThreadView(self.task, self.arguments, sequence, i, one)
        listed = self.clause.keys
        assert listed is not None
        length = T.bind(sequence.count(self.source.k.rows))
        bounds = view._hull(self.clause, length, i, i)
        found = view.list_of(listed.member, i, const(0, "int32"))
        # Eight neighbouring threads copy a row, 16 bytes each.
        lane, first = T.bind(self.thread % 8), T.bind(self.thread // 8)
        pairs = self._pairs_of(found, bounds)
        self.query_free.wait(turn - 1)
        # Computing groups have read the number for the tile before when they free its queries.
        with T.If(self.thread < 1), T.Then():
            store(self.steps, pairs, 0)
            self.query_ready.arrive()
        self._copy_queries(token, T.bind(tile % self.groups * ROWS), first, lane)
        self.query_ready.arrive_after_copies()
        slots = scratch(8, "int32")

        def fetch(pair: Value) -> None:
            for n in range(8):
                slot = pair * (2 * ROWS) + (n * 16 + first)
                x = found.item(const(0, "int32"), minimum(slot, found.width - 1))
                store(slots, select(slot < found.width, x, const(-1, "int32")), n)

        fetch(const(0, "int32"))
        pair = cell("int32", const(0, "int32"))
        before = T.bind(get(self.done))
        with T.While(get(pair) < pairs):
            rows, sizes = scratch(8, "int64"), scratch(8, "uint32")
            for n in range(8):
                x = T.bind(load(slots, n))
                there = T.And(x >= bounds.lo, x < bounds.hi)
                key = T.bind(select(there, x, const(0, "int32")))
                store(rows, sequence.row(self.source.k.rows, key), n)
                store(sizes, select(there, const(16, "uint32"), const(0, "uint32")), n)
            with T.If(get(pair) + 1 < pairs), T.Then():
                fetch(get(pair) + 1)
            phase = T.bind(before + get(pair) - 1)
            # In the order in which the computing groups let go of them.
            for buffer, half in ((0, 0), (1, 1), (0, 1), (1, 0)):
                self.free[buffer][half].wait(phase)
                for n in range(4):
                    self._copy_row(buffer, half, n, first, lane, rows, sizes)
                self.ready[buffer][half].arrive_after_copies()
            with T.If(lane < 1), T.Then():
                for n in range(8):
                    there = load(sizes, n) > const(0, "uint32")
                    seen = select(there, const(0.0, "float32"), const(NEVER, "float32"))
                    store(self.bias, seen, n * 16 + first)
                self.known.arrive()
            put(pair, get(pair) + 1)
        put(self.done, before + pairs)

    def _pairs_of(self, found: TokenLists, bounds: Bounds) -> Value:
        """Return the pairs of chunks up to the last slot that holds a key; 1 if none does."""
        last = cell("int32", const(1, "int32"))
        start = cell("int32", const(0, "int32"))
        with T.While(get(start) < self.pairs):
            # Loads come before their first use, so that they wait together.
            items = scratch(16, "int32")
            for n in range(16):
                slot = (get(start) + n) * (2 * ROWS) + self.thread
                x = found.item(const(0, "int32"), minimum(slot, found.width - 1))
                store(items, x, n)
            for n in range(16):
                x, pair = load(items, n), get(start) + n
                there = T.And(pair < self.pairs, T.And(x >= bounds.lo, x < bounds.hi))
                with T.If(there), T.Then():
                    put(last, pair + 1)
            put(start, get(start) + 16)
        most = across(get(last), maximum)
        with T.If(self.lane < 1), T.Then():
            store(self.last, most, self.warp)
        meet(SCAN, GROUP)
        result = cell("int32", load(self.last, 0))
        for n in range(1, 4):
            put(result, maximum(get(result), load(self.last, n)))
        return T.bind(get(result))

    def _copy_row(
        self, buffer: int, half: int, n: int, first: Value, lane: Value, rows: Memory,
        sizes: Memory,
    ) -> None:  # fmt: skip
        row = load(rows, 4 * buffer + n)
        to = wgmma.swizzled(first, lane) + n * 16 * 64
        for tile in (self.left, self.right)[half]:
            flat, heads, dim, start = self._column(self.source.k, tile)
            source = flat.ptr_to([row * (heads * dim) + start + cast(lane * 8, "int64")])
            target = self.keys[buffer].ptr_to([to + tile * TILE])
            ptx(_COPY, target, source, 16, load(sizes, 4 * buffer + n), const(_KEEP, "uint64"))

    def _copy_queries(self, token: Value, head: Value, first: Value, lane: Value) -> None:
        for n in range(4):
            r = T.bind(head + (n * 16 + first))
            there = T.bind(r < self.task.q.heads)
            near = minimum(r, const(self.task.q.heads - 1, "int32"))
            size = T.bind(select(there, const(16, "uint32"), const(0, "uint32")))
            to = wgmma.swizzled(first, lane) + n * 16 * 64
            for tile in range(self.tiles):
                flat, heads, dim, start = self._column(self.task.q, tile)
                at = (cast(token, "int64") * heads + cast(near, "int64")) * dim + start
                source = flat.ptr_to([at + cast(lane * 8, "int64")])
                target = self.queries.ptr_to([to + tile * TILE])
                ptx("cp.async.cg.shared.global", target, source, 16, size)
