"""Ask in `tiled` attention what rows see of a chunk, pair by pair, before there are scores.

A predicate that reads a table which lies in pages looks a page up for each key. With the scores in
registers there is no room for so many addresses: a few keys at a time are asked before, and leave a
bit for each score. So it is with predicates that ask whether a pair is listed, of maps. Others need
less, and are evaluated where they hide scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.gpu.launch import bit_of
from sparsegen.codegen.gpu.membership import WINDOW, seen
from sparsegen.codegen.gpu.tiled_cut import clauses_of
from sparsegen.codegen.tvm import T, Value, const, equal, load, scratch, select, store
from sparsegen.ir.expr import Expr, Member, Table, walk

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.tiled_weights import Chunk, Weights
    from sparsegen.lowering.tasks import AttendTask

_KEYS = 4  # of a thread, which are asked side by side


def asked(task: AttendTask) -> list[int]:
    """Return the numbers of the clauses whose predicates read tables in pages, or maps."""
    tables = dict(task.tables)

    def reads(residual: Expr) -> bool:
        read = (e for e in walk(residual) if isinstance(e, Table | Member))
        return any(isinstance(e, Member) or tables[e.tensor.name].rows.paged for e in read)

    return [n for n, (_, clause) in enumerate(clauses_of(task)) if reads(clause.residual)]


class Pairs:
    """What rows see of a chunk: bit n of a row for its n-th key; short rows share words."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.kernel, self.cut = weights, weights.kernel, weights.kernel.cut
        self.clauses = asked(self.kernel.task)
        self.each = self.cut.keys // 4
        self.words = -(-2 * self.each // 32)
        self.bits = scratch(self.words, "uint32") if self.clauses else None

    def ask(self, chunk: Chunk) -> None:
        """Find out what rows see of the chunk at hand, if it is masked and has such a clause."""
        if not self.clauses:
            return
        with T.If(self.weights.masked()), T.Then():
            chunk = self.weights.hear(chunk)
            for n in self.clauses:
                with T.If(equal(chunk.number, const(n, "int32"))), T.Then():
                    self._ask(n, chunk)

    def _ask(self, number: int, chunk: Chunk) -> None:
        for word in range(self.words):
            store(self.bits, const(0, "uint32"), word)
        residual = self.kernel.clauses[number][1].residual
        if any(isinstance(e, Member) for e in walk(residual)):
            self._look_up(number, chunk)
            return
        count = min(_KEYS, self.each)
        if self.cut.parts > 1:
            for start in range(0, self.each, count):
                self._some(number, chunk, start, count)
            return
        start = cell("int32", const(0, "int32"))
        with T.While(get(start) < self.each):
            self._some(number, chunk, pin(get(start)), count)
            put(start, get(start) + count)

    def _some(self, number: int, chunk: Chunk, start: Value, count: int) -> None:
        """Ask for `count` keys of this thread, an even number, from number `start` on."""
        compute, clause = self.weights.compute, self.kernel.clauses[number][1]
        hull = self.kernel.hull(compute.base, compute.group, number)
        places = [self.weights.position(half) for half in range(2)]
        for n in range(count):
            key = start * 4 + (n // 2 * 8 + n % 2)
            part = 0 if self.cut.parts == 1 else key // self.cut.block
            j = pin(chunk.starts[part] + (key + compute.lane % 4 * 2))
            inside = T.bind(T.And(j >= hull.lo, j < hull.hi))
            for half, (query, head) in enumerate(places):
                visible = T.And(inside, compute.view.value(clause.residual, query, head, j))
                word, first = divmod(half * self.each, 32)
                self._note(visible, word, bit_of(start + (n + first)))

    def _look_up(self, number: int, chunk: Chunk) -> None:
        """Ask for all keys of a thread, whose answers are in windows of maps."""
        compute, maps = self.weights.compute, self.kernel.maps
        assert maps is not None
        _, clause = self.kernel.clauses[number]
        hull = self.kernel.hull(compute.base, compute.group, number)
        for half in range(2):
            query, head = self.weights.position(half)
            for part in range(0, self.cut.keys, WINDOW):
                first = T.bind(chunk.starts[0] + (part + compute.lane % 4 * 2))
                words: dict[Expr, list[Value]] = {
                    m: maps.window(compute.view, m, query, head, first) for m in maps.members
                }
                for n in range(min(self.cut.keys, WINDOW) // 4):
                    key = n // 2 * 8 + n % 2
                    j = pin(first + key)
                    found = {m: seen(w, key) for m, w in words.items()}
                    inside = T.And(j >= hull.lo, j < hull.hi)
                    value = compute.view.value(clause.residual, query, head, j, found)
                    word, bit = divmod(half * self.each + part // 4 + n, 32)
                    self._note(T.And(inside, value), word, const(1 << bit, "uint32"))

    def _note(self, visible: Value, word: int, bit: Value) -> None:
        found = select(visible, bit, const(0, "uint32"))
        store(self.bits, T.bitwise_or(load(self.bits, word), found), word)

    def visible(self, half: int, key: int) -> Value:
        """Tell whether a row sees a key, that of lane 0."""
        word, first = divmod(half * self.each, 32)
        bit = const(1 << (first + key // 8 * 2 + key % 2), "uint32")
        return T.bitwise_and(load(self.bits, word), bit) > const(0, "uint32")
