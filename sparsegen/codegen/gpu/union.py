"""Unite the lists of blocks that neighbouring tokens read: each block once, with who sees it.

A list starts with an entry that says how many blocks follow, and which warp groups have a token
that lists one of them twice. Entries of blocks are ascending: the number of the block, then for
each warp group the bits of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.rows import find_tile
from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.gpu.launch import FULL, launch, sync
from sparsegen.codegen.gpu.tiled_cut import entry_words, key_list, member_bit, member_words
from sparsegen.codegen.gpu.view import ThreadView
from sparsegen.codegen.tvm import (
    T,
    Value,
    cast,
    const,
    equal,
    load,
    minimum,
    store,
)

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.tiled import TiledKernel

_WARPS = 4
_THREADS = 32 * _WARPS
_WINDOW = 3072  # words of shared memory for the blocks at hand
_OR = """
__device__ __forceinline__ int sparsegen_or(int* p, int x) { return atomicOr(p, x); }
"""


class Union:
    """Emits the launch that unites lists, and clears the counters; a block for each item."""

    def __init__(self, kernel: TiledKernel) -> None:
        self.kernel, self.cut = kernel, kernel.cut
        found = key_list(kernel.task)
        assert found is not None
        self.clause, self.keys = found
        self.source = next(s for s, c in kernel.clauses if c is self.clause)
        self.words = member_words(self.cut)
        # Blocks at hand: each warp writes an equal share of them.
        self.window = _WINDOW // self.words // _THREADS * _THREADS

    def emit(self) -> None:
        """Emit the launch."""
        kernel, cut = self.kernel, self.cut
        self.place = launch(kernel.items, _THREADS, entered=True)
        pool = T.SMEMPool()
        self.marks = pool.alloc((self.window * self.words,), "int32", align=16)
        self.counts = pool.alloc((_WARPS,), "int32", align=16)
        self.twice = pool.alloc((1,), "int32", align=16)
        pool.commit()
        first_of_all = T.And(equal(self.place.block, const(0, "int64")), self.place.thread < 2)
        with T.If(first_of_all), T.Then():
            store(kernel.state, const(0, "int32"), self.place.thread)
        with T.If(self.place.thread < 1), T.Then():
            store(self.twice, const(0, "int32"), 0)
        tile = T.bind(self.place.block % kernel.tiles)
        group = T.bind(self.place.block // kernel.tiles)
        sequence, first = find_tile(kernel.arguments, cut.all_tokens, tile)
        with T.If(first < sequence.n_q), T.Then():
            head = T.bind(cast(group, "int32") * cut.heads)
            self._unite(sequence, first, head, list_at(kernel, tile, group))

    def _unite(self, sequence: Value, first: Value, head: Value, base: Value) -> None:
        cut, thread, granule = self.cut, self.place.thread, self.keys.granule
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
            sync()
            self._clear(here)
            sync()
            self._mark(view, first, head, present, length, lowest)
            sync()
            self._write(base, lowest, here, count)
            put(start, lowest + self.window)
        sync()
        with T.If(thread < 1), T.Then():
            store(self._flat, get(count), base)
            store(self._flat, load(self.twice, 0), base + 1)

    @property
    def _flat(self) -> Value:
        united = self.kernel.united
        assert united is not None
        return united.flat

    def _clear(self, count: Value) -> None:
        at = cell("int32", self.place.thread)
        with T.While(get(at) < count * self.words):
            store(self.marks, const(0, "int32"), get(at))
            put(at, get(at) + _THREADS)

    def _mark(
        self, view: ThreadView, first: Value, head: Value, present: Value, length: Value,
        lowest: Value,
    ) -> None:  # fmt: skip
        cut, granule, sequence = self.cut, self.keys.granule, view.sequence
        width = T.bind(view.list_of(self.keys.member, view.i_min, head).width)
        n = cell("int32", self.place.thread)
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
                at = T.bind((x - lowest) * self.words + word)
                bit = T.bind(T.shift_left(const(1, "int32"), place))
                before = T.bind(_or(self.marks.ptr_to([at]), bit))
                with T.If(T.Not(equal(T.bitwise_and(before, bit), const(0, "int32")))), T.Then():
                    again = T.shift_left(const(1, "int32"), group)
                    T.bind(_or(self.twice.ptr_to([0]), again))
            put(n, get(n) + _THREADS)

    def _write(self, base: Value, lowest: Value, here: Value, count: Value) -> None:
        """Write the marked blocks in order: each warp counts its share, then all know where."""
        lane, warp, each = self.place.lane, self.place.warp, entry_words(self.cut)
        share = T.bind((here + (_THREADS - 1)) // _THREADS * 32)
        begin = T.bind(warp * share)
        end = T.bind(minimum(begin + share, here))
        mine = cell("int32", const(0, "int32"))
        self._walk(begin, end, lambda n, marked, votes: put(mine, get(mine) + _ones(votes)))
        with T.If(equal(lane, const(0, "int32"))), T.Then():
            store(self.counts, get(mine), warp)
        sync()
        before = cell("int32", get(count))
        for other in range(_WARPS):
            found = T.bind(load(self.counts, other))
            with T.If(warp > other), T.Then():
                put(before, get(before) + found)
            put(count, get(count) + found)

        def write(n: Value, marked: Value, votes: Value) -> None:
            lower = T.shift_left(const(1, "uint32"), cast(lane, "uint32")) - 1
            place = pin(get(before) + _ones(T.bitwise_and(votes, lower)))
            with T.If(marked), T.Then():
                at = T.bind(base + cast((place + 1) * each, "int64"))
                store(self._flat, lowest + n, at)
                for word in range(self.words):
                    store(self._flat, load(self.marks, n * self.words + word), at + 1 + word)
            put(before, get(before) + _ones(votes))

        self._walk(begin, end, write)

    def _walk(self, begin: Value, end: Value, body: Callable[[Value, Value, Value], None]) -> None:
        """Visit blocks, one a lane: `body` gets the block, whether it is marked, and the votes."""
        step = cell("int32", begin)
        with T.While(get(step) < end):
            n = T.bind(get(step) + self.place.lane)
            some = cell("int32", const(0, "int32"))
            with T.If(n < end), T.Then():
                for word in range(self.words):
                    put(some, T.bitwise_or(get(some), load(self.marks, n * self.words + word)))
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


def _or(pointer: Value, bits: Value) -> Value:
    return T.cuda.func_call("sparsegen_or", pointer, bits, source_code=_OR, return_type="int32")
