"""Unite the lists of blocks that neighbouring tokens read: each block once, with who sees it.

A list starts with an entry that says how many blocks follow, and which warp groups have a token
that lists one of them twice. Entries of blocks are ascending: the number of the block, then for
each warp group the bits of its tokens.

A warp unites short lists alone, for most of what it does is the same for all of its threads; four
share long ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.rows import find_tile
from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.gpu.launch import FULL, atomic_or, bit_of, sync
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.tiled_cut import entry_words, key_list, member_bit, member_words
from sparsegen.codegen.gpu.view import ThreadView
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
    store,
)

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.tiled import TiledKernel

_WARPS = 4
_RESIDENT = 12  # blocks of a multiprocessor
_SHORT = 512  # indices of an item that one warp unites
_WINDOW = {1: 1024, _WARPS: 3072}  # words for the blocks at hand, by the warps of an item


class Union:
    """Emits the launch that unites lists, and clears the counters; a team of warps for an item."""

    def __init__(self, kernel: TiledKernel) -> None:
        self.kernel, self.cut = kernel, kernel.cut
        found = key_list(kernel.task)
        assert found is not None
        self.clause, self.keys = found
        self.source = next(s for s, c in kernel.clauses if c is self.clause)
        self.words = member_words(self.cut)
        width = dict(kernel.task.lists)[self.keys.member].buffer.shape[-1]
        self.team = 1 if 0 < width * self.cut.all_tokens <= _SHORT else _WARPS
        self.threads = 32 * self.team
        # Blocks at hand: each warp writes an equal share of them.
        self.window = _WINDOW[self.team] // self.words // self.threads * self.threads

    def emit(self) -> None:
        """Emit the launch."""
        # As many blocks as shared memory has room for; the assembler would spill for more.
        with T.attr({"tirx.launch_bounds_min_blocks_per_sm": _RESIDENT}):
            self._emit()

    def _emit(self) -> None:
        kernel, cut, teams = self.kernel, self.cut, _WARPS // self.team
        # A grid of tiles and head groups, which takes no division; one of no blocks is an error.
        across = maximum((kernel.tiles + (teams - 1)) // teams, const(1, "int64"))
        column, row = T.cta_id([cast(across, "int32"), kernel.heads])
        thread = T.thread_id([32 * _WARPS])
        self.thread, self.lane = T.bind(thread % self.threads), T.bind(thread % 32)
        self.warp = T.bind(thread // 32 % self.team)
        self.number = T.bind(thread // self.threads)
        pool = T.SMEMPool()
        self.marks = pool.alloc((teams * self.window * self.words,), "int32", align=16)
        self.counts = pool.alloc((_WARPS,), "int32", align=16)
        self.twice = pool.alloc((teams,), "int32", align=16)
        pool.commit()
        self.first_mark = T.bind(self.number * (self.window * self.words))
        with T.If(T.And(column + row < 1, thread < 2)), T.Then():
            store(kernel.state, const(0, "int32"), thread)
        tile = T.bind(cast(column * teams + self.number, "int64"))
        with T.If(tile < kernel.tiles), T.Then():
            sequence, first = find_tile(kernel.arguments, cut.all_tokens, tile)
            with T.If(first < sequence.n_q), T.Then():
                head = T.bind(row * cut.heads)
                self._unite(sequence, first, head, list_at(kernel, tile, row))

    def _sync(self) -> None:
        """Wait for the team."""
        if self.team > 1:
            sync()
        else:
            ptx("bar.warp.sync", const(FULL, "uint32"))

    def _unite(self, sequence: Value, first: Value, head: Value, base: Value) -> None:
        cut, granule = self.cut, self.keys.granule
        with T.If(self.thread < 1), T.Then():
            store(self.twice, const(0, "int32"), self.number)
        tokens = const(cut.all_tokens, "int32")
        present = T.bind(minimum(tokens, sequence.n_q - first))
        i_min = T.bind(sequence.q_off + first)
        view = ThreadView(self.kernel.task, self.kernel.arguments, sequence, i_min, present)
        length = T.bind(sequence.count(self.source.k.rows))
        seen = view._hull(self.clause, length, i_min, T.bind(i_min + present - 1))
        blocks = T.bind((seen.hi + (granule - 1)) // granule)
        start = cell("int32", seen.lo // granule)
        count = cell("int32", const(0, "int32"))
        with T.While(get(start) < blocks):
            lowest = T.bind(get(start))
            here = T.bind(minimum(blocks - lowest, const(self.window, "int32")))
            self._sync()
            self._clear(here)
            self._sync()
            self._mark(view, first, head, present, length, lowest)
            self._sync()
            self._write(base, lowest, here, count)
            put(start, lowest + self.window)
        self._sync()
        with T.If(self.thread < 1), T.Then():
            store(self._flat, get(count), base)
            store(self._flat, load(self.twice, self.number), base + 1)

    @property
    def _flat(self) -> Value:
        united = self.kernel.united
        assert united is not None
        return united.flat

    def _clear(self, count: Value) -> None:
        at = cell("int32", self.thread)
        with T.While(get(at) < count * self.words):
            store(self.marks, const(0, "int32"), self.first_mark + get(at))
            put(at, get(at) + self.threads)

    def _mark(
        self, view: ThreadView, first: Value, head: Value, present: Value, length: Value,
        lowest: Value,
    ) -> None:  # fmt: skip
        cut, granule, sequence = self.cut, self.keys.granule, view.sequence
        width = T.bind(view.list_of(self.keys.member, view.i_min, head).width)
        n = cell("int32", self.thread)
        with T.While(get(n) < present * width):
            token = T.bind(get(n) // width)
            i = T.bind(sequence.q_off + (first + token))
            found = view.list_of(self.keys.member, i, head)
            x = T.bind(found.item(const(0, "int32"), get(n) - token * width))
            bounds = view._hull(self.clause, length, i, i)
            inside = T.And(x >= bounds.lo // granule, x <= (bounds.hi - 1) // granule)
            here = T.And(x >= lowest, x < lowest + self.window)
            with T.If(T.And(T.And(inside, here), bounds.lo < bounds.hi)), T.Then():
                group = T.bind(token // cut.tokens)
                word, place = member_bit(cut, group, T.bind(token - group * cut.tokens))
                at = T.bind(self.first_mark + ((x - lowest) * self.words + word))
                bit = bit_of(place)
                before = T.bind(atomic_or(self.marks.ptr_to([at]), bit))
                with T.If(T.Not(equal(T.bitwise_and(before, bit), const(0, "uint32")))), T.Then():
                    T.bind(atomic_or(self.twice.ptr_to([self.number]), bit_of(group)))
            put(n, get(n) + self.threads)

    def _write(self, base: Value, lowest: Value, here: Value, count: Value) -> None:
        """Write the marked blocks in order: each warp counts its share, then all know where."""
        each = entry_words(self.cut)
        share = T.bind((here + (self.threads - 1)) // self.threads * 32)
        begin = T.bind(self.warp * share)
        end = T.bind(minimum(begin + share, here))
        before = cell("int32", get(count))
        if self.team > 1:
            self._count(begin, end, before, count)

        def write(n: Value, marked: Value, votes: Value) -> None:
            lower = bit_of(self.lane) - 1
            place = pin(get(before) + _ones(T.bitwise_and(votes, lower)))
            with T.If(marked), T.Then():
                at = T.bind(base + cast((place + 1) * each, "int64"))
                store(self._flat, lowest + n, at)
                for word in range(self.words):
                    store(self._flat, self._marked(n, word), at + 1 + word)
            put(before, get(before) + _ones(votes))

        self._walk(begin, end, write)
        if self.team == 1:
            put(count, get(before))

    def _count(self, begin: Value, end: Value, before: Memory, count: Memory) -> None:
        """Add the blocks of the warps before to `before`, those of all warps to `count`."""
        mine = cell("int32", const(0, "int32"))
        self._walk(begin, end, lambda n, marked, votes: put(mine, get(mine) + _ones(votes)))
        with T.If(self.lane < 1), T.Then():
            store(self.counts, get(mine), self.warp)
        self._sync()
        for other in range(self.team):
            found = T.bind(load(self.counts, other))
            with T.If(self.warp > other), T.Then():
                put(before, get(before) + found)
            put(count, get(count) + found)

    def _marked(self, n: Value, word: int) -> Value:
        return load(self.marks, self.first_mark + (n * self.words + word))

    def _walk(self, begin: Value, end: Value, body: Callable[[Value, Value, Value], None]) -> None:
        """Visit blocks, one a lane: `body` gets the block, whether it is marked, and the votes."""
        step = cell("int32", begin)
        with T.While(get(step) < end):
            n = T.bind(get(step) + self.lane)
            some = cell("int32", const(0, "int32"))
            with T.If(n < end), T.Then():
                for word in range(self.words):
                    put(some, T.bitwise_or(get(some), self._marked(n, word)))
            marked = T.bind(T.Not(equal(get(some), const(0, "int32"))))
            votes = T.cuda.ballot_sync(const(FULL, "uint32"), cast(marked, "int32"))
            body(n, marked, T.bind(votes))
            put(step, get(step) + 32)


def _ones(bits: Value) -> Value:
    return cast(T.popcount(bits), "int32")


def list_at(kernel: TiledKernel, tile: Value, group: Value) -> Value:
    """Return where the united list of an item starts (int64)."""
    united = kernel.united
    assert united is not None
    row = tile * kernel.heads + cast(group, "int64")
    return T.bind(row * united.shape[-1])
