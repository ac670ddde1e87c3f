"""Let the threads of a block work together: loops over elements, reductions, numbering."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.gpu.launch import FULL, Place, across, bit_of, sync
from sparsegen.codegen.tvm import Memory, T, Value, cast, const, equal, load, store, tirx


@dataclass(frozen=True)
class Block:
    """The threads of a block, and shared memory of 16 bytes for each warp."""

    place: Place
    threads: int
    wide: Memory  # float64 [warps]
    counts: Memory  # int32 [2 * warps]

    @staticmethod
    def bytes(threads: int) -> int:
        """Return the shared memory it takes."""
        return threads // 32 * 16

    @staticmethod
    def allocate(place: Place, threads: int, pool: Any) -> Block:
        """Take the shared memory from a pool."""
        warps = threads // 32
        wide = pool.alloc((warps,), "float64", align=16)
        counts = pool.alloc((2 * warps,), "int32", align=16)
        return Block(place, threads, wide, counts)

    @property
    def thread(self) -> Value:
        """Return the number of the thread in the block."""
        return self.place.thread

    @contextmanager
    def each(self, count: Value, lanes: int = 1) -> Iterator[Value]:
        """Share `count` (int32 or int64) things among teams of `lanes` threads; yields a number.

        A team may have none left while others have: nothing inside may wait for the block.
        """
        at = cell("int64", cast(self.thread // lanes, "int64"))
        last = T.bind(cast(count, "int64"))
        with T.While(get(at) < last):
            yield T.bind(get(at))
            put(at, get(at) + self.threads // lanes)

    @contextmanager
    def rounds(self, count: Value) -> Iterator[Value]:
        """Take `count` (int64) things, one for each thread at a time; all threads run each round.

        Yields the number of a thread's thing, which may be `count` or more.
        """
        start = cell("int64", const(0, "int64"))
        last = T.bind(count)
        with T.While(get(start) < last):
            yield T.bind(get(start) + cast(self.thread, "int64"))
            put(start, get(start) + self.threads)

    def all(self, x: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """Combine a float64 or int32 value of each thread, always in one order; all get it."""
        integer = str(x.ty) == "int32"
        cells = self.counts if integer else self.wide
        x = across(pin(x), lambda a, b: pin(combine(a, b)))
        sync()  # the cells may still be read
        with T.If(equal(self.place.lane, const(0, "int32"))), T.Then():
            store(cells, x, self.place.warp)
        sync()
        total = pin(load(cells, 0))
        for warp in range(1, self.threads // 32):
            total = pin(combine(total, load(cells, warp)))
        return total

    def sum(self, x: Value) -> Value:
        """Return the sum over the threads."""
        return self.all(x, lambda a, b: a + b)

    def before(self, flags: tuple[Value, Value]) -> tuple[tuple[Value, Value], tuple[Value, Value]]:
        """Count two flags (bool) over the threads: those before this one, and all of them."""
        lane, warp, warps = self.place.lane, self.place.warp, self.threads // 32
        mine, lower = [], T.bind(bit_of(lane) - 1)
        sync()  # the cells may still be read
        for n, flag in enumerate(flags):
            votes = T.bind(T.cuda.ballot_sync(const(FULL, "uint32"), cast(flag, "int32")))
            mine.append(T.bind(_ones(T.bitwise_and(votes, lower))))
            with T.If(equal(lane, const(0, "int32"))), T.Then():
                store(self.counts, _ones(votes), n * warps + warp)
        sync()
        earlier, whole = [], []
        for n, own in enumerate(mine):
            before, total = cell("int32", own), cell("int32", const(0, "int32"))
            for other in range(warps):
                count = T.bind(load(self.counts, n * warps + other))
                with T.If(warp > other), T.Then():
                    put(before, get(before) + count)
                put(total, get(total) + count)
            earlier.append(T.bind(get(before)))
            whole.append(T.bind(get(total)))
        return (earlier[0], earlier[1]), (whole[0], whole[1])


def _ones(bits: Value) -> Value:
    return cast(T.popcount(bits), "int32")


def divided(n: Value, by: Value) -> tuple[Value, Value]:
    """Return the quotient and the remainder of numbers that are not negative."""
    whole = pin(tirx.truncdiv(n, by))
    return whole, pin(n - whole * by)
