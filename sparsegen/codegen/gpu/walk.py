"""Walk the keys that the queries of a tile may see, a chunk of shared memory at a time."""

from __future__ import annotations

from collections.abc import Callable

from sparsegen.codegen.cpu.stream import Bounds, cell, get, put
from sparsegen.codegen.gpu.launch import sync
from sparsegen.codegen.gpu.view import ThreadView
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    const,
    maximum,
    minimum,
    select,
    store,
)
from sparsegen.lowering.tasks import Clause, Rows

# Handles a chunk: which keys are sure, the number of its first slot, and how many slots have one.
Body = Callable[[Bounds, Value, Value], None]


def walk(
    view: ThreadView,
    clause: Clause,
    rows: Rows,
    head: Value,
    position: Memory,
    keys: int,
    thread: Value,
    threads: int,
    body: Body,
) -> None:
    """Visit the keys of a clause: `body` runs for each chunk with some key, all threads together.

    Args:
        rows: of the keys.
        head: whose list is read, where the clause has lists.
        position: shared int32 [keys], the keys of the chunk at hand; -1 where a slot has none.
            In a range, slot n of the chunk has the key bounds.lo + first + n.
        keys: slots of a chunk.
        thread, threads: the number of this thread in the block, and how many there are.
    """
    length = T.bind(view.sequence.count(rows))
    bounds = view._hull(clause, length, view.i_min, T.bind(view.i_min + view.present - 1))
    find, count = finder(view, clause, bounds, head)
    start = cell("int32", const(0, "int32"))
    with T.While(get(start) < count):
        first = T.bind(get(start))
        some = cell("int32", const(0, "int32"))
        for step in range(0, keys, threads):
            slot = T.bind(thread + step)
            with T.If(slot < keys), T.Then():
                j = T.bind(find(first + slot))
                store(position, j, slot)
                put(some, T.bitwise_or(get(some), cast(j >= 0, "int32")))
        found = cell("int32", const(0, "int32"))
        put(found, cast(T.cuda.syncthreads_or(get(some)), "int32"))
        with T.If(get(found) > 0), T.Then():
            body(bounds, first, T.bind(minimum(const(keys, "int32"), count - first)))
        sync()
        put(start, first + keys)


def finder(
    view: ThreadView, clause: Clause, bounds: Bounds, head: Value
) -> tuple[Callable[[Value], Value], Value]:
    """Return what finds the key of a slot, and how many slots there are."""
    none = const(-1, "int32")
    if clause.keys is None:
        size = T.bind(maximum(bounds.hi - bounds.lo, const(0, "int32")))
        return lambda n: select(n < size, bounds.lo + n, none), size
    listed = clause.keys
    found = view.list_of(listed.member, view.i_min, head)
    granule = listed.granule
    count = T.bind(found.width * granule)

    def find(n: Value) -> Value:
        key = cell("int32", none)
        with T.If(n < count), T.Then():
            x = T.bind(found.item(const(0, "int32"), n // granule))
            if listed.slash:
                j = T.bind(view.i_min - x)
            else:
                # Items beyond every key could pass 2^31 as keys.
                last = T.bind((bounds.hi - 1 + listed.shift) // granule)
                near = T.bind(minimum(x, last + 1))
                j = T.bind(near * granule - listed.shift + n % granule)
            ok = T.And(x >= 0, T.And(j >= bounds.lo, j < bounds.hi))
            with T.If(ok), T.Then():
                put(key, j)
        return get(key)

    return find, count
