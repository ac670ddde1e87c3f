"""Attend from a tile of rows to a chunk of keys: scores, online softmax, weighted values.

Rows lie in SIMD lanes, so a key element is broadcast from memory as the second factor of an fma
and nothing is ever reduced across lanes. A register tile holds `keys` x `vectors` scores, later
`dims` x `vectors` outputs. Keys are read where they are (`Segment`): from the tensors themselves in
float32, else from a float32 copy of the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.tile import Tile
from sparsegen.codegen.cpu.vec import LOG2E, accumulators, exp2, log, spread
from sparsegen.codegen.tvm import Memory, T, Value, const, load, maximum, select, store

# A score that is not there, and the running maximum before any score. Finite, so that their
# difference is; apart, so that exp2 of it is exactly 0.
HIDDEN = -1e30
NO_SCORE = -1e29


@dataclass(frozen=True)
class Blocking:
    """Register tiles: `keys` of a chunk of `chunk` keys at a time, `dims` of the values."""

    chunk: int
    keys: int
    dims: int


@dataclass(frozen=True)
class Segment:
    """Elements of every key of a chunk: `memory` flat float32, `base(slot)` the first of a key."""

    memory: Memory
    size: int
    base: Callable[[Value], Value]


@dataclass(frozen=True)
class Slots:
    """The slots begin <= slot < end of a chunk; `begin` is a multiple of the register tile."""

    begin: Value
    end: Value

    def loop(self) -> Value:
        """Return a loop over the slots."""
        return T.serial(self.begin, self.end)


class Panel(Protocol):
    """Scores of a sub-tile: `weights` [chunk][lanes], float32."""

    @property
    def tile(self) -> Tile:
        """Return the shape of the tile."""

    @property
    def blocking(self) -> Blocking:
        """Return the register tile."""

    @property
    def weights(self) -> Memory:
        """Return the scores."""


@dataclass(frozen=True)
class State:
    """The running softmax of a tile, and the weights of the chunk at hand.

    peak, total  [rows]: largest score (before `rate`), and sum of 2^(rate * (score - peak))
    out          [sub-tile][dim][lanes]: weighted values
    weights      [chunk][lanes] of one sub-tile: scores, then weights
    """

    tile: Tile
    blocking: Blocking
    dim: int
    peak: Memory
    total: Memory
    out: Memory
    weights: Memory

    @staticmethod
    def start(tile: Tile, blocking: Blocking, dim: int) -> State:
        """Allocate and clear the state of a tile whose values have `dim` elements."""
        state = State(
            tile,
            blocking,
            dim,
            T.alloc_buffer((tile.rows,), "float32"),
            T.alloc_buffer((tile.rows,), "float32"),
            T.alloc_buffer((tile.subtiles * dim * tile.lanes,), "float32"),
            T.alloc_buffer((blocking.chunk * tile.lanes,), "float32"),
        )
        width = tile.width
        with T.serial(tile.rows // width) as n:
            store(state.peak, const(NO_SCORE, "float32", width), n * width)
            store(state.total, const(0.0, "float32", width), n * width)
        with T.serial(tile.rows * dim // width) as n:
            store(state.out, const(0.0, "float32", width), n * width)
        return state


def scores(
    state: Panel, queries: Memory, segments: Sequence[Segment], sub: Value, slots: Slots
) -> None:
    """Write q . k of one sub-tile and the keys of `slots` to the weights.

    Slots up to the next multiple of the register tile are read too, and must hold valid keys.
    """
    tile, block = state.tile, state.blocking
    width, vectors = tile.width, tile.vectors
    dim = sum(s.size for s in segments)
    stop = (slots.end + (block.keys - 1)) // block.keys
    with T.serial(slots.begin // block.keys, stop) as group:
        slot = T.bind(group * block.keys)
        acc = accumulators(block.keys * vectors, width)
        for a in acc:
            store(a, const(0.0, "float32", width), 0)
        done = 0
        for segment in segments:
            bases = [T.bind(segment.base(slot + j)) for j in range(block.keys)]
            at = T.bind((sub * dim + done) * tile.lanes)
            with T.serial(segment.size) as d:
                q = [
                    T.bind(load(queries, at + d * tile.lanes + v * width, lanes=width))
                    for v in range(vectors)
                ]
                for j, base in enumerate(bases):
                    k = spread(load(segment.memory, base + d), width)
                    for v in range(vectors):
                        a = acc[j * vectors + v]
                        store(a, load(a, 0, lanes=width) + q[v] * k, 0)
            done += segment.size
        for n, a in enumerate(acc):
            store(state.weights, load(a, 0, lanes=width), slot * tile.lanes + n * width)


def rewrite(state: Panel, slots: Slots, rule: Callable[[Value, int, Value], Value]) -> None:
    """Replace every score of `slots` by rule(slot, vector, score)."""
    tile, width = state.tile, state.tile.width
    with slots.loop() as slot:
        for v in range(tile.vectors):
            at = slot * tile.lanes + v * width
            score = T.bind(load(state.weights, at, lanes=width))
            store(state.weights, rule(slot, v, score), at)


def softmax(state: State, sub: Value, slots: Slots, rate: float, arch: Arch) -> list[Memory]:
    """Turn scores into weights and return, per vector, the factor for what was summed before.

    Args:
        rate: what a score is multiplied with before 2^.
    """
    tile, width = state.tile, state.tile.width
    factors = accumulators(tile.vectors, width)
    peaks = accumulators(tile.vectors, width)
    totals = accumulators(tile.vectors, width)
    rows = sub * tile.lanes
    for v, peak in enumerate(peaks):
        store(peak, load(state.peak, rows + v * width, lanes=width), 0)
    with slots.loop() as slot:
        for v, peak in enumerate(peaks):
            score = load(state.weights, slot * tile.lanes + v * width, lanes=width)
            store(peak, maximum(load(peak, 0, lanes=width), score), 0)
    by = const(rate, "float32", width)
    for v in range(tile.vectors):
        at = rows + v * width
        peak = T.bind(load(peaks[v], 0, lanes=width))
        factor = exp2((load(state.peak, at, lanes=width) - peak) * by, arch)
        store(factors[v], factor, 0)
        store(totals[v], load(state.total, at, lanes=width) * factor, 0)
        store(state.peak, peak, at)
        store(peaks[v], peak * by, 0)
    with slots.loop() as slot:
        for v in range(tile.vectors):
            at = slot * tile.lanes + v * width
            score = load(state.weights, at, lanes=width)
            weight = exp2(score * by - load(peaks[v], 0, lanes=width), arch)
            store(state.weights, weight, at)
            store(totals[v], load(totals[v], 0, lanes=width) + weight, 0)
    for v in range(tile.vectors):
        store(state.total, load(totals[v], 0, lanes=width), rows + v * width)
    return factors


def values(
    state: State,
    segments: Sequence[Segment],
    factors: list[Memory],
    sub: Value,
    slots: Slots,
    masked: Value | None,
) -> None:
    """Add the weighted values of `slots` to what was summed before times `factors`.

    Args:
        masked: whether some row does not see some slot; None if every row sees all.
    """

    def add(hides: bool) -> None:
        dims, start = state.blocking.dims, 0
        for segment in segments:
            whole = segment.size // dims
            with T.serial(whole) as group:
                _values(state, segment, group * dims, start, dims, factors, sub, slots, hides)
            rest = segment.size - whole * dims
            if rest:
                first = const(whole * dims, "int32")
                _values(state, segment, first, start, rest, factors, sub, slots, hides)
            start += segment.size

    if masked is None:
        add(hides=False)
        return
    with T.If(masked):
        with T.Then():
            add(hides=True)
        with T.Else():
            add(hides=False)


def _values(
    state: State,
    segment: Segment,
    first: Value,
    start: int,
    dims: int,
    factors: list[Memory],
    sub: Value,
    slots: Slots,
    hides: bool,
) -> None:
    tile, width, vectors = state.tile, state.tile.width, state.tile.vectors
    acc = accumulators(dims * vectors, width)
    at = T.bind((sub * state.dim + start + first) * tile.lanes)
    for n, a in enumerate(acc):
        old = load(state.out, at + n * width, lanes=width)
        store(a, old * load(factors[n % vectors], 0, lanes=width), 0)
    zero = const(0.0, "float32", width)
    with slots.loop() as slot:
        base = T.bind(segment.base(slot) + first)
        weights = [
            T.bind(load(state.weights, slot * tile.lanes + v * width, lanes=width))
            for v in range(vectors)
        ]
        for d in range(dims):
            value = spread(load(segment.memory, base + d), width)
            for v, weight in enumerate(weights):
                a = acc[d * vectors + v]
                old = load(a, 0, lanes=width)
                more = old + weight * value
                # A value that a row does not see may be NaN, and 0 * NaN is no 0. (A weight that is
                # NaN itself makes the total NaN, and so the row.)
                store(a, select(weight > zero, more, old) if hides else more, 0)
    for n, a in enumerate(acc):
        store(state.out, load(a, 0, lanes=width), at + n * width)


def finish(
    state: State, natural: float, sink: Callable[[Value], Value] | None, arch: Arch
) -> tuple[Memory, Memory]:
    """Return the factor that normalises each row, and its lse, both [rows].

    Args:
        natural: what a score is multiplied with before e^.
        sink: gives the sinks of the vector of rows that starts at a lane, in natural-log units.
    """
    tile, width = state.tile, state.tile.width
    scale = T.alloc_buffer((tile.rows,), "float32")
    lse = T.alloc_buffer((tile.rows,), "float32")
    zero = const(0.0, "float32", width)
    with T.serial(tile.rows // width) as n:
        at = n * width
        total = T.bind(load(state.total, at, lanes=width))
        peak = T.bind(load(state.peak, at, lanes=width) * const(natural, "float32", width))
        whole = total
        if sink is not None:
            above = (sink(at) - peak) * const(LOG2E, "float32", width)
            whole = T.bind(total + exp2(above, arch))
        one = const(1.0, "float32", width)
        empty = total == zero  # not of a NaN
        store(scale, select(empty, zero, one / select(empty, one, whole)), at)
        store(lse, select(empty, const(-float("inf"), "float32", width), peak + log(total)), at)
    return scale, lse
