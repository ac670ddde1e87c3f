"""Walk the keys of one tile: which keys, who sees them, scores, online softmax, values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu import attention, stream
from sparsegen.codegen.cpu.attention import HIDDEN, Slots, State
from sparsegen.codegen.cpu.feed import Feed
from sparsegen.codegen.cpu.narrow import narrow
from sparsegen.codegen.cpu.rows import (
    Sequence,
)
from sparsegen.codegen.cpu.stream import Bounds, Chunk, Items
from sparsegen.codegen.cpu.tile import Lanes, load_queries, store_outputs
from sparsegen.codegen.cpu.vec import widened
from sparsegen.codegen.cpu.view import Rule, View
from sparsegen.codegen.exprs import emit
from sparsegen.codegen.narrowing import narrows
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
from sparsegen.ir.expr import (
    Member,
    walk,
)
from sparsegen.lowering.tasks import Clause, KeySource

if TYPE_CHECKING:
    from sparsegen.codegen.cpu.attend import AttendKernel


def alike(clauses: Iterable[Clause]) -> list[list[Clause]]:
    """Group clauses that one loop over keys can walk: ranges that hide the same pairs."""
    groups: list[list[Clause]] = []
    for clause in clauses:
        for group in groups:
            ranges = clause.keys is None and group[0].keys is None
            if ranges and clause.residual == group[0].residual:
                group.append(clause)
                break
        else:
            groups.append([clause])
    return groups


class Pass(View):
    """The work of one tile."""

    def __init__(
        self,
        kernel: AttendKernel,
        sequence: Sequence,
        first: Value,
        head: Value,
        piece: Value | None,
        pieces: Value | None,
    ) -> None:
        self.kernel, self.task = kernel, kernel.task
        self.piece, self.pieces = piece, pieces
        tile = kernel.tile
        # Pinned, or TVM unfolds the divisions of a tile's number into every bound of a range.
        present = stream.pin(minimum(const(tile.tokens, "int32"), sequence.n_q - first))
        i_min = stream.pin(sequence.q_off + first)
        rows = present * tile.heads
        self.subtiles = T.bind((rows + (tile.lanes - 1)) // tile.lanes)
        row = T.bind(sequence.q_start + cast(first, "int64"))
        lanes = Lanes.fill(tile, row, head, i_min, present)
        super().__init__(
            kernel.arguments,
            kernel.tables,
            kernel.lists,
            sequence,
            lanes,
            head=head,
            i_min=i_min,
            present=present,
            hidden=HIDDEN,
        )

    # --- bounds ---------------------------------------------------------------------------------

    def _bounds(self, clause: Clause, source: KeySource, keys: Value) -> Bounds:
        """Return the bounds of the tile, cut to this piece."""
        i_min, i_max = self.symbols["i_min"], self.symbols["i_max"]
        whole = self._hull(clause, keys, i_min, i_max)
        if narrows(source, clause):
            whole = narrow(self, clause, whole)
        if self.piece is None or clause.keys is not None:
            return whole
        begin, end = self._cut(maximum(whole.hi - whole.lo, const(0, "int32")))
        lo, hi = stream.pin(whole.lo + begin), stream.pin(whole.lo + end)
        return replace(whole, lo=lo, hi=hi)

    def _spans(self, clauses: list[Clause], source: KeySource, keys: Value) -> list[Memory] | None:
        """Return the bounds of each sub-tile [clause][sub-tile]; None where the tile's say it all.

        Where clauses meet depends on the tokens, and the clauses are walked with the tile's: a key
        that the sub-tile alone would meet under another clause comes up under this one. So no key
        between the first and the last that any clause shows the sub-tile is left out.
        """
        tile = self.tile
        if clauses[0].keys is not None or tile.subtiles == 1 or tile.tokens == 1:
            return None
        spans = [T.alloc_buffer((len(clauses) * tile.subtiles,), "int32") for _ in range(4)]
        with T.serial(self.subtiles) as sub:
            first = T.bind(load(self.lanes.position, sub * tile.lanes))
            last = T.bind(load(self.lanes.position, sub * tile.lanes + (tile.lanes - 1)))
            for n, clause in enumerate(clauses):
                bounds = self._hull(clause, keys, first, last)
                lo, hi = bounds.lo, bounds.hi
                for other in source.clauses:
                    if other is not clause:
                        more_lo, more_hi = self._ends(other.hull, keys, first, last)
                        lo, hi = minimum(lo, more_lo), maximum(hi, more_hi)
                for memory, end in zip(spans, replace(bounds, lo=lo, hi=hi).ends, strict=True):
                    store(memory, end, sub + n * tile.subtiles)
        return spans

    def _cut(self, size: Value) -> tuple[Value, Value]:
        """Return the ends of this piece of `size` things."""
        if self.piece is None:
            return const(0, "int32"), size
        wide = cast(size, "int64")
        ends = (wide * (self.piece + n) // cast(self.pieces, "int64") for n in (0, 1))
        begin, end = (stream.pin(cast(e, "int32")) for e in ends)
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
            for clauses in alike(source.clauses):
                self._walk(clauses, source, chunk, feed, state, queries)
        return state

    def _walk(
        self,
        clauses: list[Clause],
        source: KeySource,
        chunk: Chunk,
        feed: Feed,
        state: State,
        queries: Memory,
    ) -> None:
        clause = clauses[0]
        length = T.bind(self.sequence.count(source.k.rows))
        bounds = [self._bounds(c, source, length) for c in clauses]
        spans = self._spans(clauses, source, length)
        merged = self._merges(clause)
        looked_up = {e: self._find(e) for e in walk(clause.residual) if isinstance(e, Member)}

        def body(count: Value, masked: Value, number: Value | int = 0) -> None:
            feed.load(count)
            visible = self._visibility(clause, chunk, looked_up, count, masked)
            every = Slots(const(0, "int32"), count)
            with T.serial(self.subtiles) as sub:
                if spans is None:
                    self._attend(source, chunk, feed, state, queries, visible, sub, every, masked)
                    return
                at = number * self.tile.subtiles + sub
                lo, hi, sure_lo, sure_hi = (T.bind(load(m, at)) for m in spans)
                first = T.bind(load(chunk.position, 0))
                step = chunk.step
                begin = stream.pin(maximum(lo - first, const(0, "int32")) // step * step)
                slots = Slots(begin, stream.pin(minimum(hi - first, count)))
                sure = T.And(first + begin >= sure_lo, first + slots.end <= sure_hi)
                if narrows(source, clause):
                    sure = T.Or(sure, T.Not(masked))
                with T.If(begin < slots.end), T.Then():
                    self._attend(
                        source, chunk, feed, state, queries, visible, sub, slots, T.Not(sure)
                    )

        if clause.keys is None:
            stream.walk_ranges(chunk, bounds, body)
            return
        (bound,) = bounds
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
            stream.walk_merged(chunk, bound, items, self.tile.tokens, self.present, body)
        else:
            stream.walk_list(chunk, bound, items, body)

    def _attend(
        self,
        source: KeySource,
        chunk: Chunk,
        feed: Feed,
        state: State,
        queries: Memory,
        visible: Callable[[Value], Rule] | None,
        sub: Value,
        slots: Slots,
        masked: Value,
    ) -> None:
        """Attend from one sub-tile to some keys of a chunk."""
        arch, rate = self.kernel.arch, self.kernel.rate
        attention.scores(state, queries, feed.segments(source.k), sub, slots)
        if self.kernel.scaled:
            attention.rewrite(state, slots, self._mod(chunk, sub))
        if visible is not None:
            with T.If(masked), T.Then():
                attention.rewrite(state, slots, visible(sub))
        factors = attention.softmax(state, sub, slots, rate, arch)
        attention.values(
            state,
            feed.segments(source.v),
            factors,
            sub,
            slots,
            masked if visible is not None else None,
        )

    def _mod(self, chunk: Chunk, sub: Value) -> Rule:
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
            # Not `maximum`, which loses NaN.
            hidden = const(HIDDEN, "float32", width)
            return select(result < hidden, hidden, result)

        return rule

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
