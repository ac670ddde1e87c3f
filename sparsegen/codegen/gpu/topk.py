"""Select exactly from a row of scores with the threads of a block.

Order: score descending, index ascending; forced keys before all others. NaN and -inf are never
chosen unless forced. Whatever the budget is, the choice is a prefix of that order: its length is
computed first, then the rank of its last key, a digit at a time, then one pass writes the keys in
their places. No number of ties can be too many, and nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.cpu.topk import FORCED, NEVER
from sparsegen.codegen.gpu.block import Block
from sparsegen.codegen.gpu.launch import FULL, across, sync
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    const,
    equal,
    load,
    minimum,
    reinterpret,
    select,
    store,
)

BITS = 8
BINS = 1 << BITS


@dataclass(frozen=True)
class Ranks:
    """The ranks of one list, in float32 memory: rank n has its bits at base + n.

    base, length  int64
    """

    flat: Memory
    base: Value
    length: Value

    def get(self, n: Value) -> Value:
        """Return a rank (int32)."""
        return T.bind(reinterpret(load(self.flat, self.base + n), "int32"))

    def put(self, n: Value, rank: Value) -> None:
        """Write a rank."""
        store(self.flat, reinterpret(rank, "float32"), self.base + n)


@dataclass(frozen=True)
class Chooser:
    """Chooses from lists, with shared memory for the digits of ranks: int32 [BINS]."""

    block: Block
    bins: Memory

    def valid(self, ranks: Ranks, above: int = NEVER) -> Value:
        """Return how many ranks are higher (int32)."""
        count = cell("int32", const(0, "int32"))
        with self.block.each(ranks.length) as n:
            put(count, get(count) + cast(ranks.get(n) > const(above, "int32"), "int32"))
        return self.block.sum(get(count))

    def last(self, ranks: Ranks, count: Value) -> tuple[Value, Value]:
        """Return the lowest rank of the best `count` keys (int32), and how many keys have it.

        There are more than `count` that may be chosen; 0 gives what no key has.
        """
        left, prefix = cell("int32", count), cell("uint32", const(0, "uint32"))
        with T.If(count > 0), T.Then():
            for shift in range(32 - BITS, -1, -BITS):
                self._digits(ranks, shift, get(prefix))
                digit, above = self._digit(get(left))
                put(left, get(left) - above)
                put(
                    prefix, T.bitwise_or(T.shift_left(get(prefix), _u(BITS)), cast(digit, "uint32"))
                )
        none = const(FORCED, "int32")
        found = _signed(T.bind(get(prefix)))
        some = T.bind(count > 0)
        return pin(select(some, found, none)), pin(select(some, get(left), const(0, "int32")))

    def _digits(self, ranks: Ranks, shift: int, prefix: Value) -> None:
        """Count the digits at `shift` of the ranks that start with `prefix`."""
        prefix = pin(prefix)
        sync()
        with self.block.each(const(BINS, "int32")) as n:
            store(self.bins, const(0, "int32"), n)
        sync()
        with self.block.each(ranks.length) as n:
            key = _unsigned(ranks.get(n))
            ours: Value = const(True, "bool")
            if shift + BITS < 32:
                ours = equal(T.shift_right(key, _u(shift + BITS)), prefix)
            with T.If(ours), T.Then():
                digit = T.bitwise_and(T.shift_right(key, _u(shift)), _u(BINS - 1))
                at = T.bind(cast(digit, "int32"))
                T.evaluate(T.cuda.atomic_add(self.bins.ptr_to([at]), const(1, "int32")))
        sync()

    def _digit(self, left: Value) -> tuple[Value, Value]:
        """Return the digit of the key that is number `left` from above, and how many are above it.

        Every warp finds the same: each lane sums some digits, the highest ones the first lane.
        """
        lane, each = self.block.place.lane, BINS // 32
        top = T.bind(BINS - 1 - lane * each)
        mine = cell("int32", const(0, "int32"))
        with T.unroll(each) as n:
            put(mine, get(mine) + load(self.bins, top - n))
        upto = cell("int32", get(mine))
        step = 1
        while step < 32:
            other = _shuffle_up(T.bind(get(upto)), step)
            put(upto, get(upto) + select(lane >= step, T.bind(other), const(0, "int32")))
            step *= 2
        above = cell("int32", get(upto) - get(mine))
        digit, before = (cell("int32", const(-1, "int32")) for _ in range(2))
        with T.unroll(each) as n:
            count = T.bind(load(self.bins, top - n))
            here = T.And(get(above) < left, left <= get(above) + count)
            with T.If(here), T.Then():
                put(digit, top - n)
                put(before, get(above))
            put(above, get(above) + count)

        def larger(a: Value, b: Value) -> Value:
            return T.max(a, b)

        return pin(across(get(digit), larger)), pin(across(get(before), larger))

    # --- mass -----------------------------------------------------------------------------------

    def of_mass(self, ranks: Ranks, score: Callable[[Value], Value], top_p: float) -> Value:
        """Return the length of the shortest prefix whose mass reaches top_p of the total (int32).

        A key is chosen while the mass before it is short of the goal; forced keys are in any case.
        """
        zero, never = const(0.0, "float64"), const(NEVER, "int32")
        total, sure = cell("float64", zero), cell("float64", zero)
        with self.block.each(ranks.length) as n:
            x = T.bind(score(n))
            with T.If(_number(x)), T.Then():
                mass = T.bind(cast(x, "float64"))
                put(total, get(total) + mass)
                with T.If(equal(ranks.get(n), const(FORCED, "int32"))), T.Then():
                    put(sure, get(sure) + mass)
        whole, forced = self.block.sum(get(total)), self.block.sum(get(sure))
        goal = pin(whole * const(top_p, "float64") - forced)
        count = cell("int32", self.valid(ranks, FORCED - 1))

        def mass_from(lowest: Value) -> Value:
            """Return the mass of the ranks from `lowest` on, without the forced ones."""
            part = cell("float64", zero)
            with self.block.each(ranks.length) as n:
                rank = ranks.get(n)
                free = T.And(rank > never, rank < const(FORCED, "int32"))
                with T.If(T.And(free, rank >= lowest)), T.Then():
                    put(part, get(part) + cast(score(n), "float64"))
            return self.block.sum(get(part))

        with T.If(goal > zero), T.Then():
            # The highest rank from which on the mass reaches the goal.
            low = cell("int64", const(NEVER + 1, "int64"))
            high = cell("int64", const(FORCED, "int64"))
            with T.While(get(low) + 1 < get(high)):
                middle = pin((get(low) + get(high)) // 2)
                with T.If(mass_from(T.bind(cast(middle, "int32"))) < goal):
                    with T.Then():
                        put(high, middle)
                    with T.Else():
                        put(low, middle)
            last = pin(cast(get(low), "int32"))
            left = cell("float64", goal - mass_from(T.bind(last + 1)))
            ties, above = cell("int32", const(0, "int32")), cell("int32", const(0, "int32"))
            tied = cell("float64", zero)
            with self.block.each(ranks.length) as n:
                rank = ranks.get(n)
                put(above, get(above) + cast(rank > last, "int32"))
                with T.If(equal(rank, last)), T.Then():
                    put(ties, get(ties) + 1)
                    put(tied, cast(score(n), "float64"))
            # Each of the ties has the same mass; a thread without one knows none.
            one = self.block.all(get(tied), lambda a, b: select(equal(a, zero), b, a))
            most = self.block.sum(get(ties))
            taken = cell("int32", const(0, "int32"))
            with T.While(T.And(get(taken) < most, get(left) > zero)):
                put(left, get(left) - one)
                put(taken, get(taken) + 1)
            put(count, self.block.sum(get(above)) + get(taken))
        return pin(get(count))

    # --- the list -------------------------------------------------------------------------------

    def write(self, ranks: Ranks, count: Value, out: Memory, base: Value, width: Value) -> None:
        """Write the best `count` keys (int32) ascending from `base` on, and -1 behind them.

        Args:
            width: of the list, int64.
        """
        last, ties = self._prefix(ranks, count)
        written, tied = cell("int32", const(0, "int32")), cell("int32", const(0, "int32"))
        with self.block.rounds(ranks.length) as n:
            rank = cell("int32", const(NEVER, "int32"))
            with T.If(n < ranks.length), T.Then():
                put(rank, ranks.get(n))
            over = T.bind(get(rank) > last)
            tie = T.bind(T.And(equal(get(rank), last), get(rank) > const(NEVER, "int32")))
            before, whole = self.block.before((over, tie))
            earlier = T.bind(get(tied) + before[1])  # ties before this one
            at = T.bind(get(written) + before[0] + minimum(earlier, ties))
            chosen = T.Or(over, T.And(tie, earlier < ties))
            with T.If(T.And(chosen, cast(at, "int64") < width)), T.Then():
                store(out, cast(n, "int32"), base + cast(at, "int64"))
            put(written, get(written) + whole[0])
            put(tied, get(tied) + whole[1])
        end = T.bind(cast(count, "int64"))
        with self.block.each(width) as n, T.If(n >= end), T.Then():
            store(out, const(-1, "int32"), base + n)

    def _prefix(self, ranks: Ranks, count: Value) -> tuple[Value, Value]:
        """Return the rank above which all are chosen, and how many of that rank are."""
        last, ties = cell("int32", const(NEVER, "int32")), cell("int32", const(0, "int32"))
        with T.If(count < self.valid(ranks)), T.Then():
            lowest, same = self.last(ranks, count)
            put(last, lowest)
            put(ties, same)
        return pin(get(last)), pin(get(ties))


def _u(value: int) -> Value:
    return const(value, "uint32")


def _unsigned(rank: Value) -> Value:
    """Return the bits of a rank as uint32 of the same order."""
    return T.bind(T.bitwise_xor(reinterpret(rank, "uint32"), _u(1 << 31)))


def _signed(key: Value) -> Value:
    return reinterpret(T.bitwise_xor(key, _u(1 << 31)), "int32")


def _number(x: Value) -> Value:
    """Tell whether a score is a number above -inf."""
    inf = const(float("inf"), "float32")
    return T.And(x > const(float("-inf"), "float32"), x <= inf)


def _shuffle_up(x: Value, step: int) -> Value:
    """Return the value of the lane `step` below."""
    shuffle = getattr(T.cuda, "__shfl_up_sync")
    return shuffle(_u(FULL), x, const(step, "int32"), const(32, "int32"))
