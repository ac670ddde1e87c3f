"""Look at an item of `tiled` attention, tell the groups that compute about it, load its queries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.rows import Sequence
from sparsegen.codegen.cpu.stream import Bounds, pin
from sparsegen.codegen.gpu.tiled_cut import FACTS
from sparsegen.codegen.gpu.tma import Source
from sparsegen.codegen.gpu.union import list_at
from sparsegen.codegen.gpu.wgmma import TILE
from sparsegen.codegen.tvm import Memory, T, Value, cast, const, load, select, store
from sparsegen.lowering.tasks import Rows

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.tiled import TiledKernel


@dataclass(frozen=True)
class Item:
    """A tile of queries of neighbouring heads, from token `first` and head `head` on.

    entry    its number among what can be repaired
    hulls    what warp groups see of each clause: by group, by clause
    present  how many tokens of each warp group exist
    blocks   how many blocks its united list has; None without lists
    united   where that list starts
    """

    sequence: Sequence
    first: Value
    head: Value
    entry: Value
    hulls: list[list[Bounds]]
    present: list[Value]
    blocks: Value | None
    united: Value | None


def look(kernel: TiledKernel, sequence: Sequence, first: Value, tile: Value, group: Value) -> Item:
    """Return the item of a tile of queries and a group of heads (int64)."""
    cut, none = kernel.cut, const(0, "int32")
    head = T.bind(cast(group, "int32") * cut.heads)
    hulls, presents = [], []
    for g in range(cut.groups):
        view, present = kernel.group_view(sequence, first, g)
        some = T.bind(present > 0)
        mine = []
        for n, (source, clause) in enumerate(kernel.clauses):
            spans = kernel.spans
            known = None if spans is None else spans.bounds(sequence, first, g, n)
            if known is not None:
                mine.append(known)
                continue
            length = T.bind(sequence.count(source.k.rows))
            last = T.bind(view.i_min + view.present - 1)
            found = view._hull(clause, length, view.i_min, last)
            ends = [pin(select(some, e, none)) for e in (found.lo, found.hi)]
            mine.append(Bounds(ends[0], ends[1], found.sure_lo, found.sure_hi))
        hulls.append(mine)
        presents.append(present)
    blocks = united = None
    if kernel.united is not None:
        united = list_at(kernel, tile, group)
        blocks = pin(load(kernel.united.flat, united))
    entry = T.bind(cast((group * kernel.tiles + tile) * cut.groups, "int32"))
    return Item(sequence, first, head, entry, hulls, presents, blocks, united)


def tell(kernel: TiledKernel, item: Item, base: Value, chunks: Value) -> None:
    """Write what the groups need to know about an item of so many chunks, from word `base` on."""
    sequence, twice = item.sequence, const(0, "int32")
    if item.united is not None:
        assert kernel.united is not None
        twice = load(kernel.united.flat, item.united + 1)
    values = {
        "there": const(1, "int32"), "chunks": chunks, "head": item.head,
        "first": item.first, "entry": item.entry, "twice": twice,
        "number": cast(sequence.number, "int32"),
        "q_start": cast(sequence.q_start, "int32"),
        "k_start": cast(sequence.k_start, "int32"), "n_q": sequence.n_q,
        "n_k": sequence.n_k, "q_off": sequence.q_off,
    }  # fmt: skip
    for n, name in enumerate(FACTS):
        store(kernel.info, values[name], base + n)
    for g, mine in enumerate(item.hulls):
        for n, bounds in enumerate(mine):
            for k, end in enumerate(bounds.ends):
                store(kernel.info, end, kernel.hull_at(base, g, n) + k)


def query_bytes(item: Item, source: Source, panels: range) -> Value:
    """Return the bytes of some panels of the queries of an item."""
    size, each = const(0, "uint32"), len(panels) * source.panel_bytes
    for present in item.present:
        size = size + select(present > 0, const(each, "uint32"), const(0, "uint32"))
    return T.bind(size)


def load_queries(
    item: Item, source: Source, panels: range, tokens: int, to: Memory, first: Value, barrier: Value
) -> None:
    """Start to load some panels of the queries of an item, of so many tokens of each warp group."""
    start = T.bind(cast(item.sequence.q_start, "int32") + item.first)
    for g, present in enumerate(item.present):
        row, at = start + g * tokens, first + g * (len(panels) * TILE)
        with T.If(present > 0), T.Then():
            wanted = panels if source.apart else None
            source.load(to, at, barrier, partial(_always, row), item.head, wanted)


def _always(row: Value, rows: Rows) -> Value:
    """Return a row that is known, whatever it is a row of."""
    return row
