"""Score one tile of rows against the keys it sees, and add the scores to rows of groups.

A thread or a warp owns each group of a chunk and reduces what belongs to it in a fixed order, so
nothing is added atomically and repeats are bitwise equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.reduction import ABSENT
from sparsegen.codegen.cpu.scatter import blocks_of, share_of
from sparsegen.codegen.cpu.select_task import granule, is_slash, weakened
from sparsegen.codegen.cpu.stream import Bounds, cell, get, pin, put
from sparsegen.codegen.cpu.vec import load_f32
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.gpu import mma
from sparsegen.codegen.gpu.block import divided
from sparsegen.codegen.gpu.groups import Groups, gather, reducer_of, weight
from sparsegen.codegen.gpu.launch import sync
from sparsegen.codegen.gpu.view import ThreadView
from sparsegen.codegen.gpu.walk import walk
from sparsegen.codegen.selecting import Item
from sparsegen.codegen.tvm import (
    T,
    Value,
    cast,
    const,
    equal,
    load,
    maximum,
    minimum,
    select,
    store,
)
from sparsegen.ir.expr import TRUE, BlockOf
from sparsegen.lowering.tasks import Clause, Rows

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.select import SelectKernel


@dataclass(frozen=True)
class Cells:
    """The groups of the keys of a chunk: `count` of them from `low` on (int32).

    lanes    threads that share a group
    slots    given a group, the slots of the chunk that may belong to it: the first, and how many
    """

    low: Value
    count: Value
    lanes: int
    slots: Callable[[Value], tuple[Value, Value | int]]


class SelectPass:
    """The work of one tile."""

    def __init__(
        self,
        kernel: SelectKernel,
        item: Item,
        *,
        first: Value,
        count: Value,
        part: Value,
        into: Groups,
    ) -> None:
        """Describe `count` queries from position `first` on (int32), and part `part` of the heads.

        Args:
            into: groups of the first stage.
        """
        self.kernel, self.task, self.facts = kernel, kernel.task, kernel.facts
        self.item, self.sequence, self.into = item, item.sequence, into
        self.first, self.count, self.part = first, count, part
        self.heads, self.pitch = kernel.shape.heads, kernel.shape.pitch
        self.block, self.scores, self.position = kernel.block, kernel.scores, kernel.position
        self.head = T.bind(item.group * self.facts.heads + part * self.heads)
        self.view = ThreadView(self.task, kernel.arguments, item.sequence, first, count)
        self.key = self.facts.stages[0].keys[-1]

    def run(self) -> None:
        """Add every visible score to its group."""
        task, kernel = self.task, self.kernel
        sync()
        kernel.engine.load_queries(self._query)
        if task.weights is not None:
            self._fetch_weights()
        if task.norm:
            with self.block.each(const(kernel.shape.rows, "int32")) as r:
                store(kernel.tops, const(ABSENT, "float32"), r)
                store(kernel.totals, const(0.0, "float32"), r)
        mma.copies_started()
        mma.copies_done()
        sync()
        if task.norm:
            for clause in task.clauses:
                self._walk(clause, self._measure)
            self._settle()
        for clause in task.clauses:
            self._walk(clause, self._add)

    # --- operands -------------------------------------------------------------------------------

    def _row(self, rows: Rows, token: Value) -> Value:
        """Return the row of a query of the tile in a buffer with rows like those of the queries."""
        position = self.first + token
        if rows.space == "entry":
            position = position - self.sequence.q_off // self.kernel.stride
        return T.bind(self.sequence.row(rows, T.bind(position)))

    def _query(self, r: Value, rows: Rows) -> tuple[Value, Value, Value]:
        there = r < self.count * self.heads
        token = T.bind(minimum(r // self.heads, self.count - 1))
        return there, self._row(rows, token), self.head + r % self.heads

    def _fetch_weights(self) -> None:
        buffer = self.task.weights
        assert buffer is not None
        flat = self.kernel.arguments[buffer].flat
        with self.block.each(self.count * self.heads) as r:
            row = self._row(buffer.rows, T.bind(cast(r // self.heads, "int32")))
            head = cast(self.head, "int64") + r % self.heads
            x = load_f32(flat, buffer.dtype, T.bind(row * self.task.q.heads + head))
            store(self.kernel.factors, x, r)

    # --- keys -----------------------------------------------------------------------------------

    def _walk(self, clause: Clause, body: Callable[[Clause, Bounds, Value, Value], None]) -> None:
        """Visit the chunks of a clause, unless no query of the tile asks for any."""
        asked = weakened(clause.residual)
        if asked == TRUE:
            self._visit(clause, body)
            return
        found, thread = cell("int32", const(0, "int32")), T.bind(self.block.thread)
        with T.If(thread < self.count), T.Then():
            env = self.view._env(query=T.bind(self.first + thread))
            put(found, cast(emit(self.view._closed(asked, {}), env), "int32"))
        some = cell("int32", const(0, "int32"))
        put(some, cast(T.cuda.syncthreads_or(get(found)), "int32"))
        with T.If(get(some) > 0), T.Then():
            self._visit(clause, body)

    def _visit(self, clause: Clause, body: Callable[[Clause, Bounds, Value, Value], None]) -> None:
        kernel = self.kernel
        key_head = T.bind(self.head // self.task.group)

        def key(n: Value, rows: Rows) -> tuple[Value, Value, Value]:
            j = T.bind(load(self.position, n))
            row = self.sequence.row(rows, T.bind(maximum(j, const(0, "int32"))))
            return j >= 0, T.bind(row), key_head

        def chunk(bounds: Bounds, first: Value, count: Value) -> None:
            kernel.engine.load_keys(key)
            mma.copies_started()
            mma.copies_done()
            sync()
            kernel.engine.multiply(self.scores)
            sync()
            body(clause, bounds, first, count)

        walk(
            self.view, clause, self.task.k.rows, self.head, self.position, kernel.shape.keys,
            T.bind(self.block.thread), kernel.shape.threads, chunk,
        )  # fmt: skip

    # --- scores ---------------------------------------------------------------------------------

    def _score(self, clause: Clause, bounds: Bounds, r: Value, slot: Value) -> Value:
        """Return the score of a row and a slot (int32); -inf where the row does not see the key."""
        task, view = self.task, self.view
        query, head = T.bind(self.first + r // self.heads), T.bind(self.head + r % self.heads)
        j = T.bind(load(self.position, slot))
        found = cell("float32", const(ABSENT, "float32"))
        with T.If(j >= 0), T.Then():
            seen = cell("int32", const(1, "int32"))
            if clause.residual != TRUE:
                sure = T.And(j >= bounds.sure_lo, j < bounds.sure_hi)
                with T.If(T.Not(sure)), T.Then():
                    put(seen, cast(view.value(clause.residual, query, head, j), "int32"))
            with T.If(get(seen) > 0), T.Then():
                x = T.bind(load(self.scores, r * self.pitch + slot))
                if task.scale != 1:
                    x = T.bind(x * const(task.scale, "float32"))
                for fn in (task.mod, task.act):
                    if fn is not None:
                        x = view.number(fn, query, head, j, x)
                if task.weights is not None:
                    x = x * load(self.kernel.factors, r)
                put(found, x)
        return T.bind(get(found))

    def _weight(self, clause: Clause, bounds: Bounds, r: Value, slot: Value) -> Value:
        """Return the score, or its share of the row where scores are normalised."""
        x = self._score(clause, bounds, r, slot)
        if not self.task.norm:
            return x
        absent = const(ABSENT, "float32")
        top, rate = T.bind(load(self.kernel.tops, r)), load(self.kernel.totals, r)
        return T.bind(select(equal(x, absent), absent, weight(x, top) * rate))

    def _measure(self, clause: Clause, bounds: Bounds, first: Value, count: Value) -> None:
        """Take the scores of a chunk into the maximum and the sum of each row, a warp a row."""
        kernel, lane = self.kernel, self.block.place.lane
        reducer = reducer_of("lse")
        with self.block.each(self.count * self.heads, lanes=32) as wide:
            r = T.bind(cast(wide, "int32"))
            state = gather(reducer, count, lambda n: self._score(clause, bounds, r, n), lane, 32)
            with T.If(equal(lane, const(0, "int32"))), T.Then():
                old = load(kernel.tops, r), load(kernel.totals, r)
                top, total = tuple(map(T.bind, reducer.combine(old, state)))
                store(kernel.tops, top, r)
                store(kernel.totals, total, r)

    def _settle(self) -> None:
        """Make rates of the sums; a row with an infinite score has no answer."""
        kernel, inf = self.kernel, const(float("inf"), "float32")
        with self.block.each(self.count * self.heads) as r:
            top, total = T.bind(load(kernel.tops, r)), load(kernel.totals, r)
            total = T.bind(select(equal(top, inf), top - top, total))
            store(kernel.totals, const(1.0, "float32") / total, r)
        sync()

    # --- groups ---------------------------------------------------------------------------------

    def _add(self, clause: Clause, bounds: Bounds, first: Value, count: Value) -> None:
        """Add the scores of a chunk to their groups."""
        start = T.bind(bounds.lo + first)
        listed = clause.keys is not None
        single = not isinstance(self.key, BlockOf) and granule(self.key) == (1, 0)
        if listed and not single:
            self._singly(clause, bounds, count)
            return
        cells = self._cells(start, count)
        head_groups = self.heads if self.facts.head_step == 1 else 1
        lane = T.bind(self.block.thread % cells.lanes)
        number = self.kernel.slots() * head_groups * cells.count
        with self.block.each(number, lanes=cells.lanes) as wide:
            n = T.bind(cast(wide, "int32"))
            slot, part = divided(n, cells.count)
            group = T.bind(cells.low + part)
            begin, size = cells.slots(group)
            to: Value = group
            if listed:
                begin, size, to = part, 1, T.bind(load(self.position, part))
            row, tokens, head = self._members(slot, head_groups)
            heads = self.heads // head_groups
            elements = pin((tokens[1] - tokens[0]) * heads * size)

            def element(m: Value) -> Value:
                which, at = m, begin
                if not isinstance(size, int):
                    which, at = divided(m, size)
                    at = T.bind(begin + at)
                token = T.bind(tokens[0] + which // heads)
                r = T.bind(token * self.heads + head + which % heads)
                if is_slash(self.key):
                    return self._on_slash(clause, bounds, r, token, group, start, count)
                x = self._weight(clause, bounds, r, at)
                share = self._share(T.bind(start + at), group)
                return x if share is None else T.bind(x * share)

            state = gather(self.into.reducer, elements, element, lane, cells.lanes)
            with T.If(equal(lane, const(0, "int32"))), T.Then():
                self.into.add(row, to, state)

    def _cells(self, start: Value, count: Value) -> Cells:
        """Return the groups of the keys from `start` on (int32), `count` of them."""
        key, stop = self.key, T.bind(start + count)

        def within(begin: Value, end: Value) -> tuple[Value, Value]:
            low = pin(maximum(begin, start) - start)
            return low, pin(maximum(minimum(end, stop) - start - low, const(0, "int32")))

        if is_slash(key):
            low = T.bind(self.first - (stop - 1))
            return Cells(low, pin(count + self.count - 1), 1, lambda _: (low, 1))
        if isinstance(key, BlockOf):
            entries, wide = key.axis, key.width
            low, high = blocks_of(key, start)[0], blocks_of(key, T.bind(stop - 1))[1]

            def overlapping(group: Value) -> tuple[Value, Value]:
                begin = (group * wide - entries.width) // entries.stride + 1
                return within(begin, (group * wide + (wide + entries.stride - 1)) // entries.stride)

            return Cells(low, pin(high - low + 1), 32, overlapping)
        found = granule(key)
        assert found is not None
        n, c = found
        if found == (1, 0):
            return Cells(start, pin(count), 1, lambda group: (T.bind(group - start), 1))
        low, high = pin((start + c) // n), pin((stop - 1 + c) // n)
        return Cells(low, pin(high - low + 1), 32, lambda g: within(g * n - c, (g + 1) * n - c))

    def _members(self, slot: Value, head_groups: int) -> tuple[Value, tuple[Value, Value], Value]:
        """Return a row of `into`, the queries of the tile that add to it, and their first head.

        Args:
            slot: of the queries' groups and of the heads' groups together.
        """
        facts, zero = self.facts, const(0, "int32")
        queries, head = T.bind(slot // head_groups), T.bind(slot % head_groups)
        if not facts.inner:
            tokens = (zero, self.count)
        elif facts.inner == 1:
            tokens = (queries, minimum(queries + 1, self.count))
        else:
            begin = pin((self.first // facts.inner + queries) * facts.inner - self.first)
            tokens = (maximum(begin, zero), minimum(begin + facts.inner, self.count))
        low = pin(tokens[0])
        high = pin(maximum(tokens[1], low))
        own = (self.part * self.heads + head) // facts.head_step
        return T.bind(queries * facts.head_rows + own), (low, high), head

    def _on_slash(
        self, clause: Clause, bounds: Bounds, r: Value, token: Value, distance: Value,
        start: Value, count: Value,
    ) -> Value:  # fmt: skip
        """Return the score of a row at a distance, -inf where the chunk does not have it."""
        at = T.bind(self.first + token - distance - start)
        found = cell("float32", const(ABSENT, "float32"))
        with T.If(T.And(at >= 0, at < count)), T.Then():
            put(found, self._weight(clause, bounds, r, at))
        return T.bind(get(found))

    def _share(self, entry: Value, block: Value) -> Value | None:
        return share_of(self.key, self.into.reducer, entry, block, self.sequence.n_k)

    def _singly(self, clause: Clause, bounds: Bounds, count: Value) -> None:
        """Add the keys of a list one by one, a thread for each row of groups."""
        reducer, key = self.into.reducer, self.key
        head_groups = self.heads if self.facts.head_step == 1 else 1
        heads = self.heads // head_groups
        with self.block.each(const(self.kernel.slots() * head_groups, "int32")) as wide:
            row, tokens, head = self._members(T.bind(cast(wide, "int32")), head_groups)
            with T.serial(count) as slot, T.serial((tokens[1] - tokens[0]) * heads) as m:
                token = T.bind(tokens[0] + m // heads)
                r = T.bind(token * self.heads + head + m % heads)
                j = T.bind(load(self.position, slot))
                x = self._weight(clause, bounds, r, slot)
                with T.If(T.Not(equal(x, const(ABSENT, "float32")))), T.Then():
                    if isinstance(key, BlockOf):
                        low, high = blocks_of(key, j)
                        with T.serial(high - low + 1) as b:
                            block = T.bind(low + b)
                            share = self._share(j, block)
                            scaled = x if share is None else T.bind(x * share)
                            self.into.add(row, block, reducer.lift(scaled))
                    else:
                        query = T.bind(self.first + token)
                        group = T.bind(emit(key, Env(query=query, key=j)))
                        self.into.add(row, group, reducer.lift(x))
