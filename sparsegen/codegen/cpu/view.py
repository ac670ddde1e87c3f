"""Say what expressions mean at a tile of queries: positions, stops, tables, masks, selections."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sparsegen.codegen.cpu import stream
from sparsegen.codegen.cpu.lists import TokenLists, mentions, shared
from sparsegen.codegen.cpu.rows import Arguments, Sequence, read_table
from sparsegen.codegen.cpu.stream import Bounds, Chunk
from sparsegen.codegen.cpu.tile import Column, Lanes
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
    select,
)
from sparsegen.ir.axes import Entries
from sparsegen.ir.expr import TRUE, Expr, Member, Pos, Stop, Symbol, Table, rebuild
from sparsegen.lowering.tasks import Buffer, Clause, Interval, Lists, Part, Rows

# Replaces the score of (slot, vector) of a sub-tile.
Rule = Callable[[Value, int, Value], Value]


def stop_of(stop: Stop, sequence: Sequence) -> Value:
    """Return how many positions an axis has in a sequence, exclusive end of absolute positions."""
    if isinstance(stop.axis, Entries):
        entries = sequence.count(Rows(space="entry", entries=stop.axis, role=stop.role))
        return entries + (sequence.q_off // stop.axis.stride if stop.role == "query" else 0)
    return sequence.q_off + sequence.n_q if stop.role == "query" else sequence.n_k


class View:
    """The leaves of expressions at one tile, and who sees a key.

    tables, lists  where the tables and selections that expressions mention are stored
    head           first query head of the tile (int32)
    i_min          absolute position of its first token (int32)
    present        tokens that exist (int32)
    hidden         the score of a pair that is not visible
    """

    def __init__(
        self,
        arguments: Arguments,
        tables: Mapping[str, Buffer],
        lists: Mapping[Expr, Lists],
        sequence: Sequence,
        lanes: Lanes,
        *,
        head: Value,
        i_min: Value,
        present: Value,
        hidden: float,
    ) -> None:
        self.arguments, self.tables, self.lists = arguments, tables, lists
        self.sequence, self.lanes, self.tile = sequence, lanes, lanes.tile
        self.head, self.i_min, self.present, self.hidden = head, i_min, present, hidden
        self.names: dict[Expr, str] = {}
        self.symbols: dict[str, Value] = {
            "i_min": i_min,
            "i_max": stream.pin(i_min + present - 1),
        }

    def _closed(self, expr: Expr, found: dict[Expr, Value]) -> Expr:
        """Name the stops, and the selections in `found`, so that `emit` sees symbols only."""

        def rule(e: Expr) -> Expr | None:
            if isinstance(e, Stop):
                return self._named(e, stop_of(e, self.sequence))
            if e in found:
                return self._named(e, found[e])
            return None

        return rebuild(expr, rule)

    def _named(self, expr: Expr, value: Value) -> Symbol:
        name = self.names.setdefault(expr, f"value {len(self.names)}")
        self.symbols[name] = value
        return Symbol(name)

    def _env(self, **leaves: Value) -> Env:
        return Env(symbols=self.symbols, table=self._table, **leaves)

    def _table(self, table: Table, index: tuple[Value, ...]) -> Value:
        buffer = self.tables[table.tensor.name]
        return read_table(self.arguments, buffer, self.sequence, index)

    def _ends(
        self, interval: Interval, keys: Value, i_min: Value, i_max: Value
    ) -> tuple[Value, Value]:
        """Return the ends of an interval of the tokens i_min to i_max, inside [0, keys)."""

        def value(expr: Expr) -> Value:
            closed = self._closed(expr, {})
            return emit(closed, Env(symbols={**self.symbols, "i_min": i_min, "i_max": i_max}))

        lo, hi = const(0, "int32"), keys
        for e in interval.lo:
            lo = maximum(lo, value(e))
        for e in interval.hi:
            hi = minimum(hi, value(e))
        return stream.pin(lo), stream.pin(hi)

    def _hull(self, clause: Clause, keys: Value, i_min: Value, i_max: Value) -> Bounds:
        """Return the keys that some of the tokens may see, and those that all of them see."""
        lo, hi = self._ends(clause.hull, keys, i_min, i_max)
        if clause.full is None:
            return Bounds(lo, hi, const(0, "int32"), const(-1, "int32"))
        return Bounds(lo, hi, *self._ends(clause.full, keys, i_min, i_max))

    def _merges(self, clause: Clause) -> bool:
        keys = clause.keys
        if keys is None or self.tile.tokens == 1:
            return False
        return keys.slash or not shared(self.lists[keys.member])

    def _column(self, part: Part) -> Column:
        heads, dim = part.buffer.shape[-2:]

        def offset(head: Value) -> Value:
            return (cast(head, "int64") * dim if heads > 1 else const(0, "int64")) + part.start

        flat = self.arguments[part.buffer].flat
        return Column(flat, part.buffer.dtype, heads * dim, part.size, offset, part.fn)

    def _find(self, member: Member) -> TokenLists:
        return TokenLists.find(
            member, self.lists[member], self.arguments, self.sequence,
            self._env(head=self.head), self.i_min, self.tile.tokens, self.present,
        )  # fmt: skip

    def _leaves(self, chunk: Chunk, sub: Value, slot: Value, v: int) -> Env:
        at, width = sub * self.tile.lanes + v * self.tile.width, self.tile.width
        return self._env(
            query=T.bind(load(self.lanes.position, at, lanes=width)),
            head=T.bind(load(self.lanes.head, at, lanes=width)),
            key=T.bind(load(chunk.position, slot)),
        )

    def _visibility(
        self,
        clause: Clause,
        chunk: Chunk,
        looked_up: dict[Member, TokenLists],
        count: Value,
        masked: Value,
    ) -> Callable[[Value], Rule] | None:
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

        def of(sub: Value) -> Rule:
            def rule(slot: Value, v: int, score: Value) -> Value:
                env = self._leaves(chunk, sub, slot, v)
                at = sub * self.tile.lanes + v * width
                token = T.bind(load(self.lanes.token, at, lanes=width))
                hidden = const(self.hidden, "float32", width)
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
        one = shared(self.lists[member]) and not mentions(member.keys[-1], Pos, "query")
        wanted = T.bind(select(masked, count, const(0, "int32")))
        env = self._env(head=self.head)
        return found.look_up(chunk, wanted, env, self.i_min, self.present, one=one)
