"""Reduce scores to groups: sum, max, mean and lse of lanes, vectors and rows of accumulators.

A score of -inf is hidden: no reduction sees it, and a group that saw nothing is -inf (absent). NaN
counts as -inf for "max"; the others carry it on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sparsegen.arch import Arch
from sparsegen.codegen.cpu import vec
from sparsegen.codegen.cpu.stream import pin
from sparsegen.codegen.cpu.vec import LOG2E
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    const,
    equal,
    lanes_of,
    load,
    maximum,
    select,
    shuffle,
    store,
)

How = Literal["sum", "max", "mean", "lse"]
ABSENT = float("-inf")

# The state of a reduction: float32 values, one for each plane, all of the same lanes.
State = tuple[Value, ...]


@dataclass(frozen=True)
class Reducer:
    """Combine states lane by lane.

    sum, max  one plane: the result, -inf where nothing was seen
    mean      the sum, and how many elements it has
    lse       the maximum, and the sum of exp(x - maximum)

    exp, log  of float32, as the target computes them
    """

    how: How
    exp: Callable[[Value], Value] = vec.exp
    log: Callable[[Value], Value] = vec.log

    @property
    def planes(self) -> int:
        """Return how many values a state has."""
        return 2 if self.how in ("mean", "lse") else 1

    def empty(self, lanes: int) -> State:
        """Return the state of nothing."""
        zero, absent = (const(x, "float32", lanes) for x in (0.0, ABSENT))
        match self.how:
            case "mean":
                return zero, zero
            case "lse":
                return absent, zero
        return (absent,)

    def lift(self, x: Value) -> State:
        """Return the state of one bound score in each lane."""
        zero, one, absent = (const(c, "float32", lanes_of(x)) for c in (0.0, 1.0, ABSENT))
        match self.how:
            case "max":
                return (select(x >= absent, x, absent),)
            case "mean":
                hidden = equal(x, absent)
                return select(hidden, zero, x), select(hidden, zero, one)
            case "lse":
                return x, select(equal(x, absent), zero, one)
        return (x,)

    def combine(self, a: State, b: State) -> State:
        """Return the state of the elements of both; each value is used several times."""
        a, b = tuple(map(pin, a)), tuple(map(pin, b))
        absent = const(ABSENT, "float32", lanes_of(a[0]))
        match self.how:
            case "max":
                return (maximum(a[0], b[0]),)
            case "mean":
                return a[0] + b[0], a[1] + b[1]
            case "lse":
                top = T.bind(select(b[0] > a[0], b[0], a[0]))
                return top, a[1] * self.share(a[0], top) + b[1] * self.share(b[0], top)
        both = select(equal(b[0], absent), a[0], a[0] + b[0])
        return (select(equal(a[0], absent), b[0], both),)

    def finish(self, state: State) -> Value:
        """Return the result, -inf where nothing was seen."""
        if self.planes == 1:
            return state[0]
        x, n = tuple(map(T.bind, state))
        zero, absent = (const(c, "float32", lanes_of(x)) for c in (0.0, ABSENT))
        if self.how == "mean":
            return select(equal(n, zero), absent, x / n)
        return select(equal(n, zero), absent, x + self.log(n))

    def share(self, x: Value, top: Value) -> Value:
        """Return exp(x - top), 1 where both are infinite."""
        return select(equal(x, top), const(1.0, "float32", lanes_of(x)), self.exp(x - top))

    def across(self, state: State) -> State:
        """Combine the lanes (a power of two) of a state into one scalar state."""
        width = lanes_of(state[0])
        while width > 1:
            half = width // 2
            state = tuple(map(T.bind, state))
            low = tuple(shuffle(x, x, list(range(half))) for x in state)
            high = tuple(shuffle(x, x, list(range(half, width))) for x in state)
            state = self.combine(low, high)
            width = half
        return state

    def all(self, states: Sequence[State]) -> State:
        """Combine states pair by pair."""
        found = list(states)
        while len(found) > 1:
            pairs = zip(found[::2], found[1::2], strict=False)
            rest = found[len(found) // 2 * 2 :]
            found = [tuple(map(T.bind, self.combine(a, b))) for a, b in pairs] + rest
        return found[0]


@dataclass(frozen=True)
class Cells:
    """Mutable states in memory: plane p of state n (of `lanes` lanes) starts at n * lanes."""

    reducer: Reducer
    planes: tuple[Memory, ...]
    lanes: int

    @staticmethod
    def allocate(reducer: Reducer, count: int, lanes: int) -> Cells:
        """Allocate `count` states of vectors, without a value yet."""
        planes = [T.alloc_buffer((count * lanes,), "float32") for _ in range(reducer.planes)]
        return Cells(reducer, tuple(planes), lanes)

    def get(self, n: Value, lanes: int | None = None, lane: Value | int = 0) -> State:
        """Read a state, or fewer `lanes` of it from `lane` on."""
        wide = self.lanes if lanes is None else lanes
        return tuple(load(p, n * self.lanes + lane, lanes=wide) for p in self.planes)

    def put(self, n: Value, state: State) -> None:
        """Write a state."""
        for plane, value in zip(self.planes, tuple(map(T.bind, state)), strict=True):
            store(plane, value, n * self.lanes)

    def add(self, n: Value, state: State) -> None:
        """Take elements into a state."""
        self.put(n, self.reducer.combine(self.get(n), state))


@dataclass(frozen=True)
class Rows:
    """Rows of accumulators, one per group.

    planes  float32 [rows * pitch]; lanes from `length` on are written but have no meaning
    pitch   a multiple of `width`, with room for a whole vector after `length` (int64)
    """

    reducer: Reducer
    rows: int
    length: Value
    pitch: Value
    width: int
    planes: tuple[Memory, ...]

    @staticmethod
    def pitch_of(length: Value, width: int) -> Value:
        """Return the elements a row takes."""
        return (length + (2 * width - 1)) // width * width

    def clear(self) -> None:
        """Forget every element."""
        empty = self.reducer.empty(self.width)
        with T.serial(self.rows * self.pitch // self.width) as n:
            for plane, value in zip(self.planes, empty, strict=True):
                store(plane, value, n * self.width)

    def add(self, row: Value, group: Value, state: State) -> None:
        """Take a scalar state into a group (int32); groups outside the row are left out."""
        wide = T.Cast("int64", group)
        with T.If(T.And(group >= 0, wide < self.length)), T.Then():
            self._merge(row * self.pitch + wide, state)

    def add_vector(self, row: Value, first: Value, state: State) -> None:
        """Take a vector state into the groups from `first` (int32, below the length) on."""
        self._merge(row * self.pitch + T.Cast("int64", first), state)

    def _merge(self, index: Value, state: State) -> None:
        at, lanes = T.bind(index), lanes_of(state[0])
        old = tuple(load(p, at, lanes=lanes) for p in self.planes)
        for plane, value in zip(
            self.planes, tuple(map(T.bind, self.reducer.combine(old, state))), strict=True
        ):
            store(plane, value, at)

    def finish(self, *, softmax: bool) -> None:
        """Turn states into results, in the first plane; then softmax over each row if asked for."""
        width = self.width
        if self.reducer.planes > 1:
            with T.serial(self.rows * self.pitch // width) as n:
                state = tuple(load(p, n * width, lanes=width) for p in self.planes)
                store(self.planes[0], T.bind(self.reducer.finish(state)), n * width)
        if softmax:
            with T.serial(const(self.rows, "int64")) as row:
                self._softmax(T.bind(row * self.pitch))

    def _softmax(self, first: Value) -> None:
        memory, width = self.planes[0], self.width
        vectors = (self.length + (width - 1)) // width
        absent = const(ABSENT, "float32", width)
        # What lies behind the row must not count.
        with T.serial(vectors * width - self.length) as n:
            store(memory, const(ABSENT, "float32"), first + self.length + n)
        peak, total = vec.accumulators(2, width)
        store(peak, absent, 0)
        with T.serial(vectors) as n:
            x = load(memory, first + n * width, lanes=width)
            store(peak, maximum(load(peak, 0, lanes=width), x), 0)
        (top,) = Reducer("max").across((load(peak, 0, lanes=width),))
        top = vec.spread(T.bind(top), width)
        store(total, const(0.0, "float32", width), 0)
        with T.serial(vectors) as n:
            x = T.bind(load(memory, first + n * width, lanes=width))
            p = T.bind(weight(x, top))
            store(total, load(total, 0, lanes=width) + p, 0)
            store(memory, select(equal(x, absent), absent, p), first + n * width)
        rate = const(1.0, "float32") / vec.total(load(total, 0, lanes=width))
        rate = vec.spread(T.bind(rate), width)
        with T.serial(vectors) as n:
            x = T.bind(load(memory, first + n * width, lanes=width))
            store(memory, select(equal(x, absent), absent, x * rate), first + n * width)


def weight(x: Value, top: Value, arch: Arch | None = None) -> Value:
    """Return exp(x - top): 0 for a hidden x, and NaN where x or `top` leaves no other answer."""
    lanes = lanes_of(x)
    power = vec.exp2((x - top) * const(LOG2E, "float32", lanes), arch)
    return select(equal(x, const(ABSENT, "float32", lanes)), const(0.0, "float32", lanes), power)
