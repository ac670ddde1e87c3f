"""Add scores [key][lane] of a tile to the rows of groups that their keys name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sparsegen.codegen.cpu import stream
from sparsegen.codegen.cpu.reduction import Cells, Reducer, Rows, State
from sparsegen.codegen.cpu.select_task import Facts, granule, is_slash
from sparsegen.codegen.cpu.vec import transpose
from sparsegen.codegen.cpu.view import View
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    broadcast,
    cast,
    const,
    load,
    maximum,
    minimum,
)
from sparsegen.ir.expr import BlockOf, Expr


@dataclass(frozen=True)
class Scatter:
    """Adds the scores of a tile to `into`, the rows of the first reduction.

    row  of `into`, for a token and a head of the tile (int32)
    """

    view: View
    facts: Facts
    into: Rows
    row: Callable[[Value, Value], Value]

    @property
    def _reducer(self) -> Reducer:
        return self.into.reducer

    @property
    def _key(self) -> Expr:
        return self.facts.stages[0].keys[-1]

    def add(self, scores: Memory, position: Memory, count: Value, consecutive: bool) -> None:
        """Add `count` > 0 (int32) keys; slots up to a whole vector beyond them are hidden.

        Args:
            scores: float32 [key][lane].
            position: int32 position of each key.
            consecutive: whether positions follow each other.
        """
        if not consecutive or is_slash(self._key):
            self._singly(scores, position, count)
        elif granule(self._key) == (1, 0):
            self._columns(scores, T.bind(load(position, 0)), count)
        else:
            self._runs(scores, T.bind(load(position, 0)), count)

    # --- one vector of keys after the other -----------------------------------------------------

    def _columns(self, scores: Memory, first: Value, count: Value) -> None:
        """Transpose squares of scores, so that lanes become keys."""
        tile, width = self.view.tile, self.view.tile.width
        heads = tile.heads
        with T.serial((count + (width - 1)) // width) as block:
            base = T.bind(block * width)

            def add(t: Value, row: Value, state: State, base: Value = base) -> None:
                self.into.add_vector(row, first + base, state)

            zero = const(0, "int32")
            if self.facts.merges_tokens and not self.facts.per_head(tile):
                everything = self._folded(scores, base, zero, tile.vectors)
                add(zero, self.row(zero, zero), everything)
            elif heads % width == 0 and not self.facts.per_head(tile):
                step = heads // width
                with T.serial(self.view.present) as t:
                    add(t, self.row(t, zero), self._folded(scores, base, t * step, step))
            else:
                lanes = Cells.allocate(self._reducer, tile.rows, width)
                for v in range(tile.vectors):
                    rows = [
                        T.bind(load(scores, self._at(base + s, v), lanes=width))
                        for s in range(width)
                    ]
                    for lane, x in enumerate(transpose(rows)):
                        lanes.put(const(v * width + lane, "int32"), self._reducer.lift(x))
                self._rows(lanes, add)

    def _folded(self, scores: Memory, base: Value, first: Value, vectors: int) -> State:
        """Return the reduction over `vectors` vectors of lanes, for each of a vector of keys."""
        width = self.view.tile.width
        sums = Cells.allocate(self._reducer, width, width)
        with T.serial(width) as s:
            parts = [
                self._reducer.lift(T.bind(load(scores, self._at(base + s, first + v), lanes=width)))
                for v in range(vectors)
            ]
            sums.put(s, self._reducer.all(parts))
        planes = []
        for plane in sums.planes:
            rows = [T.bind(load(plane, s * width, lanes=width)) for s in range(width)]
            planes.append(transpose(rows))
        return self._reducer.all(list(zip(*planes, strict=True)))

    def _at(self, slot: Value, vector: Value | int) -> Value:
        tile = self.view.tile
        return cast(slot, "int64") * tile.lanes + vector * tile.width

    # --- keys of one block after the other ------------------------------------------------------

    def _runs(self, scores: Memory, first: Value, count: Value) -> None:
        """Reduce the keys of a block lane by lane, then the lanes."""
        tile, key = self.view.tile, self._key
        stop = T.bind(first + count)
        if isinstance(key, BlockOf):
            low, high = blocks_of(key, first)[0], blocks_of(key, stop - 1)[1]
        else:
            n, c = self._granule()
            low, high = stream.pin((first + c) // n), stream.pin((stop - 1 + c) // n)
        with T.serial(high - low + 1) as g:
            group = T.bind(low + g)
            begin, end = self._members(group)
            begin = stream.pin(maximum(begin, first) - first)
            end = stream.pin(minimum(end, stop) - first)
            sums = [Cells.allocate(self._reducer, 1, tile.width) for _ in range(tile.vectors)]
            for cells in sums:
                cells.put(const(0, "int32"), self._reducer.empty(tile.width))
            with T.serial(maximum(end - begin, const(0, "int32"))) as n:
                slot = T.bind(begin + n)
                share = self._share(first + slot, group)
                for v, cells in enumerate(sums):
                    x = load(scores, self._at(slot, v), lanes=tile.width)
                    if share is not None:
                        x = x * broadcast(share, tile.width)
                    cells.add(const(0, "int32"), self._reducer.lift(T.bind(x)))
            self._spread([c.get(const(0, "int32")) for c in sums], lambda _: group)

    def _granule(self) -> tuple[int, int]:
        found = granule(self._key)
        assert found is not None
        return found

    def _members(self, group: Value) -> tuple[Value, Value]:
        """Return the positions begin <= x < end of a group, of entries those that overlap it."""
        key = self._key
        if isinstance(key, BlockOf):
            entries = key.axis
            start = group * key.width
            begin = (start - entries.width) // entries.stride + 1
            return begin, (start + (key.width + entries.stride - 1)) // entries.stride
        n, c = self._granule()
        return group * n - c, (group + 1) * n - c

    def _share(self, entry: Value, block: Value) -> Value | None:
        """Return the weight of an entry in a block that it overlaps; None where there is none."""
        return share_of(self._key, self._reducer, entry, block, self.view.sequence.n_k)

    # --- one key after the other ----------------------------------------------------------------

    def _singly(self, scores: Memory, position: Memory, count: Value) -> None:
        tile, key = self.view.tile, self._key
        with T.serial(count) as slot:
            place = T.bind(load(position, slot))
            vectors = [
                T.bind(load(scores, self._at(slot, v), lanes=tile.width))
                for v in range(tile.vectors)
            ]

            def spread(group: Callable[[Value], Value], share: Value | None) -> None:
                states = []
                for x in vectors:
                    scaled = x if share is None else T.bind(x * broadcast(share, tile.width))
                    states.append(self._reducer.lift(scaled))
                self._spread(states, group)

            if isinstance(key, BlockOf):
                low, high = blocks_of(key, place)
                with T.serial(high - low + 1) as n:
                    block = T.bind(low + n)
                    spread(lambda _: block, self._share(place, block))
            else:
                env = Env(key=place)
                spread(lambda t: T.bind(emit(key, replace(env, query=self.view.i_min + t))), None)

    # --- lanes ----------------------------------------------------------------------------------

    def _spread(self, states: list[State], group: Callable[[Value], Value]) -> None:
        """Add one state per vector to the group of each token."""
        tile, width, heads = self.view.tile, self.view.tile.width, self.view.tile.heads
        zero = const(0, "int32")
        if self.facts.merges_tokens and not self.facts.per_head(tile):
            total = self._reducer.across(self._reducer.all(states))
            self.into.add(self.row(zero, zero), group(zero), total)
            return
        lanes = Cells.allocate(self._reducer, tile.vectors, width)
        for v, state in enumerate(states):
            lanes.put(const(v, "int32"), state)
        if heads % width == 0 and not self.facts.per_head(tile):
            step = heads // width
            with T.serial(self.view.present) as t:
                parts = [lanes.get(t * step + v) for v in range(step)]
                total = self._reducer.across(self._reducer.all(parts))
                self.into.add(self.row(t, zero), group(t), total)
            return
        scalars = Cells(self._reducer, lanes.planes, 1)
        self._rows(scalars, lambda t, row, state: self.into.add(row, group(t), state))

    def _rows(self, lanes: Cells, add: Callable[[Value, Value, State], None]) -> None:
        """Reduce the states of the lanes of each row, and hand over token, row and state."""
        heads, zero = self.view.tile.heads, const(0, "int32")
        present = self.view.present
        if self.facts.merges_tokens:
            with T.serial(heads) as h:
                total = self._sum(lanes, present, lambda t: t * heads + h)
                add(zero, self.row(zero, h), total)
        elif heads == 1 or self.facts.per_head(self.view.tile):
            with T.serial(present * heads) as r:
                t, h = T.bind(r // heads), T.bind(r % heads)
                add(t, T.bind(self.row(t, h)), lanes.get(r))
        else:
            with T.serial(present) as t:
                total = self._sum(lanes, const(heads, "int32"), lambda h: t * heads + h)
                add(t, T.bind(self.row(t, zero)), total)

    def _sum(self, lanes: Cells, count: Value, lane: Callable[[Value], Value]) -> State:
        """Reduce `count` lanes."""
        zero = const(0, "int32")
        total = Cells.allocate(self._reducer, 1, lanes.lanes)
        total.put(zero, self._reducer.empty(lanes.lanes))
        with T.serial(count) as n:
            total.add(zero, lanes.get(lane(n)))
        return total.get(zero)


def share_of(
    key: Expr, reducer: Reducer, entry: Value, block: Value, length: Value
) -> Value | None:
    """Return the weight (float32) of an entry in a block that it overlaps; None where it is 1.

    Args:
        length: of the axis that entries cover, int32.
    """
    if reducer.how != "sum" or not isinstance(key, BlockOf):
        return None
    start = entry * key.axis.stride
    stop = minimum(minimum(start + key.axis.width, length), (block + 1) * key.width)
    overlap = T.bind(cast(stop - maximum(start, block * key.width), "float32"))
    return T.bind(overlap * const(1.0 / key.axis.stride, "float32"))


def blocks_of(key: BlockOf, entry: Value) -> tuple[Value, Value]:
    """Return the first and the last block (int32) that an entry overlaps."""
    start = entry * key.axis.stride
    last = start + (key.axis.width - 1)
    return stream.pin(start // key.width), stream.pin(last // key.width)
