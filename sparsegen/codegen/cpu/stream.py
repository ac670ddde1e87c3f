"""Walk the keys that a tile of queries may see, and hand them over in compact chunks.

Ranges, lists of keys or blocks, and lists that differ between the tokens of a tile all become the
same thing: a chunk of key positions, `count` of which are real. Slots up to the next multiple of
the register tile repeat the last real key, so that microkernels may read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    const,
    dtype_of,
    equal,
    lanes_of,
    load,
    maximum,
    minimum,
    scratch,
    store,
)

NEVER = 2**31 - 1  # later than every item of a list

# Handles a chunk: number of keys (int32), and whether masks must be evaluated.
Body = Callable[[Value, Value], None]


def cell(dtype: str, value: Value) -> Memory:
    """Return a mutable scalar."""
    memory = scratch(1, dtype)
    store(memory, value, 0)
    return memory


def pin(value: Value) -> Value:
    """Compute a scalar or a vector once, through memory; LLVM removes the detour.

    A bound variable is not enough: TVM's simplifier unfolds choices and quotients into everything
    derived from them, and compile times explode.
    """
    lanes = lanes_of(value)
    memory = scratch(lanes, dtype_of(value))
    store(memory, value, 0)
    return T.bind(load(memory, 0, lanes=lanes))


def get(memory: Memory) -> Value:
    """Read a mutable scalar."""
    return load(memory, 0)


def put(memory: Memory, value: Value) -> None:
    """Write a mutable scalar."""
    store(memory, value, 0)


@dataclass(frozen=True)
class Chunk:
    """Key positions, and where the tokens of a tile have different lists, who sees each key.

    position  int32 [size]
    members   int32 [size]: bit t is set if token t lists the key; None if all tokens share a list
    step      register tile: `size` is a multiple of it
    """

    size: int
    step: int
    position: Memory
    members: Memory | None

    @staticmethod
    def allocate(size: int, step: int, *, members: bool) -> Chunk:
        """Allocate a chunk of `size` keys."""
        bits = T.alloc_buffer((size,), "int32") if members else None
        return Chunk(size, step, T.alloc_buffer((size,), "int32"), bits)

    def padded(self, count: Value) -> Value:
        """Return the number of slots that a microkernel reads for `count` keys."""
        return (count + (self.step - 1)) // self.step * self.step

    def pad(self, count: Value) -> None:
        """Repeat the last of `count` > 0 keys up to the next multiple of the register tile."""
        last = T.bind(load(self.position, count - 1))
        with T.serial(self.padded(count) - count) as extra:
            store(self.position, last, count + extra)


@dataclass(frozen=True)
class Bounds:
    """Keys lo <= j < hi may be seen; those with sure_lo <= j < sure_hi need no mask (all int32)."""

    lo: Value
    hi: Value
    sure_lo: Value
    sure_hi: Value

    @property
    def ends(self) -> tuple[Value, ...]:
        """Return all four, in order."""
        return self.lo, self.hi, self.sure_lo, self.sure_hi


def walk_ranges(
    chunk: Chunk, ranges: Sequence[Bounds], body: Callable[[Value, Value, Value | int], None]
) -> None:
    """Visit the keys lo <= j < hi of each range in order; `body` is also told which range it is.

    Several ranges are rows of a table that one loop goes through, since the code for a chunk is
    long.
    """
    if len(ranges) == 1:
        walk_range(chunk, ranges[0], lambda count, masked: body(count, masked, 0))
        return
    table = [T.alloc_buffer((len(ranges),), "int32") for _ in range(4)]
    for n, each in enumerate(ranges):
        for memory, end in zip(table, each.ends, strict=True):
            store(memory, end, n)
    with T.serial(len(ranges)) as n:
        bounds = Bounds(*(T.bind(load(memory, n)) for memory in table))
        walk_range(chunk, bounds, lambda count, masked: body(count, masked, n))


def walk_range(chunk: Chunk, bounds: Bounds, body: Body) -> None:
    """Visit the keys lo <= j < hi in order."""
    keys = T.bind(maximum(bounds.hi - bounds.lo, const(0, "int32")))
    with T.serial((keys + (chunk.size - 1)) // chunk.size) as n:
        first = T.bind(bounds.lo + n * chunk.size)
        count = T.bind(minimum(const(chunk.size, "int32"), bounds.hi - first))
        with T.serial(chunk.padded(count)) as slot:
            store(chunk.position, first + minimum(slot, count - 1), slot)
        sure = T.And(first >= bounds.sure_lo, first + count <= bounds.sure_hi)
        body(count, T.Not(sure))


@dataclass(frozen=True)
class Items:
    """Lists of items: `item(t, slot)` (int32) of token t at the slots begin <= slot < end.

    Item x stands for the keys [x * granule - shift, (x + 1) * granule - shift), or, where `slash`
    gives the position i of token t, for the key i - x. Items below 0 or beyond the keys are left
    out.
    """

    item: Callable[[Value, Value], Value]
    begin: Value
    end: Value
    granule: int
    shift: int
    slash: Callable[[Value], Value] | None


class _Filler:
    """Copies ranges of keys into a chunk and notes whether all of them are sure."""

    def __init__(self, chunk: Chunk, bounds: Bounds) -> None:
        self.chunk, self.bounds = chunk, bounds
        self.count = cell("int32", const(0, "int32"))
        self.masked = cell("int32", const(0, "int32"))
        self.next = cell("int32", const(0, "int32"))
        self.stop = cell("int32", const(0, "int32"))
        self.bits = cell("int32", const(0, "int32"))

    def clear(self) -> None:
        put(self.count, const(0, "int32"))
        put(self.masked, const(0, "int32"))

    def pending(self) -> Value:
        return get(self.next) < get(self.stop)

    def room(self) -> Value:
        return get(self.count) < self.chunk.size

    def open(self, first: Value, granule: int) -> None:
        """Take the keys [first, first + granule), cut to the bounds, as pending."""
        put(self.next, maximum(first, self.bounds.lo))
        put(self.stop, minimum(first + granule, self.bounds.hi))

    def take(self, everyone: Value | None) -> None:
        """Move pending keys into the chunk while there is room."""
        chunk, bounds = self.chunk, self.bounds
        count, first = T.bind(get(self.count)), T.bind(get(self.next))
        room = const(chunk.size, "int32") - count
        taken = T.bind(maximum(minimum(room, get(self.stop) - first), const(0, "int32")))
        bits = None if everyone is None else T.bind(get(self.bits))
        with T.serial(taken) as n:
            store(chunk.position, first + n, count + n)
            # A list that every token shares, beside lists of single tokens, needs no bits.
            if bits is not None and chunk.members is not None:
                store(chunk.members, bits, count + n)
        unsure = T.Or(first < bounds.sure_lo, first + taken > bounds.sure_hi)
        if bits is not None:
            unsure = T.Or(unsure, T.Not(equal(bits, everyone)))
        with T.If(T.And(taken > 0, unsure)), T.Then():
            put(self.masked, const(1, "int32"))
        put(self.count, count + taken)
        put(self.next, first + taken)

    def flush(self, body: Body) -> None:
        with T.If(get(self.count) > 0), T.Then():
            count = T.bind(get(self.count))
            self.chunk.pad(count)
            body(count, get(self.masked) > 0)


def walk_list(chunk: Chunk, bounds: Bounds, items: Items, body: Body) -> None:
    """Visit the keys of one list that every row of the tile shares."""
    filler = _Filler(chunk, bounds)
    slot = cell("int32", items.begin)
    token = const(0, "int32")
    last = T.bind((bounds.hi - 1 + items.shift) // items.granule)
    with T.While(T.Or(get(slot) < items.end, filler.pending())):
        filler.clear()
        with T.While(T.And(filler.room(), T.Or(get(slot) < items.end, filler.pending()))):
            with T.If(T.Not(filler.pending())), T.Then():
                x = T.bind(items.item(token, get(slot)))
                put(slot, get(slot) + 1)
                with T.If(T.And(x >= 0, x <= last)), T.Then():
                    filler.open(x * items.granule - items.shift, items.granule)
            filler.take(None)
        filler.flush(body)


def walk_merged(
    chunk: Chunk, bounds: Bounds, items: Items, tokens: int, present: Value, body: Body
) -> None:
    """Visit the keys of `tokens` lists, those they share once: a merge of cursors.

    Every list is consumed slot by slot, so lists need not be sorted to be right; sorted ones meet.

    Args:
        present: int32 number of tokens that exist.
    """
    filler = _Filler(chunk, bounds)
    cursor = T.alloc_buffer((tokens,), "int32")
    rank = T.alloc_buffer((tokens,), "int32")  # where the next item of each token comes in order
    best = cell("int32", const(NEVER, "int32"))
    everyone = T.bind(T.shift_left(const(2, "int32"), present - 1) - 1)
    last = T.bind((bounds.hi - 1 + items.shift) // items.granule)

    def advance(t: Value) -> None:
        store(rank, const(NEVER, "int32"), t)
        with T.While(
            T.And(load(cursor, t) < items.end, equal(load(rank, t), const(NEVER, "int32")))
        ):
            x = T.bind(items.item(t, load(cursor, t)))
            store(cursor, load(cursor, t) + 1, t)
            if items.slash is None:
                with T.If(T.And(x >= 0, x <= last)), T.Then():
                    store(rank, x, t)
            else:
                key = T.bind(items.slash(t) - x)
                inside = T.And(key >= bounds.lo, key < bounds.hi)
                with T.If(T.And(x >= 0, inside)), T.Then():
                    store(rank, const(0, "int32") - key, t)

    def choose() -> None:
        put(best, const(NEVER, "int32"))
        with T.serial(present) as t:
            put(best, minimum(get(best), load(rank, t)))

    def open_next() -> None:
        first = T.bind(get(best))
        put(filler.bits, const(0, "int32"))
        with T.serial(present) as t, T.If(equal(load(rank, t), first)), T.Then():
            put(filler.bits, T.bitwise_or(get(filler.bits), T.shift_left(const(1, "int32"), t)))
            advance(t)
        if items.slash is None:
            filler.open(first * items.granule - items.shift, items.granule)
        else:
            filler.open(const(0, "int32") - first, 1)
        choose()

    with T.serial(present) as t:
        store(cursor, items.begin, t)
        advance(t)
    choose()
    more = T.Or(get(best) < NEVER, filler.pending())
    with T.While(more):
        filler.clear()
        with T.While(T.And(filler.room(), more)):
            with T.If(T.Not(filler.pending())), T.Then():
                open_next()
            filler.take(everyone)
        filler.flush(body)
