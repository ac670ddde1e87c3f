"""Select exactly from a row of scores: find the rank of the last chosen key, then one pass.

Order: score descending, index ascending; forced keys before all others. NaN and -inf are never
chosen unless forced. Scores become integers of the same order, and the budget is met by halving the
range of ranks that the last chosen key may have, counting what lies above; so no number of ties can
be too many, and nothing is sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsegen.codegen.cpu import vec
from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    const,
    equal,
    lanes_of,
    load,
    reinterpret,
    select,
    store,
)

# Ranks of keys: never chosen, and forced. Both lie outside the ranks of floats but NaN.
NEVER, FORCED = -(2**31), 2**31 - 1
BITS = 8
BINS = 1 << BITS
# Vectors counted at a time.
STRIDE = 4


@dataclass(frozen=True)
class Row:
    """The candidates of one list.

    score   float32 [length]; for forced keys that are absent, -inf
    rank    int32 [room(length)], see `rank_of`; overwritten by `choose`
    length  int64
    width   lanes of a vector
    """

    score: Memory
    rank: Memory
    length: Value
    width: int

    @staticmethod
    def room(length: Value, width: int) -> Value:
        """Return how many ranks must fit."""
        return (length + (STRIDE * width - 1)) // (STRIDE * width) * (STRIDE * width)


def rank_of(score: Value) -> Value:
    """Return the rank of float32 scores as int32: greater for greater scores, equal for ties."""
    lanes = lanes_of(score)
    score = T.bind(score)

    def whole(value: int) -> Value:
        return const(value, "int32", lanes)

    zero, inf = const(0.0, "float32", lanes), const(float("inf"), "float32", lanes)
    bits = T.bind(reinterpret(score, "int32"))
    # -0 is a tie of +0. (The simplifier drops `+ 0`, and a choice that is equal to its numbers.)
    magnitude = T.bitwise_and(bits, whole(0x7FFFFFFF))
    bits = T.bind(select(equal(magnitude, whole(0)), whole(0), bits))
    flipped = T.bitwise_and(T.shift_right(bits, whole(31)), whole(0x7FFFFFFF))
    ordered = T.bind(T.bitwise_xor(bits, flipped))
    # NaN is not at most inf; -inf and NaN are no ranks of numbers.
    number = select(score <= inf, ordered, whole(NEVER))
    return T.bind(select(score > zero - inf, number, whole(NEVER)))


def choose(row: Row, budget: Value | None, top_p: float | None) -> Value:
    """Leave the chosen keys, ascending, at the front of `row.rank`; return their number (int64).

    Args:
        budget: how many keys at most (int32), or None.
        top_p: stop once this share of the row's mass is chosen; forced keys are chosen anyway.
    """
    last = cell("int64", const(NEVER + 1, "int64"))  # the lowest rank that is chosen
    ties = cell("int64", row.length)  # how many keys of that rank are chosen
    # Behind the row nothing may be counted.
    with T.serial(Row.room(row.length, row.width) - row.length) as n:
        store(row.rank, const(NEVER, "int32"), row.length + n)
    if top_p is not None:
        _descend_mass(row, top_p, last, ties)
    if budget is not None:
        _descend_count(row, budget, last, ties)
    written = cell("int64", const(0, "int64"))
    lowest = T.bind(cast(get(last), "int32"))
    with T.serial(row.length) as n:
        rank = T.bind(load(row.rank, n))
        tie = T.bind(cast(T.And(equal(rank, lowest), get(ties) > 0), "int64"))
        chosen = T.bind(cast(rank > lowest, "int64") + tie)
        # Without a branch, which random scores would mispredict. Never ahead of what is read.
        store(row.rank, cast(n, "int32"), get(written))
        put(written, get(written) + chosen)
        put(ties, get(ties) - tie)
    return T.bind(get(written))


def _unsigned(rank: Value) -> Value:
    """Return a rank as int64 from 0 on, so that its digits order as it does."""
    return cast(rank, "int64") + const(2**31, "int64")


def _count(row: Row, lowest: Value) -> Value:
    """Return how many keys have a rank of at least `lowest` (int32), as int64."""
    width = row.width
    sums = vec.accumulators(STRIDE, width, "int32")
    for total in sums:
        store(total, const(0, "int32", width), 0)
    floor = vec.spread(lowest, width)
    step = STRIDE * width
    with T.serial(Row.room(row.length, width) // step) as n:
        for v, total in enumerate(sums):
            rank = load(row.rank, n * step + v * width, lanes=width)
            one = select(rank >= floor, const(1, "int32", width), const(0, "int32", width))
            store(total, load(total, 0, lanes=width) + one, 0)
    whole = load(sums[0], 0, lanes=width)
    for total in sums[1:]:
        whole = whole + load(total, 0, lanes=width)
    return pin(cast(vec.total(T.bind(whole)), "int64"))


def _descend_count(row: Row, budget: Value, last: Memory, ties: Memory) -> None:
    """Lower the choice to its best `budget` keys."""
    left = T.bind(T.max(cast(budget, "int64"), const(0, "int64")))
    reached = _count(row, cast(get(last), "int32"))
    above = cell("int64", const(0, "int64"))  # keys of a rank over the last
    with T.If(get(last) < FORCED), T.Then():
        put(above, _count(row, cast(get(last) + 1, "int32")))
    chosen = T.bind(get(above) + T.min(reached - get(above), get(ties)))
    with T.If(chosen > left), T.Then(), T.If(left < 1):
        with T.Then():
            put(last, const(FORCED, "int64"))
            put(ties, const(0, "int64"))
        with T.Else():
            put(above, const(0, "int64"))
            over = cell("int64", const(FORCED + 1, "int64"))  # a rank of fewer keys than `left`
            with T.While(get(last) + 1 < get(over)):
                middle = pin((get(last) + get(over)) // 2)
                found = _count(row, cast(middle, "int32"))
                with T.If(found < left):
                    with T.Then():
                        put(over, middle)
                        put(above, found)
                    with T.Else():
                        put(last, middle)
                        with T.If(equal(found, left)), T.Then():
                            put(over, middle)  # all of these: what remains to find does not matter
            # Of the lowest rank as many as are missing; after an exact hit all that have it.
            with T.If(equal(get(last), get(over))):
                with T.Then():
                    put(ties, row.length)
                with T.Else():
                    put(ties, left - get(above))


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
    with T.If(T.Not(goal > const(0.0, "float64"))):
        with T.Then():
            put(last, const(FORCED, "int64"))
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
    put(last, get(prefix) - const(2**31, "int64"))
    put(ties, const(0, "int64"))
    with T.serial(row.length) as n:
        short = get(left) > const(0.0, "float64")
        with T.If(T.And(equal(cast(load(row.rank, n), "int64"), get(last)), short)), T.Then():
            put(ties, get(ties) + 1)
            put(left, get(left) - cast(load(row.score, n), "float64"))


def _kept(row: Row, n: Value) -> Value:
    """Tell whether a score is a number above -inf."""
    score = load(row.score, n)
    inf = const(float("inf"), "float32")
    return T.And(score > const(float("-inf"), "float32"), score <= inf)
