"""Number the keys that one token sees: ranges one after the other, then the items of lists.

Keys of several sources begin at multiples of CHUNK slots, so that a chunk has keys of one source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsegen.codegen.cpu.lists import TokenLists
from sparsegen.codegen.cpu.rows import Sequence
from sparsegen.codegen.cpu.stream import Bounds, cell, get, put
from sparsegen.codegen.gpu.launch import across
from sparsegen.codegen.gpu.pipeline import GROUP, meet
from sparsegen.codegen.gpu.view import ThreadView
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
    select,
    store,
)
from sparsegen.ir.expr import TRUE
from sparsegen.lowering.tasks import Clause, KeySource
from sparsegen.lowering.tasks import Rows as Kind

_BATCH = 16  # loads that wait together
CHUNK = 64  # slots that are copied together
STEP = 16  # rows of a chunk that a warp group copies at a time, eight threads each


def sure(clause: Clause) -> bool:
    """Tell whether one query sees every key of the hull, so that nothing is left to check."""
    return clause.residual == TRUE or clause.exact


@dataclass(frozen=True)
class _Stretch:
    """The slots start <= n < start + size of one clause (int32), and the number of its source."""

    source: int
    clause: Clause
    bounds: Bounds
    found: TokenLists | None
    start: Value
    size: Value


class Slots:
    """The keys of a query head at position `i`; `count` slots (int32), some of which hold none."""

    def __init__(
        self, view: ThreadView, sources: tuple[KeySource, ...], i: Value, head: Value
    ) -> None:
        self.view, self.sources, self.i = view, sources, i
        lengths = [T.bind(view.sequence.count(s.k.rows)) for s in sources]
        none = const(0, "int32")
        self.stretches: list[_Stretch] = []
        self.count: Value = none
        clauses = [(n, clause) for n, source in enumerate(sources) for clause in source.clauses]
        # Lists come last, for what pads the last of them is left away.
        for n, clause in sorted(clauses, key=lambda c: c[1].keys is not None):
            bounds = view._hull(clause, lengths[n], i, i)
            found = None
            if clause.keys is None:
                size = T.bind(maximum(bounds.hi - bounds.lo, none))
            else:
                found = view.list_of(clause.keys.member, i, head)
                size = T.bind(found.width * clause.keys.granule)
            if self.stretches and self.stretches[-1].source != n:
                self.count = T.bind((self.count + (CHUNK - 1)) // CHUNK * CHUNK)
            self.stretches.append(_Stretch(n, clause, bounds, found, self.count, size))
            self.count = T.bind(self.count + size)

    def source_of(self, slot: Value) -> Value:
        """Return the number of the source (int32) of the chunk that `slot` is the first of."""
        found = cell("int32", const(self.stretches[0].source, "int32"))
        for s in self.stretches[1:]:
            with T.If(slot >= s.start), T.Then():
                put(found, const(s.source, "int32"))
        return T.bind(get(found))

    def raw(self, slot: Value) -> Value:
        """Return what memory says about a slot: a key of a range, an item of a list, or -1."""
        found = cell("int32", const(-1, "int32"))
        for s in self.stretches:
            local = T.bind(slot - s.start)
            with T.If(T.And(local >= 0, local < s.size)), T.Then():
                if s.found is None:
                    put(found, s.bounds.lo + local)
                else:
                    assert s.clause.keys is not None
                    put(found, s.found.item(const(0, "int32"), local // s.clause.keys.granule))
        return get(found)

    def key(self, slot: Value, raw: Value, *, check: bool = True) -> Value:
        """Return the key of a slot, given what `raw` says; -1 if there is none.

        Args:
            check: evaluate what bounds do not say; without it, keys that are hidden may remain.
        """
        key = cell("int32", const(-1, "int32"))
        for s in self.stretches:
            here = raw >= 0
            if len(self.stretches) > 1:
                here = T.And(here, T.And(slot >= s.start, slot < s.start + s.size))
            with T.If(here), T.Then():
                j = self._place(s, slot, raw)
                seen = T.And(j >= s.bounds.lo, j < s.bounds.hi)
                with T.If(seen), T.Then():
                    put(key, j)
                if check and not sure(s.clause):
                    self._hide(s, key)
        return T.bind(get(key))

    def _place(self, s: _Stretch, slot: Value, x: Value) -> Value:
        listed = s.clause.keys
        if listed is None or (listed.granule == 1 and not listed.shift and not listed.slash):
            return x
        if listed.slash:
            return T.bind(self.i - x)
        # Items beyond every key could pass 2^31 as keys.
        last = (s.bounds.hi - 1 + listed.shift) // listed.granule
        near = minimum(x, last + 1)
        return T.bind(near * listed.granule - listed.shift + (slot - s.start) % listed.granule)

    def _hide(self, s: _Stretch, key: Memory) -> None:
        j = T.bind(get(key))
        sure = T.And(j >= s.bounds.sure_lo, j < s.bounds.sure_hi)
        with T.If(T.And(j >= 0, T.Not(sure))), T.Then():
            seen = self.view.value(s.clause.residual, self.i, const(0, "int32"), j)
            with T.If(T.Not(seen)), T.Then():
                put(key, const(-1, "int32"))

    def last(self, thread: Value, lane: Value, warp: Value, room: Memory, number: int) -> Value:
        """Return the number of slots up to the last that holds a key, for a whole warp group.

        Args:
            room: int32 [4] in shared memory.
            number: of a named barrier.
        """
        lists = [s for s in self.stretches if s.found is not None]
        if not lists:
            return self.count
        begin = lists[0].start
        last, start = cell("int32", begin), cell("int32", begin)
        with T.While(get(start) < self.count):
            # Loads come before their first use, so that they wait together.
            items = scratch(_BATCH, "int32")
            for n in range(_BATCH):
                store(items, self.raw(T.bind(get(start) + (n * GROUP) + thread)), n)
            for n in range(_BATCH):
                slot = T.bind(get(start) + (n * GROUP) + thread)
                there = self.key(slot, load(items, n), check=False) >= 0
                with T.If(there), T.Then():
                    put(last, slot + 1)
            put(start, get(start) + _BATCH * GROUP)
        most = across(get(last), maximum)
        with T.If(lane < 1), T.Then():
            store(room, most, warp)
        meet(number, GROUP)
        result = cell("int32", load(room, 0))
        for n in range(1, 4):
            put(result, maximum(get(result), load(room, n)))
        # A warp that is ahead writes the end of the next list there.
        meet(number, GROUP)
        return T.bind(get(result))


def page_of(sequence: Sequence, rows: Kind, key: Value) -> Value:
    """Look the page of a key up (int32)."""
    assert sequence.arguments.max_pages is not None
    table = sequence.number * sequence.arguments.max_pages
    return load(sequence.arguments.pages, table + cast(key // rows.page, "int64"))


def row_of(sequence: Sequence, rows: Kind, key: Value, page: Value | None) -> Value:
    """Return the row of a key (int64), given its page where keys lie in pages."""
    if page is None:
        return sequence.row(rows, key)
    return cast(page, "int64") * rows.page + cast(key % rows.page, "int64")


class Rows:
    """The rows of a chunk that one thread copies, one chunk ahead: `count`, STEP slots apart.

    rows     [count] of the chunk at hand, int32 or int64
    there    int32, bit n tells whether row n exists
    sources  int32 [chunks], the number of the source of every CHUNK slots; unless there is one
    """

    def __init__(self, slots: Slots, first: Value, count: int) -> None:
        self.slots, self.first, self.count = slots, first, count
        self.kinds = [s.k.rows for s in slots.sources]
        self.keys = scratch(count, "int32")
        several = len(self.kinds) > 1
        # Several sources leave few registers. Rows are less than 2^31, for each takes 128 bytes.
        self.kind = "int32" if several else "int64"
        self.rows = scratch(count, self.kind)
        self.starts = [
            T.bind(cast(slots.view.sequence.row(k, const(0, "int32")), "int32"))
            if several and not k.paged else None
            for k in self.kinds
        ]  # fmt: skip
        self.there = cell("int32", const(0, "int32"))
        self.pages = scratch(count, "int32") if any(k.paged for k in self.kinds) else None
        self.chunks = count * STEP // CHUNK
        self.sources, self.ahead = (
            scratch(self.chunks, "int32") if several else None for _ in range(2)
        )

    def fetch(self, start: Value) -> None:
        """Start to read the slots of a chunk, the first of which is `start`."""
        for n in range(self.count):
            store(self.keys, self.slots.raw(T.bind(start + (n * STEP) + self.first)), n)

    def resolve(self, start: Value) -> None:
        """Turn what was read into keys, and start to look their pages up."""
        sequence = self.slots.view.sequence
        if len(self.kinds) > 1:
            for n in range(self.chunks):
                store(self.ahead, self.slots.source_of(T.bind(start + n * CHUNK)), n)
        for n in range(self.count):
            slot = T.bind(start + (n * STEP) + self.first)
            key = self.slots.key(slot, load(self.keys, n))
            store(self.keys, key, n)
            if self.pages is None:
                continue
            page = cell("int32", const(0, "int32"))
            for which, kind in enumerate(self.kinds):
                if kind.paged:
                    with T.If(self._of(self.ahead, n, which, key >= 0)), T.Then():
                        put(page, page_of(sequence, kind, key))
            store(self.pages, get(page), n)

    def _of(self, sources: Memory, n: int, which: int, condition: Value) -> Value:
        """Return a condition that holds only if row n is of a source."""
        if len(self.kinds) == 1:
            return condition
        return T.And(condition, equal(load(sources, n * STEP // CHUNK), const(which, "int32")))

    def take(self) -> None:
        """Make the chunk that was looked up the one at hand."""
        zero = const(0, "int32")
        put(self.there, zero)
        if len(self.kinds) > 1:
            for n in range(self.chunks):
                store(self.sources, load(self.ahead, n), n)
        for n in range(self.count):
            key = T.bind(load(self.keys, n))
            bit = select(key >= 0, const(1 << n, "int32"), zero)
            put(self.there, T.bitwise_or(get(self.there), bit))
            near = T.bind(maximum(key, zero))

            def row(which: int, n: int = n, near: Value = near) -> None:
                kind, start = self.kinds[which], self.starts[which]
                page = load(self.pages, n) if kind.paged else None
                if start is not None:
                    row = near + start
                else:
                    row = row_of(self.slots.view.sequence, kind, near, page)
                store(self.rows, cast(row, self.kind), n)

            self.each_source(n * STEP // CHUNK, row)

    def each_source(self, chunk: int, body: Callable[[int], None]) -> None:
        """Emit body(number of a source) for each source, to be run for that of a chunk at hand."""
        if len(self.kinds) == 1:
            body(0)
            return
        for which in range(len(self.kinds)):
            with T.If(equal(load(self.sources, chunk), const(which, "int32"))), T.Then():
                body(which)

    def exists(self, n: int) -> Value:
        """Tell whether row n of the chunk at hand is a key that is seen."""
        return T.bitwise_and(get(self.there), const(1 << n, "int32")) > 0
