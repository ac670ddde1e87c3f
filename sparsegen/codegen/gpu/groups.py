"""Keep the groups of reductions in global memory, one block each: add, finish, reduce again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsegen.codegen.cpu.reduction import ABSENT, Reducer, State
from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.gpu.block import Block
from sparsegen.codegen.gpu.launch import shuffle_xor, sync
from sparsegen.codegen.tvm import Memory, T, Value, cast, const, equal, load, select, store


def reducer_of(how: str) -> Reducer:
    """Return a reducer with the functions of a GPU."""
    return Reducer(how, exp=T.exp, log=T.log)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Groups:
    """Rows of accumulators: plane p of group x of row r is at base + (p * rows + r) * length + x.

    base    int64
    length  groups of a row, int64
    """

    reducer: Reducer
    flat: Memory
    base: Value
    rows: int
    length: Value

    @property
    def size(self) -> Value:
        """Return how many elements it takes (int64)."""
        return self.length * (self.reducer.planes * self.rows)

    def at(self, row: Value, group: Value, plane: int = 0) -> Value:
        """Return where an accumulator is (int64)."""
        place = cast(row, "int64") + plane * self.rows
        return self.base + place * self.length + cast(group, "int64")

    def read(self, row: Value, group: Value) -> Value:
        """Return a result, after `finish`."""
        return load(self.flat, self.at(row, group))

    def clear(self, block: Block) -> None:
        """Forget every element."""
        with block.each(self.length * self.rows) as n:
            for plane, value in enumerate(self.reducer.empty(1)):
                store(self.flat, value, self.base + plane * self.rows * self.length + n)
        sync()

    def add(self, row: Value, group: Value, state: State) -> None:
        """Take a state into a group; groups outside the row are left out."""
        wide = T.bind(cast(group, "int64"))
        with T.If(T.And(wide >= 0, wide < self.length)), T.Then():
            places = [T.bind(self.at(row, wide, p)) for p in range(self.reducer.planes)]
            old = tuple(load(self.flat, p) for p in places)
            new = tuple(map(T.bind, self.reducer.combine(old, state)))
            for place, value in zip(places, new, strict=True):
                store(self.flat, value, place)

    def finish(self, block: Block, *, softmax: bool) -> None:
        """Turn states into results, in the first plane; then softmax over each row if asked for."""
        if self.reducer.planes > 1:
            with block.each(self.length * self.rows) as n:
                state = tuple(
                    load(self.flat, self.base + p * self.rows * self.length + n)
                    for p in range(self.reducer.planes)
                )
                store(self.flat, T.bind(self.reducer.finish(state)), self.base + n)
            sync()
        if softmax:
            with T.serial(self.rows) as row:
                self._softmax(block, row)

    def _softmax(self, block: Block, row: Value) -> None:
        first = T.bind(self.at(row, const(0, "int64")))
        absent = const(ABSENT, "float32")
        peak, total = cell("float32", absent), cell("float64", const(0.0, "float64"))
        with block.each(self.length) as n:
            put(peak, larger(get(peak), T.bind(load(self.flat, first + n))))
        top = T.bind(cast(block.all(cast(get(peak), "float64"), larger), "float32"))
        with block.each(self.length) as n:
            x = T.bind(load(self.flat, first + n))
            put(total, get(total) + cast(weight(x, top), "float64"))
        rate = T.bind(const(1.0, "float32") / cast(block.sum(get(total)), "float32"))
        with block.each(self.length) as n:
            x = T.bind(load(self.flat, first + n))
            store(self.flat, select(equal(x, absent), absent, weight(x, top) * rate), first + n)
        sync()


def larger(a: Value, b: Value) -> Value:
    """Return the larger of two bound numbers; `a` where `b` is NaN."""
    return select(b > a, b, a)


def weight(x: Value, top: Value) -> Value:
    """Return exp(x - top): 0 for a hidden x, and NaN where x or `top` leaves no other answer."""
    zero = const(0.0, "float32")
    return select(equal(x, const(ABSENT, "float32")), zero, T.exp(x - top))


def gather(
    reducer: Reducer, count: Value, element: Callable[[Value], Value], lane: Value, lanes: int
) -> State:
    """Reduce `count` (int32) elements over a team of neighbouring lanes; all of them get the state.

    Every lane of the warp must come here.

    Args:
        element: a score, given its number.
        lane: of the team.
    """
    cells = [cell("float32", value) for value in reducer.empty(1)]

    def take(state: State) -> None:
        for memory, value in zip(cells, tuple(map(T.bind, state)), strict=True):
            put(memory, value)

    with T.serial((count + (lanes - 1 - lane)) // lanes) as n:
        x = pin(element(T.bind(lane + n * lanes)))
        take(reducer.combine(tuple(map(get, cells)), reducer.lift(x)))
    step = 1
    while step < lanes:
        mine = tuple(T.bind(get(c)) for c in cells)
        other = tuple(T.bind(shuffle_xor(x, step)) for x in mine)
        # The lower lane's elements come first, so that all lanes get the same sum.
        upper = T.bind(T.bitwise_and(lane, const(step, "int32")) > 0)
        low = tuple(T.bind(select(upper, o, m)) for m, o in zip(mine, other, strict=True))
        high = tuple(T.bind(select(upper, m, o)) for m, o in zip(mine, other, strict=True))
        take(reducer.combine(low, high))
        step *= 2
    return tuple(T.bind(get(c)) for c in cells)
