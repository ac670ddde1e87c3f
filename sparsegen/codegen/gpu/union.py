"""Unite the lists of blocks that neighbouring tokens read: each block once, with who sees it.

A list starts with an entry that says how many blocks follow, and which warp groups have a token
that lists one of them twice. Entries of blocks are ascending: the number of the block, then for
each warp group the bits of its tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.rows import find_tile
from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.gpu.launch import FULL, launch, sync
from sparsegen.codegen.gpu.tiled_cut import entry_words, key_list, member_words
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

_THREADS = 128
_WINDOW = 8192  # words of shared memory for the blocks at hand
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
        self.each = self.cut.groups * self.words  # words of the members of a block
        self.window = _WINDOW // self.each // 32 * 32

    def emit(self) -> None:
        """Emit the launch."""
        kernel, cut = self.kernel, self.cut
        self.place = launch(kernel.items, _THREADS, entered=True)
        pool = T.SMEMPool()
        self.marks = pool.alloc((self.window * self.each,), "int32", align=16)
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
        cut, thread = self.cut, self.place.thread
        tokens = const(cut.all_tokens, "int32")
        present = T.bind(minimum(tokens, sequence.n_q - first))
        length = T.bind(sequence.count(self.source.k.rows))
        granule = self.keys.granule
        start, count = cell("int32", const(0, "int32")), cell("int32", const(0, "int32"))
        blocks = T.bind((length + (granule - 1)) // granule)
        with T.While(get(start) < blocks):
            lowest = T.bind(get(start))
            sync()
            self._clear(T.bind(minimum(blocks - lowest, const(self.window, "int32"))))
            sync()
            self._mark(sequence, first, head, present, length, lowest)
            sync()
            with T.If(thread < 32), T.Then():
                self._write(base, lowest, blocks, count)
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
        with T.While(get(at) < count * self.each):
            store(self.marks, const(0, "int32"), get(at))
            put(at, get(at) + _THREADS)

    def _mark(
        self, sequence: Value, first: Value, head: Value, present: Value, length: Value,
        lowest: Value,
    ) -> None:  # fmt: skip
        kernel, cut, granule = self.kernel, self.cut, self.keys.granule
        view, _ = kernel.group_view(sequence, first, 0)
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
                local = T.bind(token - group * cut.tokens)
                at = T.bind((x - lowest) * self.each + (group * self.words + local // 32))
                bit = T.bind(T.shift_left(const(1, "int32"), local % 32))
                before = T.bind(_or(self.marks.ptr_to([at]), bit))
                with T.If(T.Not(equal(T.bitwise_and(before, bit), const(0, "int32")))), T.Then():
                    again = T.shift_left(const(1, "int32"), group)
                    T.bind(_or(self.twice.ptr_to([0]), again))
            put(n, get(n) + _THREADS)

    def _write(self, base: Value, lowest: Value, blocks: Value, count: Value) -> None:
        """Write the marked blocks of a window in order; the first warp does."""
        lane, each = self.place.lane, entry_words(self.cut)
        step = cell("int32", const(0, "int32"))
        last = T.bind(minimum(blocks - lowest, const(self.window, "int32")))
        with T.While(get(step) < last):
            n = T.bind(get(step) + lane)
            some = cell("int32", const(0, "int32"))
            with T.If(n < last), T.Then():
                for word in range(self.each):
                    put(some, T.bitwise_or(get(some), load(self.marks, n * self.each + word)))
            marked = T.bind(T.Not(equal(get(some), const(0, "int32"))))
            votes = T.bind(T.cuda.ballot_sync(const(FULL, "uint32"), cast(marked, "int32")))
            lower = T.bitwise_and(votes, T.shift_left(const(1, "uint32"), cast(lane, "uint32")) - 1)
            before = pin(get(count) + cast(T.popcount(lower), "int32"))
            with T.If(marked), T.Then():
                at = T.bind(base + cast((before + 1) * each, "int64"))
                store(self._flat, lowest + n, at)
                for word in range(self.each):
                    store(self._flat, load(self.marks, n * self.each + word), at + 1 + word)
            put(count, get(count) + cast(T.popcount(votes), "int32"))
            put(step, get(step) + 32)


def list_at(kernel: TiledKernel, tile: Value, group: Value) -> Value:
    """Return where the united list of an item starts (int64)."""
    united = kernel.united
    assert united is not None
    row = tile * kernel.heads + cast(group, "int64")
    return T.bind(row * united.shape[-1])


def _or(pointer: Value, bits: Value) -> Value:
    return T.cuda.func_call("sparsegen_or", pointer, bits, source_code=_OR, return_type="int32")
