"""Score one tile of rows against the keys it sees, and add the scores to rows of groups.

Scores of a chunk of keys lie in memory as [key][lane]. How they are added depends on the key of the
group: whole positions go vector by vector to the rows, blocks are reduced lane by lane before
anything crosses lanes, and all others are added one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu import attention, stream, vec
from sparsegen.codegen.cpu.attention import Blocking, Slots
from sparsegen.codegen.cpu.feed import Feed
from sparsegen.codegen.cpu.reduction import ABSENT, Rows, weight
from sparsegen.codegen.cpu.rows import Sequence
from sparsegen.codegen.cpu.scatter import Scatter
from sparsegen.codegen.cpu.select_task import weakened
from sparsegen.codegen.cpu.stream import Bounds, Chunk, Items, cell, get, put
from sparsegen.codegen.cpu.tile import Lanes, Tile, load_queries
from sparsegen.codegen.cpu.view import Rule, View
from sparsegen.codegen.exprs import emit
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    broadcast,
    cast,
    const,
    dtype_of,
    equal,
    load,
    maximum,
    select,
    store,
    workspace,
)
from sparsegen.ir.expr import TRUE, Member, walk
from sparsegen.lowering.tasks import Clause

if TYPE_CHECKING:
    from sparsegen.codegen.cpu.select import SelectKernel


@dataclass(frozen=True)
class Panel:
    """Scores [key][lane] of a chunk."""

    tile: Tile
    blocking: Blocking
    weights: Memory


# Handles the scores of a chunk: panel, number of keys.
Sink = Callable[[Panel, Value], None]


class SelectPass(View):
    """The work of one tile."""

    def __init__(
        self,
        kernel: SelectKernel,
        sequence: Sequence,
        *,
        first: Value,
        count: Value,
        head: Value,
        into: Rows,
        row: Callable[[Value, Value], Value],
    ) -> None:
        """Describe `count` tokens from position `first` on, from query head `head` on (int32).

        Args:
            into: groups of the first stage.
            row: of `into`, for a token of the tile and a head of the tile.
        """
        self.kernel, self.task = kernel, kernel.task
        rows = self.task.q.rows
        local = first - sequence.q_off // rows.entries.stride if rows.entries is not None else first
        lanes = Lanes.fill(kernel.tile, sequence.row(rows, local), head, first, count)
        super().__init__(
            kernel.arguments,
            kernel.tables,
            kernel.lists,
            sequence,
            lanes,
            head=head,
            i_min=first,
            present=count,
            hidden=ABSENT,
        )
        self.scatter = Scatter(self, kernel.facts, into, row)

    def run(self) -> None:
        """Add every visible score to its group."""
        task, blocking = self.task, self.kernel.blocking
        self.queries = load_queries(self.lanes, [self._column(p) for p in task.q.parts])
        self.factors = self._weights()
        merged = any(self._merges(c) for c in task.clauses)
        self.chunk = Chunk.allocate(blocking.chunk, blocking.keys, members=merged)
        key_head = T.bind(cast(self.head // task.group, "int64"))
        self.feed = Feed(
            self.arguments, self.sequence, self.chunk, key_head, self.tile.width, copy=False
        )
        self.feed.prepare((task.k,))
        if task.norm:
            self._normalised()
            return
        panel = self._panel(T.alloc_buffer((blocking.chunk * self.tile.lanes,), "float32"))
        for clause in task.clauses:

            def body(count: Value, masked: Value, clause: Clause = clause) -> None:
                self._score(panel, clause, count, masked)
                self._hide(panel, count, self._whole(count))
                self.scatter.add(panel.weights, self.chunk.position, count, clause.keys is None)

            self._walk(clause, body)

    def _panel(self, memory: Memory) -> Panel:
        return Panel(self.tile, self.kernel.blocking, memory)

    def _whole(self, count: Value) -> Value:
        """Return `count` rounded up to whole vectors."""
        width = self.tile.width
        return (count + (width - 1)) // width * width

    def _hide(self, panel: Panel, first: Value, stop: Value) -> None:
        """Make the slots from `first` up to `stop` invisible."""
        width = self.tile.width
        with T.serial(stop - first) as n:
            for v in range(self.tile.vectors):
                absent = const(ABSENT, "float32", width)
                store(panel.weights, absent, (first + n) * self.tile.lanes + v * width)

    # --- keys -----------------------------------------------------------------------------------

    def _walk(self, clause: Clause, body: stream.Body) -> None:
        """Visit the keys of a clause, unless no token of the tile asks for any."""
        asked = weakened(clause.residual)
        if asked == TRUE:
            self._visit(clause, body)
            return
        found = cell("int32", const(0, "int32"))
        with T.serial(self.present) as t:
            env = self._env(query=T.bind(self.i_min + t))
            with T.If(emit(self._closed(asked, {}), env)), T.Then():
                put(found, const(1, "int32"))
        with T.If(get(found) > 0), T.Then():
            self._visit(clause, body)

    def _visit(self, clause: Clause, body: stream.Body) -> None:
        bounds = self._limits(clause)
        keys = clause.keys
        if keys is None:
            stream.walk_range(self.chunk, bounds, body)
            return
        found = self._find(keys.member)
        items = Items(
            item=found.item,
            begin=const(0, "int32"),
            end=found.width,
            granule=keys.granule,
            shift=keys.shift,
            slash=(lambda t: self.i_min + t) if keys.slash else None,
        )
        if self._merges(clause) or keys.slash:
            stream.walk_merged(self.chunk, bounds, items, self.tile.tokens, self.present, body)
        else:
            stream.walk_list(self.chunk, bounds, items, body)

    def _limits(self, clause: Clause) -> Bounds:
        length = T.bind(self.sequence.count(self.task.k.rows))
        return self._hull(clause, length, self.symbols["i_min"], self.symbols["i_max"])

    # --- scores ---------------------------------------------------------------------------------

    def _weights(self) -> Memory | None:
        """Return the weight of each lane."""
        buffer = self.task.weights
        if buffer is None:
            return None
        memory = T.alloc_buffer((self.tile.rows,), "float32")
        flat = self.arguments[buffer].flat
        with T.serial(self.tile.rows) as r:
            at = self.lanes.element(r, self.task.q.heads, 1)
            store(memory, vec.load_f32(flat, buffer.dtype, at), r)
        return memory

    def _score(self, panel: Panel, clause: Clause, count: Value, masked: Value) -> None:
        """Write the scores of the chunk at hand; -inf where a row does not see a key."""
        zero = const(0, "int32")
        slots = Slots(zero, count)
        self.feed.load(count)
        attention.scores(panel, self.queries, self.feed.segments(self.task.k), zero, slots)
        rule = self._pointwise()
        if rule is not None:
            attention.rewrite(panel, slots, rule)
        looked_up = {e: self._find(e) for e in walk(clause.residual) if isinstance(e, Member)}
        visible = self._visibility(clause, self.chunk, looked_up, count, masked)
        if visible is not None:
            with T.If(masked), T.Then():
                attention.rewrite(panel, slots, visible(zero))
        if self.tile.tokens > 1 and self.kernel.facts.merges_tokens:
            with T.If(self.present < self.tile.tokens), T.Then():
                attention.rewrite(panel, slots, self._present)

    def _present(self, slot: Value, v: int, score: Value) -> Value:
        width = self.tile.width
        valid = load(self.lanes.valid, v * width, lanes=width)
        absent = const(ABSENT, "float32", width)
        return select(valid > const(0, "int32", width), score, absent)

    def _pointwise(self) -> Rule | None:
        """Return what becomes of q . k: scale, mod, act and weights."""
        task, width = self.task, self.tile.width
        if task.scale == 1 and task.mod is None and task.act is None and self.factors is None:
            return None

        def rule(slot: Value, v: int, score: Value) -> Value:
            if task.scale != 1:
                score = T.bind(score * const(task.scale, "float32", width))
            for fn in (task.mod, task.act):
                if fn is not None:
                    env = self._leaves(self.chunk, const(0, "int32"), slot, v)
                    self.symbols["s"] = score
                    result = broadcast(emit(self._closed(fn, {}), env), width)
                    score = T.bind(
                        result if dtype_of(result) == "float32" else cast(result, "float32")
                    )
            if self.factors is not None:
                score = score * load(self.factors, v * width, lanes=width)
            return score

        return rule

    # --- softmax over the keys ------------------------------------------------------------------

    @contextmanager
    def _storage(self) -> Iterator[tuple[Memory, Memory]]:
        """Take memory for all scores of the tile, and for their positions."""
        clauses, tile = self.task.clauses, self.tile
        # Ranges are disjoint; lists may repeat what others have.
        most = sum(c.keys is not None for c in clauses) + any(c.keys is None for c in clauses)
        length = cast(self.sequence.count(self.task.k.rows), "int64")
        slots = T.bind(length * most + (len(clauses) * tile.width + self.chunk.size))
        with (
            workspace(slots * tile.lanes, "float32") as memory,
            workspace(slots, "int32") as position,
        ):
            yield memory, position

    def _normalised(self) -> None:
        tile, blocking = self.tile, self.kernel.blocking
        with self._storage() as (memory, position):
            total = cell("int32", const(0, "int32"))
            parts = []
            for clause in self.task.clauses:
                start, count = cell("int32", get(total)), cell("int32", const(0, "int32"))
                parts.append((clause, start, count))

                def body(
                    keys: Value, masked: Value, clause: Clause = clause, count: Memory = count
                ) -> None:
                    at = stream.pin(cast(get(total), "int64"))
                    size = blocking.chunk * tile.lanes
                    panel = self._panel(view(memory, at * tile.lanes, size, "float32"))
                    self._score(panel, clause, keys, masked)
                    with T.serial(keys) as n:
                        store(position, load(self.chunk.position, n), at + n)
                    self._hide(panel, keys, self._whole(keys))
                    put(total, get(total) + keys)
                    put(count, get(count) + keys)

                self._walk(clause, body)
                put(total, self._whole(get(total)))
            self._softmax(memory, get(total))
            for clause, start, count in parts:
                first, keys = stream.pin(cast(get(start), "int64")), stream.pin(get(count))
                size = cast(self._whole(keys), "int64")
                scores = view(memory, first * tile.lanes, size * tile.lanes, "float32")
                places = view(position, first, size, "int32")
                with T.If(keys > 0), T.Then():
                    self.scatter.add(scores, places, keys, clause.keys is None)

    def _softmax(self, memory: Memory, slots: Value) -> None:
        """Normalise every lane over its visible scores; hidden ones stay -inf."""
        tile, width = self.tile, self.tile.width
        absent = const(ABSENT, "float32", width)
        for v in range(tile.vectors):
            peak, total = vec.accumulators(2, width)

            def at(slot: Value, v: int = v) -> Value:
                return cast(slot, "int64") * tile.lanes + v * width

            store(peak, absent, 0)
            store(total, const(0.0, "float32", width), 0)
            with T.serial(slots) as slot:
                x = load(memory, at(slot), lanes=width)
                store(peak, maximum(load(peak, 0, lanes=width), x), 0)
            top = T.bind(load(peak, 0, lanes=width))
            with T.serial(slots) as slot:
                x = T.bind(load(memory, at(slot), lanes=width))
                p = T.bind(weight(x, top, self.kernel.arch))
                store(total, load(total, 0, lanes=width) + p, 0)
                store(memory, select(equal(x, absent), absent, p), at(slot))
            rate = T.bind(const(1.0, "float32", width) / load(total, 0, lanes=width))
            with T.serial(slots) as slot:
                x = T.bind(load(memory, at(slot), lanes=width))
                store(memory, select(equal(x, absent), absent, x * rate), at(slot))


def view(memory: Memory, first: Value, size: Value | int, dtype: str) -> Memory:
    """Return `size` elements of a flat buffer from `first` (int64) on as a buffer of their own."""
    return T.decl_buffer((size,), dtype, data=memory.data, elem_offset=first)
