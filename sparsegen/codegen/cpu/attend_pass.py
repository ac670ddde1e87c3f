"""Walk the keys of one tile: which keys, who sees them, scores, online softmax, values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu import attention, stream
from sparsegen.codegen.cpu.attention import HIDDEN, State
from sparsegen.codegen.cpu.feed import Feed
from sparsegen.codegen.cpu.lists import TokenLists, mentions, shared
from sparsegen.codegen.cpu.rows import (
    Sequence,
    read_table,
)
from sparsegen.codegen.cpu.stream import Bounds, Chunk, Items
from sparsegen.codegen.cpu.tile import Column, Lanes, load_queries, store_outputs
from sparsegen.codegen.cpu.vec import widened
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    broadcast,
    cast,
    const,
    gather,
    load,
    maximum,
    minimum,
    select,
    store,
)
from sparsegen.ir.axes import Entries
from sparsegen.ir.expr import (
    TRUE,
    Expr,
    Member,
    Pos,
    Stop,
    Symbol,
    Table,
    rebuild,
    walk,
)
from sparsegen.lowering.tasks import Clause, Interval, KeySource, Part, Rows

if TYPE_CHECKING:
    from sparsegen.codegen.cpu.attend import AttendKernel


class Pass:
    """The work of one tile: its lanes, and the leaves of expressions."""

    def __init__(
        self,
        kernel: AttendKernel,
        sequence: Sequence,
        first: Value,
        head: Value,
        piece: Value | None,
        pieces: Value | None,
    ) -> None:
        self.kernel, self.task, self.tile = kernel, kernel.task, kernel.tile
        self.sequence, self.head = sequence, head
        self.piece, self.pieces = piece, pieces
        self.present = T.bind(minimum(const(self.tile.tokens, "int32"), sequence.n_q - first))
        self.i_min = T.bind(sequence.q_off + first)
        row = T.bind(sequence.q_start + cast(first, "int64"))
        self.lanes = Lanes.fill(self.tile, row, head, self.i_min, self.present)
        self.names: dict[Expr, str] = {}
        self.symbols: dict[str, Value] = {
            "i_min": self.i_min,
            "i_max": T.bind(self.i_min + self.present - 1),
        }

    # --- expressions ----------------------------------------------------------------------------

    def _closed(self, expr: Expr, found: dict[Expr, Value]) -> Expr:
        """Name the stops, and the selections in `found`, so that `emit` sees symbols only."""

        def rule(e: Expr) -> Expr | None:
            if isinstance(e, Stop):
                return self._named(e, self._stop(e))
            if e in found:
                return self._named(e, found[e])
            return None

        return rebuild(expr, rule)

    def _named(self, expr: Expr, value: Value) -> Symbol:
        name = self.names.setdefault(expr, f"value {len(self.names)}")
        self.symbols[name] = value
        return Symbol(name)

    def _stop(self, stop: Stop) -> Value:
        if stop.role == "query":
            return self.sequence.q_off + self.sequence.n_q
        if isinstance(stop.axis, Entries):
            return self.sequence.count(Rows(space="entry", entries=stop.axis))
        return self.sequence.n_k

    def _env(self, **leaves: Value) -> Env:
        return Env(symbols=self.symbols, table=self._table, **leaves)

    def _table(self, table: Table, index: tuple[Value, ...]) -> Value:
        buffer = self.kernel.tables[table.tensor.name]
        return read_table(self.kernel.arguments, buffer, self.sequence, index)

    def _bounds(self, clause: Clause, keys: Value) -> Bounds:
        """Return the hull and the sure keys of a clause, inside [0, keys)."""

        def ends(interval: Interval) -> tuple[Value, Value]:
            lo, hi = const(0, "int32"), keys
            for e in interval.lo:
                lo = maximum(lo, emit(self._closed(e, {}), self._env()))
            for e in interval.hi:
                hi = minimum(hi, emit(self._closed(e, {}), self._env()))
            return T.bind(lo), T.bind(hi)

        lo, hi = ends(clause.hull)
        nothing = (const(0, "int32"), const(-1, "int32"))
        sure_lo, sure_hi = nothing if clause.full is None else ends(clause.full)
        if self.piece is not None and clause.keys is None:
            span = maximum(hi - lo, const(0, "int32"))
            cut = self._cut(span)
            lo, hi = T.bind(lo + cut[0]), T.bind(lo + cut[1])
        return Bounds(lo, hi, sure_lo, sure_hi)

    def _cut(self, size: Value) -> tuple[Value, Value]:
        """Return the ends of this piece of `size` things."""
        if self.piece is None:
            return const(0, "int32"), size
        wide = cast(size, "int64")
        ends = (wide * (self.piece + n) // cast(self.pieces, "int64") for n in (0, 1))
        begin, end = (T.bind(cast(e, "int32")) for e in ends)
        return begin, end

    # --- the loop over keys ---------------------------------------------------------------------

    def run(self) -> State:
        """Attend to every key of this piece and return the state."""
        task, plan = self.task, self.kernel.plan
        queries = load_queries(self.lanes, [self._column(p) for p in task.q.parts])
        state = State.start(self.tile, plan.blocking, self.kernel.dim)
        for source in task.sources:
            per_token = any(self._merges(c) for c in source.clauses)
            chunk = Chunk.allocate(plan.blocking.chunk, plan.blocking.keys, members=per_token)
            key_head = T.bind(cast(self.head // task.group, "int64"))
            feed = Feed(
                self.kernel.arguments, self.sequence, chunk, key_head, self.tile.width, plan.copy
            )
            feed.prepare((source.k, source.v))
            for clause in source.clauses:
                self._walk(clause, source, chunk, feed, state, queries)
        return state

    def _merges(self, clause: Clause) -> bool:
        keys = clause.keys
        if keys is None or self.tile.tokens == 1:
            return False
        return keys.slash or not shared(self.kernel.lists[keys.member])

    def _column(self, part: Part) -> Column:
        heads, dim = part.buffer.shape[-2:]

        def offset(head: Value) -> Value:
            return (cast(head, "int64") * dim if heads > 1 else const(0, "int64")) + part.start

        flat = self.kernel.arguments[part.buffer].flat
        return Column(flat, part.buffer.dtype, heads * dim, part.size, offset, part.fn)

    def _walk(
        self,
        clause: Clause,
        source: KeySource,
        chunk: Chunk,
        feed: Feed,
        state: State,
        queries: Memory,
    ) -> None:
        bounds = self._bounds(clause, self.sequence.count(source.k.rows))
        merged = self._merges(clause)
        looked_up = {e: self._find(e) for e in walk(clause.residual) if isinstance(e, Member)}

        def body(count: Value, masked: Value) -> None:
            self._attend(clause, source, chunk, feed, state, queries, looked_up, count, masked)

        if clause.keys is None:
            stream.walk_range(chunk, bounds, body)
            return
        found = self._find(clause.keys.member)
        begin, end = self._cut(found.width)
        items = Items(
            item=found.item,
            begin=begin,
            end=end,
            granule=clause.keys.granule,
            shift=clause.keys.shift,
            slash=(lambda t: self.i_min + t) if clause.keys.slash else None,
        )
        if merged or clause.keys.slash:
            stream.walk_merged(chunk, bounds, items, self.tile.tokens, self.present, body)
        else:
            stream.walk_list(chunk, bounds, items, body)

    def _find(self, member: Member) -> TokenLists:
        return TokenLists.find(
            member, self.kernel.lists[member], self.kernel.arguments, self.sequence,
            self._env(head=self.head), self.i_min, self.tile.tokens, self.present,
        )  # fmt: skip

    def _attend(
        self,
        clause: Clause,
        source: KeySource,
        chunk: Chunk,
        feed: Feed,
        state: State,
        queries: Memory,
        looked_up: dict[Member, TokenLists],
        count: Value,
        masked: Value,
    ) -> None:
        """Attend to one chunk of keys."""
        feed.load(count)
        keys, values = feed.segments(source.k), feed.segments(source.v)
        visible = self._visibility(clause, chunk, looked_up, count, masked)
        with T.serial(self.tile.subtiles) as sub:
            attention.scores(state, queries, keys, sub, count)
            if self.kernel.scaled:
                attention.rewrite(state, count, self._mod(chunk, sub))
            if visible is not None:
                with T.If(masked), T.Then():
                    attention.rewrite(state, count, visible(sub))
            factors = attention.softmax(state, sub, count, self.kernel.rate, self.kernel.arch)
            attention.values(state, values, factors, sub, count)

    def _leaves(self, chunk: Chunk, sub: Value, slot: Value, v: int) -> Env:
        at, width = sub * self.tile.lanes + v * self.tile.width, self.tile.width
        return self._env(
            query=T.bind(load(self.lanes.position, at, lanes=width)),
            head=T.bind(load(self.lanes.head, at, lanes=width)),
            key=T.bind(load(chunk.position, slot)),
        )

    def _mod(self, chunk: Chunk, sub: Value) -> Callable[[Value, int, Value], Value]:
        width, task = self.tile.width, self.task

        def rule(slot: Value, v: int, score: Value) -> Value:
            score = T.bind(score * const(task.scale, "float32", width))
            if task.mod is None:
                return score
            env = self._leaves(chunk, sub, slot, v)
            self.symbols["s"] = score
            result = broadcast(emit(self._closed(task.mod, {}), env), width)
            if not str(result.ty).startswith("float32"):
                result = cast(result, "float32")
            return maximum(result, const(HIDDEN, "float32", width))

        return rule

    def _visibility(
        self,
        clause: Clause,
        chunk: Chunk,
        looked_up: dict[Member, TokenLists],
        count: Value,
        masked: Value,
    ) -> Callable[[Value], Callable[[Value, int, Value], Value]] | None:
        """Return what hides scores in a chunk that is `masked`, given the sub-tile."""
        merged = self._merges(clause)
        if clause.residual == TRUE and not merged:
            return None
        bits: dict[Expr, Memory] = {}
        for member, found in looked_up.items():
            bits[member] = self._bits(member, found, chunk, count, masked)
        width = self.tile.width

        def tokens_of(memory: Memory, slot: Value, token: Value) -> Value:
            spread = broadcast(load(memory, slot), width)
            return T.bitwise_and(T.shift_right(spread, token), const(1, "int32", width))

        def of(sub: Value) -> Callable[[Value, int, Value], Value]:
            def rule(slot: Value, v: int, score: Value) -> Value:
                env = self._leaves(chunk, sub, slot, v)
                at = sub * self.tile.lanes + v * width
                token = T.bind(load(self.lanes.token, at, lanes=width))
                hidden = const(HIDDEN, "float32", width)
                if clause.residual != TRUE:
                    inside = {m: T.bind(tokens_of(b, slot, token)) for m, b in bits.items()}
                    seen = emit(self._closed(clause.residual, inside), env)
                    score = T.bind(select(broadcast(seen, width), score, hidden))
                if merged:
                    listed = tokens_of(chunk.members, slot, token)
                    score = select(listed > const(0, "int32", width), score, hidden)
                return score

            return rule

        return of

    def _bits(
        self, member: Member, found: TokenLists, chunk: Chunk, count: Value, masked: Value
    ) -> Memory:
        one = shared(self.kernel.lists[member]) and not mentions(member.keys[-1], Pos, "query")
        wanted = T.bind(select(masked, count, const(0, "int32")))
        env = self._env(head=self.head)
        return found.look_up(chunk, wanted, env, self.i_min, self.present, one=one)

    # --- outputs --------------------------------------------------------------------------------

    def finish(self, state: State) -> None:
        """Write the outputs of the tile."""
        task, arguments, width = self.task, self.kernel.arguments, self.tile.width
        sink = None
        if task.sink is not None:
            flat = arguments[task.sink].flat

            dtype = task.sink.dtype

            def sink(at: Value) -> Value:
                return widened(gather(flat, load(self.lanes.head, at, lanes=width)), dtype)

        scale, lse = attention.finish(state, self.kernel.natural, sink, self.kernel.arch)
        o = arguments[task.o]
        heads = task.q.heads
        store_outputs(self.lanes, state.out, self.kernel.dim, scale, o.flat, task.o.dtype, heads)
        if task.lse is None:
            return
        out = arguments[task.lse].flat
        with T.serial(self.tile.rows) as r, T.If(load(self.lanes.valid, r) > 0), T.Then():
            at = load(self.lanes.row, r) * heads + cast(load(self.lanes.head, r), "int64")
            store(out, load(lse, r), at)
