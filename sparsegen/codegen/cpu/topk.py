"""Select exactly from a row of scores: radix descent to the last chosen score, then one pass.

Order: score descending, index ascending; forced keys before all others. NaN and -inf are never
chosen unless forced. Scores become integers of the same order, whose digits are counted from the
top; so no number of ties can be too many, and nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.tvm import Memory, T, Value, cast, const, equal, load, reinterpret, store

# Ranks of keys: never chosen, and forced. Both lie outside the ranks of floats but NaN.
NEVER, FORCED = -(2**31), 2**31 - 1
BITS = 8
BINS = 1 << BITS


@dataclass(frozen=True)
class Row:
    """The candidates of one list.

    score   float32 [length]; for forced keys that are absent, -inf
    rank    int32 [length], see `rank_of`
    length  int64
    """

    score: Memory
    rank: Memory
    length: Value


def rank_of(score: Value) -> Value:
    """Return the rank of a float32 score as int32: greater for greater scores, equal for ties."""
    bits = T.bind(reinterpret(score + const(0.0, "float32"), "int32"))  # -0 becomes +0
    ordered = T.bitwise_xor(
        bits, T.bitwise_and(T.shift_right(bits, const(31, "int32")), 0x7FFFFFFF)
    )
    # Ranks of -inf and below, and of NaN of either sign, are no ranks of numbers.
    number = T.And(score > const(float("-inf"), "float32"), score <= const(float("inf"), "float32"))
    return T.if_then_else(number, ordered, const(NEVER, "int32"))


def choose(
    row: Row, budget: Value | None, top_p: float | None, emit: Callable[[Value], None]
) -> None:
    """Call `emit` with the index (int64) of each chosen key, in ascending order.

    Args:
        budget: how many keys at most (int32), or None.
        top_p: stop once this share of the row's mass is chosen; forced keys are chosen anyway.
    """
    last = cell("int32", const(NEVER + 1, "int32"))  # the lowest rank that is chosen
    ties = cell("int64", row.length)  # how many keys of that rank are chosen
    if top_p is not None:
        _descend_mass(row, top_p, last, ties)
    if budget is not None:
        _descend_count(row, budget, last, ties)
    with T.serial(row.length) as n:
        rank = T.bind(load(row.rank, n))
        with T.If(rank > get(last)):
            with T.Then():
                emit(n)
            with T.Else(), T.If(T.And(equal(rank, get(last)), get(ties) > 0)), T.Then():
                put(ties, get(ties) - 1)
                emit(n)


def _unsigned(rank: Value) -> Value:
    """Return a rank as int64 from 0 on, so that its digits order as it does."""
    return cast(rank, "int64") + const(2**31, "int64")


def _descend_count(row: Row, budget: Value, last: Memory, ties: Memory) -> None:
    """Lower the choice to its best `budget` keys."""
    chosen = cell("int64", const(0, "int64"))
    seen = cell("int64", const(0, "int64"))
    with T.serial(row.length) as n:
        rank = T.bind(load(row.rank, n))
        with T.If(rank > get(last)):
            with T.Then():
                put(chosen, get(chosen) + 1)
            with T.Else(), T.If(equal(rank, get(last))), T.Then():
                put(seen, get(seen) + 1)
    have = T.bind(get(chosen) + T.min(get(seen), get(ties)))
    left = cell("int64", T.max(cast(budget, "int64"), const(0, "int64")))
    with T.If(have > get(left)), T.Then(), T.If(get(left) < 1):
        with T.Then():
            put(last, const(FORCED, "int32"))
            put(ties, const(0, "int64"))
        with T.Else():
            histogram = T.alloc_buffer((BINS,), "int32")
            prefix = cell("int64", const(0, "int64"))
            for shift in range(32 - BITS, -1, -BITS):
                _digit(row, histogram, prefix, left, shift)
            put(last, cast(get(prefix) - const(2**31, "int64"), "int32"))
            put(ties, get(left))


def _digit(row: Row, histogram: Memory, prefix: Memory, left: Memory, shift: int) -> None:
    """Fix one digit of the lowest chosen rank; `left` keys of the prefix are still to choose."""
    with T.serial(BINS) as b:
        store(histogram, const(0, "int32"), b)
    with T.serial(row.length) as n:
        key = T.bind(_unsigned(load(row.rank, n)))
        with T.If(equal(T.shift_right(key, const(shift + BITS, "int64")), get(prefix))), T.Then():
            digit = T.bind(T.bitwise_and(T.shift_right(key, const(shift, "int64")), BINS - 1))
            store(histogram, load(histogram, digit) + 1, digit)
    bin_ = cell("int64", const(BINS - 1, "int64"))
    with T.While(cast(load(histogram, get(bin_)), "int64") < get(left)):
        put(left, get(left) - cast(load(histogram, get(bin_)), "int64"))
        put(bin_, get(bin_) - 1)
    put(prefix, get(prefix) * BINS + get(bin_))


def _descend_mass(row: Row, top_p: float, last: Memory, ties: Memory) -> None:
    """Lower the choice to the shortest prefix whose mass reaches top_p of the total.

    A key is chosen while the mass before it is short of the goal. Masses are summed in float64,
    for every rank in ascending order of index, so equal inputs give equal lists.
    """
    total = cell("float64", const(0.0, "float64"))
    forced = cell("float64", const(0.0, "float64"))
    with T.serial(row.length) as n, T.If(_kept(row, n)), T.Then():
        mass = T.bind(cast(load(row.score, n), "float64"))
        put(total, get(total) + mass)
        with T.If(equal(load(row.rank, n), const(FORCED, "int32"))), T.Then():
            put(forced, get(forced) + mass)
    goal = T.bind(get(total) * const(top_p, "float64") - get(forced))
    with T.If(goal <= const(0.0, "float64")):
        with T.Then():
            put(last, const(FORCED, "int32"))
        with T.Else():
            _rank_of_mass(row, goal, last, ties)


def _rank_of_mass(row: Row, goal: Value, last: Memory, ties: Memory) -> None:
    left = cell("float64", goal)
    masses = T.alloc_buffer((BINS,), "float64")
    prefix = cell("int64", const(0, "int64"))
    for shift in range(32 - BITS, -1, -BITS):
        with T.serial(BINS) as b:
            store(masses, const(0.0, "float64"), b)
        lowest = cell("int64", const(BINS, "int64"))
        with T.serial(row.length) as n:
            rank = T.bind(load(row.rank, n))
            key = T.bind(_unsigned(rank))
            inside = equal(T.shift_right(key, const(shift + BITS, "int64")), get(prefix))
            free = T.And(rank > const(NEVER, "int32"), rank < const(FORCED, "int32"))
            with T.If(T.And(inside, free)), T.Then():
                digit = T.bind(T.bitwise_and(T.shift_right(key, const(shift, "int64")), BINS - 1))
                store(masses, load(masses, digit) + cast(load(row.score, n), "float64"), digit)
                put(lowest, T.min(get(lowest), digit))
        bin_ = cell("int64", const(BINS - 1, "int64"))
        # Rounding may leave a little of the goal below the lowest key: then all are chosen.
        with T.While(T.And(get(bin_) > get(lowest), load(masses, get(bin_)) < get(left))):
            put(left, get(left) - load(masses, get(bin_)))
            put(bin_, get(bin_) - 1)
        put(prefix, get(prefix) * BINS + get(bin_))
    put(last, cast(get(prefix) - const(2**31, "int64"), "int32"))
    put(ties, const(0, "int64"))
    with T.serial(row.length) as n:
        short = get(left) > const(0.0, "float64")
        with T.If(T.And(equal(load(row.rank, n), get(last)), short)), T.Then():
            put(ties, get(ties) + 1)
            put(left, get(left) - cast(load(row.score, n), "float64"))


def _kept(row: Row, n: Value) -> Value:
    """Tell whether a score is a number above -inf."""
    score = load(row.score, n)
    inf = const(float("inf"), "float32")
    return T.And(score > const(float("-inf"), "float32"), score <= inf)
