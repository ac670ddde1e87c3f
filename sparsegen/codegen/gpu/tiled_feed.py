"""Feed the groups that compute `tiled` attention: one thread takes items and starts all loads.

Where a chunk is several boxes, of blocks that are listed apart or of pages that are shorter than a
chunk, the lanes of a warp do so together: each finds out where its box lies, says who sees it, and
loads it, and barriers wait for all of them. It costs a copy for each box and 64 columns instead
of one for all of them, some agreeing among lanes, and where a list ends in the middle of a chunk,
its last block again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.rows import Sequence, find_tile
from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.gpu.launch import FULL
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.ring import Cursor, Ring
from sparsegen.codegen.gpu.tiled_cut import (
    entry_words,
    member_words,
    query_elements,
)
from sparsegen.codegen.gpu.tiled_items import Item, load_queries, look, query_bytes, tell
from sparsegen.codegen.gpu.tiled_status import status_of
from sparsegen.codegen.gpu.tiled_weights import uniform
from sparsegen.codegen.gpu.tma import COLUMNS, Source
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
from sparsegen.lowering.tasks import Clause, KeySource, Rows

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.tiled import TiledKernel


class Feed:
    """The thread that feeds a block, or the warp."""

    def __init__(
        self, kernel: TiledKernel, queries: Source, sources: list[tuple[Source, Source]]
    ) -> None:
        self.kernel, self.cut = kernel, kernel.cut
        self.queries, self.sources = queries, sources
        self.at = Cursor(kernel.cut.stages)
        self.item_at = Cursor(kernel.cut.queries)
        self.turn = cell("int32", const(0, "int32"))
        self.sent = cell("int32", const(0, "int32"))  # chunks of the item
        self.alone = self.cut.boxes == 1
        self.early = self._count_early()
        # The box of this lane; lanes beyond the boxes do what the first ones do, but load nothing.
        self.box = self.block = const(0, "int32")
        if not self.alone:
            self.box = T.bind(kernel.lane % self.cut.boxes)
        if self.cut.parts > 1:
            self.block = T.bind(self.box * self.cut.box // self.cut.block)

    def run(self) -> None:
        """Emit the loop over items."""
        kernel = self.kernel
        item = cell("int32", self._next())
        with T.While(get(item) < cast(kernel.items, "int32")):
            self._take(T.bind(cast(get(item), "int64")))
            put(item, self._next())
        kernel.item_free.wait_before(self.item_at)
        with self._lanes(1):
            store(kernel.info, const(0, "int32"), self._base())
            kernel.item_ready.arrive(self.item_at.stage)

    def _next(self) -> Value:
        taken = T.cuda.atomic_add(self.kernel.state.ptr_to([0]), const(1, "int32"))
        if self.alone:
            return T.bind(taken)
        found = cell("int32", const(0, "int32"))
        with self._lanes(1):
            put(found, taken)
        return uniform(get(found))

    @contextmanager
    def _lanes(self, count: int) -> Iterator[None]:
        """Let the first lanes do what is emitted inside: one, or each that has a box."""
        if self.alone:
            yield
        else:
            with T.If(self.kernel.lane < count), T.Then():
                yield

    def _wait(self, ring: Ring, at: Cursor) -> None:
        """Wait until a stage is given back, all lanes: one may not go on while another polls."""
        ring.wait_before(at)
        self._join()

    def _join(self) -> None:
        """Wait for what the other lanes wrote."""
        if not self.alone:
            ptx("bar.warp.sync", const(FULL, "uint32"))

    def _base(self) -> Value:
        return T.bind(get(self.turn) % self.kernel.info_slots * self.kernel.info_words)

    def _take(self, number: Value) -> None:
        kernel, cut = self.kernel, self.cut
        # Causal work grows with the position: the longest items start first.
        tile = T.bind(kernel.tiles - 1 - number % kernel.tiles)
        group = T.bind(number // kernel.tiles)
        sequence, first = find_tile(kernel.arguments, cut.all_tokens, tile)
        with T.If(first < sequence.n_q), T.Then():
            item = look(kernel, sequence, first, tile, group)
            begin = partial(self._begin, item)
            if cut.resident:
                self._send_resident(item)
            if not self.early:
                begin()
            put(self.sent, const(0, "int32"))
            for n, (source, clause) in enumerate(kernel.clauses):
                self.begin = begin if n == 0 and self.early else None
                if clause.keys is None:
                    self._range(item, n, source)
                else:
                    self._list(item, n, source, clause)
                if self.begin is not None:
                    with T.If(get(self.sent) <= self.early), T.Then():
                        begin()

    def _count_early(self) -> int:
        """Return how many chunks of an item are sent before its queries.

        Queries wait until those of the item before are used, and keys need not wait as well. Their
        stages come free whatever becomes of these queries: there are fewer than a round of them.
        Lanes that know of a box each, or of many members, lack registers for it.
        """
        cut = self.cut
        simple = self.alone and (self.kernel.united is None or member_words(cut) == 1)
        return cut.stages - 1 - min(cut.resident, 1) if cut.queries == 1 and simple else 0

    def _begin(self, item: Item) -> None:
        """Tell the groups about an item, and load its queries."""
        self._wait(self.kernel.item_free, self.item_at)
        with self._lanes(1):
            tell(self.kernel, item, self._base(), self._chunks(item))
            self._load_queries(item)
        self.item_at.advance()
        put(self.turn, get(self.turn) + 1)

    def _load_queries(self, item: Item) -> None:
        kernel, cut, stage = self.kernel, self.cut, self.item_at.stage
        panels = range(cut.resident, self.queries.panels)
        kernel.item_ready.expect(stage, query_bytes(item, self.queries, panels))
        to = stage * (cut.groups * query_elements(kernel.task, cut))
        barrier = kernel.item_ready.pointer(stage)
        load_queries(item, self.queries, panels, cut.tokens, kernel.queries, to, barrier)

    def _send_resident(self, item: Item) -> None:
        """Send the queries that stay in registers, in the place of a chunk."""
        kernel, cut, at = self.kernel, self.cut, self.at
        panels = range(cut.resident)
        self._wait(kernel.keys_free, at)
        if not cut.joint:
            self._wait(kernel.values_free, at)
        size = query_bytes(item, self.queries, panels)
        with self._lanes(cut.boxes):
            # Barriers wait for as many lanes as they do for boxes.
            if not self.alone:
                size = T.bind(select(kernel.lane < 1, size, const(0, "uint32")))
            kernel.keys_ready.expect(at.stage, size)
            if not cut.joint:
                kernel.values_ready.arrive(at.stage)
        with self._lanes(1):
            to, barrier = T.bind(at.stage * kernel.stage), kernel.keys_ready.pointer(at.stage)
            load_queries(item, self.queries, panels, cut.tokens, kernel.chunks, to, barrier)
        at.advance()

    # --- chunks ---------------------------------------------------------------------------------

    def _span(self, item: Item, n: int) -> tuple[Value, Value]:
        """Return the first key of the first chunk of a range, and the end of the last."""
        lo, hi = const(2**31 - 1, "int32"), const(0, "int32")
        for mine in item.hulls:
            some = T.bind(mine[n].lo < mine[n].hi)
            lo = pin(select(some, minimum(lo, mine[n].lo), lo))
            hi = pin(select(some, maximum(hi, mine[n].hi), hi))
        if self.kernel.task.paged:
            lo = T.bind(lo // self.cut.box * self.cut.box)
        return T.bind(minimum(lo, hi)), hi

    def _per_block(self, clause: Clause) -> int:
        """Return the chunks of a listed block, 1 if a chunk has several blocks."""
        assert clause.keys is not None
        return clause.keys.granule // self.cut.block

    def _chunks(self, item: Item) -> Value:
        total = const(0, "int32")
        for n, (_, clause) in enumerate(self.kernel.clauses):
            if clause.keys is None:
                lo, hi = self._span(item, n)
                total = total + (hi - lo + (self.cut.keys - 1)) // self.cut.keys
            else:
                assert item.blocks is not None
                blocks = item.blocks
                if self.cut.parts > 1:
                    blocks = (blocks + (self.cut.parts - 1)) // self.cut.parts
                total = total + blocks * self._per_block(clause)
        return T.bind(total)

    def _range(self, item: Item, n: int, source: KeySource) -> None:
        lo, hi = self._span(item, n)
        start = cell("int32", lo)
        with T.While(get(start) < hi):
            j = T.bind(get(start))
            self._chunk(item, n, source, j, end=hi)
            put(start, j + self.cut.keys)

    def _list(self, item: Item, n: int, source: KeySource, clause: Clause) -> None:
        united, blocks, start_at = self.kernel.united, item.blocks, item.united
        assert united is not None
        assert blocks is not None
        assert start_at is not None
        assert clause.keys is not None
        size = 1 + member_words(self.cut)
        words = scratch(size, "int32")
        ahead = scratch(size, "int32")

        def fetch(number: Value) -> None:
            mine = number
            if self.cut.parts > 1:
                # Beyond its end, the list has the last block again, which nobody sees.
                mine = T.bind(number + self.block)
                number = minimum(mine, blocks - 1)
            at = T.bind(start_at + cast((number + 1) * entry_words(self.cut), "int64"))
            for word in range(size):
                found = load(united.flat, at + word)
                if self.cut.parts > 1 and word > 0:
                    found = select(mine < blocks, found, const(0, "int32"))
                store(ahead, found, word)

        number = cell("int32", const(0, "int32"))
        with T.If(blocks > 0), T.Then():
            fetch(const(0, "int32"))
        with T.While(get(number) < blocks):
            for word in range(size):
                store(words, load(ahead, word), word)
            put(number, get(number) + self.cut.parts)
            with T.If(get(number) < blocks), T.Then():
                fetch(get(number))
            with T.serial(self._per_block(clause)) as part:
                start = load(words, 0) * clause.keys.granule + part * self.cut.block
                self._chunk(item, n, source, T.bind(start), words)

    def _chunk(
        self, item: Item, n: int, source: KeySource, j: Value, words: Memory | None = None,
        end: Value | None = None,
    ) -> None:  # fmt: skip
        """Send a chunk that starts at key j, or whose block of this lane does.

        Args:
            words: say who sees it, where lists do.
            end: of the range that it is of, where it is of one.
        """
        kernel, cut, at = self.kernel, self.cut, self.at
        if self.begin is not None:
            with T.If(equal(get(self.sent), const(self.early, "int32"))), T.Then():
                self.begin()
            put(self.sent, get(self.sent) + 1)
        which = next(k for k, s in enumerate(kernel.task.sources) if s is source)
        keys, values = self.sources[which]

        row: Callable[[Rows], Value] = partial(_row, item.sequence, j)
        if not self.alone:
            row = self._boxes(item, source, j, cut.keys if words is None else cut.block)
        key_head = T.bind(item.head // kernel.task.group)
        status = status_of(kernel, item, n, j, words, end)
        self._wait(kernel.keys_free, at)
        meta = T.bind(at.stage * kernel.meta_words + self.block * kernel.block_words)
        origin = j - self.block * cut.block if words is not None else j
        with self._lanes(self.cut.boxes):
            store(kernel.meta, origin, meta)
            store(kernel.meta, status, meta + 1)
            if words is not None:
                for word in range(member_words(cut)):
                    store(kernel.meta, load(words, 1 + word), meta + (2 + word))
        sizes = keys.bytes, values.bytes
        if cut.joint:
            sizes = keys.bytes + values.bytes, 0
        first = T.bind(at.stage * kernel.stage)
        self._load(keys, first, kernel.keys_ready, sizes[0], row, key_head)
        if not cut.joint:
            self._wait(kernel.values_free, at)
        first = first + cut.keys * keys.operand.dim
        self._load(values, first, kernel.values_ready, sizes[1], row, key_head)
        at.advance()

    def _boxes(
        self, item: Item, source: KeySource, j: Value, length: int
    ) -> Callable[[Rows], Value]:
        """Look up where the box of this lane lies, one of several in `length` keys from j on."""
        sequence, near = item.sequence, T.bind(j + self.box * self.cut.box % length)
        # No page is asked for that the sequence does not have.
        near = T.bind(select(near < sequence.count(source.k.rows), near, j))
        operands = (source.k, source.v)
        rows = dict.fromkeys(part.buffer.rows for x in operands for part in x.parts)
        return {r: _row(sequence, near, r) for r in rows}.__getitem__

    def _load(
        self, source: Source, first: Value, ready: Ring, size: int,
        row: Callable[[Rows], Value], head: Value,
    ) -> None:  # fmt: skip
        """Start to load the keys or values of a chunk, each lane its box.

        Args:
            size: the bytes of a box, and of what else arrives there; 0: they are expected already.
        """
        cut, stage = self.cut, self.at.stage
        if not self.alone:
            first = first + self.box * (cut.box * COLUMNS)
        with self._lanes(self.cut.boxes):
            if size:
                ready.expect(stage, size)
            source.load(self.kernel.chunks, first, ready.pointer(stage), row, head)


def _row(sequence: Sequence, j: Value, rows: Rows) -> Value:
    """Return the row of a key."""
    return T.bind(cast(sequence.row(rows, j), "int32"))
