"""Find the keys of a clause chunk by chunk, those of later chunks while earlier ones are used.

The keys of a range follow each other, so slot n of a chunk is the n-th key from its first on. The
keys of a list, and the rows of keys in pages, are read from global memory: they go through a ring
in shared memory, some chunks ahead of their use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsegen.codegen.cpu.stream import Bounds, cell, get, pin, put
from sparsegen.codegen.gpu.launch import FULL
from sparsegen.codegen.gpu.view import ThreadView
from sparsegen.codegen.gpu.walk import finder
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    const,
    equal,
    load,
    maximum,
    minimum,
    scratch,
    store,
)
from sparsegen.ir.expr import TRUE
from sparsegen.lowering.tasks import AttendTask, Clause, KeySource, Rows

SOME, SURE = 1, 2  # bits: a slot has a key; all have one, and every query of the tile sees it


def paged_rows(source: KeySource) -> Rows | None:
    """Return how the parts of a source that lie in pages are addressed, if one way."""
    found = {p.buffer.rows for o in (source.k, source.v) for p in o.parts if p.buffer.rows.paged}
    return found.pop() if len(found) == 1 else None


def listed(source: KeySource, clause: Clause) -> bool:
    """Tell whether the keys of a clause go through the ring."""
    return clause.keys is not None or paged_rows(source) is not None


def _holds(task: AttendTask) -> tuple[bool, bool]:
    """Tell whether a ring holds keys, and whether it holds rows."""
    keys = any(c.keys is not None for s in task.sources for c in s.clauses)
    return keys, any(paged_rows(s) is not None for s in task.sources)


def ring_bytes(task: AttendTask, keys: int, chunks: int) -> int:
    """Return the shared memory of a ring."""
    holds_keys, holds_rows = _holds(task)
    if not holds_keys and not holds_rows:
        return 0
    return chunks * (keys * (4 * holds_keys + 8 * holds_rows) + -(-keys // 32) * 4)


@dataclass(frozen=True)
class Ring:
    """What shared memory holds of some chunks.

    keys, chunks  slots of a chunk, and how many chunks there are at a time
    position      int32 [chunks * keys]: keys of lists, -1 where a slot has none
    row           int64 [chunks * keys]: where paged keys are, -1 where a slot has none
    known         int32: SOME and SURE of every 32 slots
    """

    keys: int
    chunks: int
    position: Memory | None
    row: Memory | None
    known: Memory

    @staticmethod
    def allocate(pool: Any, task: AttendTask, keys: int, chunks: int) -> Ring | None:
        """Take a ring from the shared memory of a block, if the task needs one."""
        holds_keys, holds_rows = _holds(task)
        if not holds_keys and not holds_rows:
            return None
        size = chunks * keys
        row = pool.alloc((size,), "int64", align=16) if holds_rows else None
        position = pool.alloc((size,), "int32", align=16) if holds_keys else None
        known = pool.alloc((chunks * -(-keys // 32),), "int32", align=4)
        return Ring(keys, chunks, position, row, known)


class Chunks:
    """The chunks of a clause: `number` (int32) of `keys` slots each."""

    def __init__(
        self, view: ThreadView, source: KeySource, clause: Clause, head: Value, ring: Ring | None,
        keys: int, thread: Value, threads: int, ends: Memory, *, lean: bool, bounds: Bounds | None,
    ) -> None:  # fmt: skip
        """Describe the chunks of a clause.

        Args:
            head: whose list is read, where the clause has lists.
            ring: what keys of lists and pages go through.
            keys: slots of a chunk.
            thread, threads: the number of this thread in the block, and how many there are.
            ends: shared int32 [2], to keep what is asked once a chunk out of registers.
            lean: registers are short.
            bounds: of the keys; None: those of the hull.
        """
        self.clause, self.sequence, self.keys = clause, view.sequence, keys
        self.thread, self.threads = thread, threads
        self.paged = paged_rows(source)
        self.ring = ring if listed(source, clause) else None
        self.follow = clause.keys is None  # the keys of slots follow each other
        self.length = pin(view.sequence.count(source.k.rows))
        if bounds is None:
            bounds = view._hull(clause, self.length, view.i_min, view.symbols["i_max"])
        self.bounds = bounds
        self._find, count = finder(view, clause, self.bounds, head)
        self.number = pin((count + (keys - 1)) // keys)
        self._ends, self._lean = ends, lean
        whole = clause.residual == TRUE
        store(ends, bounds.lo if whole else bounds.sure_lo, 0)
        store(ends, bounds.hi if whole else minimum(bounds.sure_hi, bounds.hi), 1)
        steps = -(-keys // threads)
        self._found, self._rows = scratch(steps, "int32"), scratch(steps, "int64")

    def first(self, chunk: Value) -> Value:
        """Return the first key of a chunk of a range."""
        return self.bounds.lo + chunk * self.keys

    # --- the ring -------------------------------------------------------------------------------

    def find(self, chunk: Value) -> None:
        """Start to read the keys of a chunk, each thread those of its slots."""
        if self.ring is None:
            return
        for n, slot in self._slots():
            store(self._found, const(-1, "int32"), n)
            store(self._rows, const(-1, "int64"), n)
            with T.If(slot < self.keys), T.Then():
                j = pin(self._find(chunk * self.keys + slot))
                store(self._found, j, n)
                if self.paged is not None:
                    with T.If(j >= 0), T.Then():
                        store(self._rows, self.sequence.row(self.paged, j), n)

    def publish(self, chunk: Value) -> None:
        """Put what `find` read where all threads of the block see it after a barrier."""
        ring = self.ring
        if ring is None:
            return
        place = pin(chunk % ring.chunks)
        for n, slot in self._slots():
            j = pin(load(self._found, n))
            there = pin(cast(j >= 0, "int32"))
            sure = T.Or(slot >= self.keys, T.And(j >= 0, self._sure_by_ends(j)))
            some, every = (
                T.bind(T.cuda.ballot_sync(const(FULL, "uint32"), x))
                for x in (there, pin(cast(sure, "int32")))
            )
            with T.If(slot < self.keys), T.Then():
                if ring.position is not None:
                    store(ring.position, j, place * self.keys + slot)
                if ring.row is not None:
                    store(ring.row, load(self._rows, n), place * self.keys + slot)
                with T.If(equal(self.thread % 32, const(0, "int32"))), T.Then():
                    has = cast(some > const(0, "uint32"), "int32") * SOME
                    bits = has + cast(equal(every, const(FULL, "uint32")), "int32") * SURE
                    store(ring.known, bits, place * -(-self.keys // 32) + slot // 32)

    def _slots(self) -> list[tuple[int, Value]]:
        return [(n, self.thread + s) for n, s in enumerate(range(0, self.keys, self.threads))]

    def _known(self, chunk: Value) -> list[Value]:
        ring = self.ring
        assert ring is not None
        words = -(-self.keys // 32)
        place = chunk % ring.chunks * words
        return [load(ring.known, place + n) for n in range(words)]

    # --- what is known of a chunk ---------------------------------------------------------------

    def sure(self, j: Value) -> Value:
        """Tell whether every query of the tile sees a key of the clause."""
        if self.clause.residual == TRUE:
            return const(True, "bool")
        return T.And(j >= self.bounds.sure_lo, j < self.bounds.sure_hi)

    def _sure_by_ends(self, j: Value) -> Value:
        """Tell the same of a key that there is; of ranges by what shared memory has of them."""
        if not (self._lean and self.follow) or self.clause.residual == TRUE:
            return self.sure(j)
        return T.And(j >= load(self._ends, 0), j < load(self._ends, 1))

    def some(self, chunk: Value) -> Value | None:
        """Tell whether a chunk has any key, for all threads alike (int32); None if each has."""
        if self.follow:
            return None
        total = cell("int32", const(0, "int32"))
        for word in self._known(chunk):
            put(total, T.bitwise_or(get(total), word))
        return pin(T.bitwise_and(get(total), const(SOME, "int32")))

    def masked(self, chunk: Value) -> Value:
        """Tell whether some query does not see some slot, for all threads alike (int32)."""
        if self.ring is not None:
            total = cell("int32", const(SURE, "int32"))
            for word in self._known(chunk):
                put(total, T.bitwise_and(get(total), word))
            return pin(const(SURE, "int32") - get(total))
        first = pin(self.first(chunk))
        outside = T.Or(first < load(self._ends, 0), first + self.keys > load(self._ends, 1))
        return pin(cast(outside, "int32"))

    def position(self, chunk: Value) -> Callable[[Value], Value]:
        """Return what tells the key of a slot: -1, or one not below bounds.hi, for none."""
        if self.follow:
            first = pin(self.first(chunk))
            return lambda slot: first + slot
        assert self.ring is not None
        base, memory = pin(chunk % self.ring.chunks * self.keys), self.ring.position
        return lambda slot: load(memory, base + slot)

    def locate(
        self, chunk: Value, head: Value
    ) -> Callable[[Value, Rows], tuple[Value | None, Value, Value]]:
        """Return what tells a loader where the keys of a chunk are."""
        if self.ring is None:
            # Slots behind the last key repeat it: they are hidden.
            first, last = pin(self.first(chunk)), pin(self.bounds.hi - 1)

            def near(slot: Value, rows: Rows) -> tuple[Value | None, Value, Value]:
                return None, pin(self.sequence.row(rows, pin(minimum(first + slot, last)))), head

            return near
        ring, base = self.ring, pin(chunk % self.ring.chunks * self.keys)
        key, last = self.position(chunk), pin(self.bounds.hi - 1)

        def there(slot: Value, rows: Rows) -> tuple[Value | None, Value, Value]:
            if rows == self.paged:
                row = pin(load(ring.row, base + slot))
                return row >= 0, maximum(row, const(0, "int64")), head
            j = pin(key(slot))
            exists = j <= last if self.follow else j >= 0
            near = minimum(j, last) if self.follow else maximum(j, const(0, "int32"))
            return exists, pin(self.sequence.row(rows, pin(near))), head

        return there
