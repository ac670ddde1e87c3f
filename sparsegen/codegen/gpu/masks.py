"""Modify the scores of a chunk, and hide those of pairs that are not visible.

Most clauses let a query see a stretch of keys: its ends are compared with the keys. Any other
predicate is evaluated pair by pair before the scores are there, in a loop that is not unrolled, and
leaves one bit for each score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.lists import mentions
from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.gpu.chunks import Chunks
from sparsegen.codegen.tvm import (
    T,
    Value,
    cast,
    const,
    equal,
    load,
    minimum,
    scratch,
    select,
    store,
)
from sparsegen.ir.expr import TRUE, Head
from sparsegen.lowering.tasks import Clause, KeySource

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.attend import Tile

HIDDEN = -1e30  # less than any score, whose exp2 is exactly 0


class Mask:
    """What is visible of the chunks of a clause."""

    def __init__(self, tile: Tile, source: KeySource, clause: Clause, chunks: Chunks) -> None:
        self.tile, self.clause, self.chunks = tile, clause, chunks
        self.softmax, self.view, self.task = tile.softmax, tile.view, tile.task
        self.rows = self.softmax.rows
        # What a query sees of a range may lie in the hull that another range has for its tile.
        ranges = sum(c.keys is None for c in source.clauses)
        alone = clause.keys is not None or ranges == 1 or tile.shape.tokens == 1
        self.pairwise = clause.residual != TRUE and not (alone and clause.exact)
        # Rows of one token, in 16 rows of a warp that are 16 heads, have one answer.
        one = tile.shape.heads % 16 == 0 and not mentions(clause.residual, Head)
        self.leaders = [row - row % 2 if one else row for row in range(self.rows)]
        self.each, self.words = self.softmax.slice // 4, self.rows
        self.places = {row: (row, 0) for row in range(self.rows)}
        if tile.kernel.short:
            # As many rows share a register as have room for their answers in it.
            share, asked = 32 // self.each, sorted(set(self.leaders))
            self.places = {row: (n // share, n % share * self.each) for n, row in enumerate(asked)}
            self.words = -(-len(asked) // share)
        self.bits = scratch(self.words, "uint32") if self.pairwise else None

    def _pairs(self, rows: Iterable[int]) -> dict[int, tuple[Value, Value]]:
        """Return the position of the query of each row, and its head."""
        tile, found = self.tile, {}
        i_min, last, first = tile.queries_at()
        for row in sorted(set(rows)):
            r = pin(tile.row + (tile.lane // 4 + row // 2 * 16 + row % 2 * 8))
            token, head = minimum(r // tile.shape.heads, last), r % tile.shape.heads
            found[row] = pin(i_min + token), pin(first + head)
        return found

    def _slot(self, n: Value, c: Value) -> Value:
        """Return the slot of a column of an 8-column tile of this warp's slice."""
        tile = self.tile
        return (tile.part * self.softmax.slice + tile.lane % 4 * 2) + (n * 8 + c)

    def look(self, chunk: Value) -> None:
        """Find out what is visible, if that must be asked pair by pair."""
        bits = self.bits
        if bits is None:
            return
        key, bounds, maps = self.chunks.position(chunk), self.chunks.bounds, self.tile.kernel.maps
        leaders = sorted(set(self.leaders))
        pairs = self._pairs(leaders)
        for word in range(self.words):
            store(bits, const(0, "uint32"), word)
        with T.serial(self.each) as n:
            j = pin(key(self._slot(n // 2, n % 2)))
            with T.If(T.And(j >= 0, j < bounds.hi)), T.Then():
                sure = pin(cast(self.chunks.sure(j), "int32"))
                for row in leaders:
                    seen = cell("int32", sure)
                    with T.If(equal(sure, const(0, "int32"))), T.Then():
                        found = None if maps is None else maps.answers(self.view, *pairs[row], j)
                        value = self.view.value(self.clause.residual, *pairs[row], j, found)
                        put(seen, cast(value, "int32"))
                    word, first = self.places[row]
                    bit = T.shift_left(cast(get(seen), "uint32"), cast(n + first, "uint32"))
                    store(bits, T.bitwise_or(load(bits, word), bit), word)

    def apply(self, chunk: Value) -> None:
        """Hide what is not visible."""
        visible = self._by_bits() if self.pairwise else self._by_ends(chunk)
        for row, n, c, at in self.softmax.elements():
            with T.If(T.Not(visible(row, n, c))), T.Then():
                store(self.softmax.scores, const(HIDDEN, "float32"), at)

    def _by_bits(self) -> Callable[[int, int, int], Value]:
        bits, zero = self.bits, const(0, "uint32")

        def visible(row: int, n: int, c: int) -> Value:
            word, first = self.places[self.leaders[row]]
            bit = const(1 << (first + 2 * n + c), "uint32")
            return T.bitwise_and(load(bits, word), bit) > zero

        return visible

    def _by_ends(self, chunk: Value) -> Callable[[int, int, int], Value]:
        """Compare with the first and the last key that a query sees."""
        chunks, clause = self.chunks, self.clause
        key, follow = chunks.position(chunk), chunks.follow
        # Where slots follow each other, ends are counted from this thread's first slot.
        start = pin(key(self._slot(0, 0))) if follow else const(0, "int32")
        ends = {}
        pairs = self._pairs(self.leaders)
        for row, (position, _) in pairs.items():
            lo, hi = chunks.bounds.lo, chunks.bounds.hi
            if clause.residual != TRUE:
                lo, hi = self.view._ends(clause.hull, chunks.length, position, position)
            ends[row] = pin(lo - start), pin(hi - start)
        found = {}

        def visible(row: int, n: int, c: int) -> Value:
            lo, hi = ends[self.leaders[row]]
            if follow:
                j = const(8 * n + c, "int32")
                return T.And(j >= lo, j < hi) if clause.hull.lo else j < hi
            if (n, c) not in found:
                found[n, c] = pin(key(self._slot(n, c)))
            return T.And(found[n, c] >= lo, found[n, c] < hi)

        if not follow:
            for n in range(self.softmax.slice // 8):
                for c in range(2):
                    visible(0, n, c)
        return visible

    def modify(self, chunk: Value) -> None:
        """Scale the scores and apply the score mod, where the rate of the exponent cannot."""
        if not self.tile.kernel.scaled:
            return
        task, scores = self.task, self.softmax.scores
        key = self.chunks.position(chunk)
        low, factor = const(HIDDEN, "float32"), const(task.scale, "float32")
        pairs = self._pairs(range(self.rows)) if task.mod is not None else {}
        for row, n, c, at in self.softmax.elements():
            score = pin(load(scores, at) * factor)
            if task.mod is not None:
                j = pin(key(self._slot(n, c)))
                score = self.view.number(task.mod, *pairs[row], j, score)
            store(scores, select(score < low, low, score), at)  # NaN stays
