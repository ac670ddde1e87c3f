"""Declare the arguments of a kernel, find the sequence of a tile, and address rows (`Rows`).

Positions and rows may be scalars or vectors of lanes; positions are int32, rows int64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsegen.codegen.cpu.vec import alignment
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    broadcast,
    cast,
    const,
    gather,
    lanes_of,
    load,
    maximum,
    minimum,
    scratch,
    store,
)
from sparsegen.lowering.tasks import Buffer, Rows, Task


@dataclass(frozen=True)
class Argument:
    """A tensor argument as a flat array; `shape` are the extents after the rows, with values."""

    buffer: Buffer
    flat: Memory
    rows: Value
    shape: tuple[int | Value, ...]

    @property
    def stride(self) -> int | Value:
        """Return the number of elements of one row (1 for an argument without rows)."""
        total: int | Value = 1
        for extent in self.shape:
            total = extent * total
        return total


@dataclass(frozen=True)
class Arguments:
    """The arguments of a task's function: metadata, and tensors by name."""

    cu_q: Memory
    cu_k: Memory
    q_off: Memory
    batch: Value
    pages: Memory | None  # flat
    max_pages: Value | None
    tensors: dict[str, Argument]

    def __getitem__(self, buffer: Buffer) -> Argument:
        return self.tensors[buffer.name]


def declare(task: Task, scratch: tuple[Buffer, ...] = ()) -> Arguments:
    """Name the function after the task and declare its arguments in the order of the ABI.

    Args:
        scratch: memory that the schedule takes beside the buffers of the task.
    """
    T.func_name(task.name)
    batch, ends_q, ends_k = T.int64(), T.int64(), T.int64()
    metadata: list[tuple[str, tuple[Value, ...]]] = [
        ("cu_q", (ends_q,)),
        ("cu_k", (ends_k,)),
        ("q_off", (batch,)),
    ]
    max_pages = None
    if task.paged:
        max_pages = T.int64()
        metadata.append(("page_table", (batch, max_pages)))
    handles = [(T.arg(name, T.handle()), shape) for name, shape in metadata]
    buffers = (*task.reads, *task.writes, *scratch)
    tensors = [(T.arg(buffer.name, T.handle()), buffer) for buffer in buffers]
    ints = [T.match_buffer(h, shape, "int32", align=4) for h, shape in handles]
    # All matches come first: a flat view opens a frame of the builder.
    matched = [(buffer, *_match(handle, buffer)) for handle, buffer in tensors]
    pages = None
    if task.paged:
        pages = T.decl_buffer((batch * max_pages,), "int32", data=ints[3].data)
    return Arguments(
        cu_q=ints[0],
        cu_k=ints[1],
        q_off=ints[2],
        batch=batch,
        pages=pages,
        max_pages=max_pages,
        tensors={buffer.name: _flat(buffer, *rest) for buffer, *rest in matched},
    )


def _match(handle: Value, buffer: Buffer) -> tuple[Memory, Value, tuple[int | Value, ...]]:
    """Match an argument; return it, its number of rows and the extents after the rows."""
    shape = tuple(T.int64() if n == -1 else n for n in buffer.shape)
    leading: tuple[Value, ...]
    if buffer.rows.space == "none":
        leading, rows = (), const(1, "int64")
    elif buffer.rows.paged:
        pages = T.int64()
        leading, rows = (pages, buffer.rows.page), pages * buffer.rows.page
    else:
        rows = T.int64()
        leading = (rows,)
    align = alignment(buffer.dtype)
    return T.match_buffer(handle, (*leading, *shape), buffer.dtype, align=align), rows, shape


def _flat(buffer: Buffer, whole: Memory, rows: Value, shape: tuple[int | Value, ...]) -> Argument:
    size = rows
    for extent in shape:
        size = size * extent
    return Argument(buffer, T.decl_buffer((size,), buffer.dtype, data=whole.data), rows, shape)


@dataclass(frozen=True)
class Sequence:
    """One sequence of the batch: its number, first rows (int64) and lengths (int32)."""

    arguments: Arguments
    number: Value
    q_start: Value
    k_start: Value
    n_q: Value
    n_k: Value
    q_off: Value

    @staticmethod
    def at(arguments: Arguments, number: Value) -> Sequence:
        """Read the description of sequence `number` (int64)."""
        q = T.bind(load(arguments.cu_q, number))
        k = T.bind(load(arguments.cu_k, number))
        return Sequence(
            arguments=arguments,
            number=number,
            q_start=T.bind(cast(q, "int64")),
            k_start=T.bind(cast(k, "int64")),
            n_q=T.bind(load(arguments.cu_q, number + 1) - q),
            n_k=T.bind(load(arguments.cu_k, number + 1) - k),
            q_off=T.bind(load(arguments.q_off, number)),
        )

    def count(self, rows: Rows) -> Value:
        """Return how many positions `rows` has in this sequence."""
        length = self.n_q if rows.space == "query" else self.n_k
        if rows.space != "entry":
            return length
        assert rows.entries is not None
        length = self.n_k if rows.role == "key" else self.n_q
        if rows.entries.partial:
            return (length + (rows.entries.stride - 1)) // rows.entries.stride
        windows = (length + (rows.entries.stride - rows.entries.width)) // rows.entries.stride
        return maximum(windows, const(0, "int32"))

    def row(self, rows: Rows, position: Value) -> Value:
        """Return the row of a position.

        Args:
            position: absolute (i) for "query", block number (i // block) for "query_block",
                j or e for "key" and "entry"; of no meaning for "batch".
        """
        lanes = lanes_of(position)

        def same(value: Value) -> Value:
            return broadcast(value, lanes)

        p = cast(position, "int64")
        q_off = cast(self.q_off, "int64")
        match rows.space:
            case "query":
                return p + same(self.q_start - q_off)
            case "key" if rows.paged:
                table = self.arguments.pages
                page = const(rows.page, "int64", lanes)
                physical = gather(table, same(self.number * self.arguments.max_pages) + p // page)
                return cast(physical, "int64") * page + p % page
            case "key":
                return p + same(self.k_start)
            case "entry":
                assert rows.entries is not None
                start = self.k_start if rows.role == "key" else self.q_start
                return p + same(start // rows.entries.stride + self.number)
            case "query_block":
                first = self.q_start // rows.block + 2 * self.number - q_off // rows.block
                return p + same(first)
            case "batch":
                return same(self.number)
        return const(0, "int64", lanes)


def tiles(arguments: Arguments, tokens: int) -> Value:
    """Return an upper bound (int64) of the number of tiles of `tokens` queries of all sequences."""
    total = cast(load(arguments.cu_q, arguments.batch), "int64")
    return total // tokens + arguments.batch


def find_tile(arguments: Arguments, tokens: int, index: Value) -> tuple[Sequence, Value]:
    """Return the sequence of a tile and its first local token (int32), n_q or more if it is empty.

    Tile t of sequence b has the index cu_q[b] // tokens + b + t, which leaves gaps but needs no
    work ahead of the kernel.
    """
    number = find_sequence(arguments, lambda b: first_tile(arguments, tokens, b), index)
    local = index - first_tile(arguments, tokens, number)
    sequence = Sequence.at(arguments, number)
    return sequence, T.bind(cast(local * tokens, "int32"))


def find_sequence(arguments: Arguments, first: Callable[[Value], Value], index: Value) -> Value:
    """Return the last sequence b (int64) with first(b) <= index; `first` never decreases."""
    low, high = scratch(1, "int64"), scratch(1, "int64")
    store(low, const(0, "int64"), 0)
    store(high, arguments.batch, 0)
    with T.While(load(low, 0) + 1 < load(high, 0)):
        middle = T.bind((load(low, 0) + load(high, 0)) // 2)
        with T.If(first(middle) <= index):
            with T.Then():
                store(low, middle, 0)
            with T.Else():
                store(high, middle, 0)
    return T.bind(load(low, 0))


def first_tile(arguments: Arguments, tokens: int, number: Value) -> Value:
    """Return the index (int64) of the first tile of a sequence."""
    return cast(load(arguments.cu_q, number), "int64") // tokens + number


def clamp(index: Value, size: Value) -> Value:
    """Return an index of a table inside [0, size - 1]; int32, scalar or vector."""
    lanes = lanes_of(index)
    last = broadcast(size - 1, lanes)
    return maximum(minimum(index, last), const(0, "int32", lanes))


def read_table(
    arguments: Arguments, buffer: Buffer, sequence: Sequence, index: tuple[Value, ...]
) -> Value:
    """Read a table at absolute positions, clamped to its edges; int32 scalars or vectors.

    The first index of a table on the query or key axis is a position of this sequence.
    """
    argument = arguments[buffer]
    lanes = max(lanes_of(i) for i in index)
    indices = [broadcast(i, lanes) for i in index]
    shape = argument.shape
    offset = None
    if buffer.rows.space != "none":
        first, *indices = indices
        low = sequence.q_off if buffer.rows.space == "query" else const(0, "int32")
        local = clamp(first - broadcast(low, lanes), sequence.count(buffer.rows))
        offset = sequence.row(buffer.rows, local + broadcast(low, lanes))
    for i, extent in zip(indices, shape, strict=True):
        size = cast(extent, "int32") if not isinstance(extent, int) else const(extent, "int32")
        step = cast(clamp(i, size), "int64")
        wide = broadcast(const(extent, "int64") if isinstance(extent, int) else extent, lanes)
        offset = step if offset is None else offset * wide + step
    return gather(argument.flat, offset)
