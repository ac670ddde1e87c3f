"""Put rows of queries into SIMD lanes, and take rows of outputs out of them.

A row is a (query token, query head) pair. The rows of a tile share their key head and, where a
selection drives the iteration, its list. Lane r of a tile holds token r // heads and head
r % heads. Lanes are grouped in vectors of `width`, `vectors` of which form a sub-tile: what the
microkernels hold in registers. Transposed arrays are [sub-tile][element][vectors * width].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsegen.codegen.cpu.vec import load_f32, store_f32, transpose
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    load,
    minimum,
    store,
)
from sparsegen.ir.expr import Expr


@dataclass(frozen=True)
class Tile:
    """The shape of a tile: `tokens` by `heads` rows in sub-tiles of `vectors` * `width` lanes."""

    tokens: int
    heads: int
    width: int
    vectors: int

    @property
    def lanes(self) -> int:
        """Return the lanes of one sub-tile."""
        return self.width * self.vectors

    @property
    def subtiles(self) -> int:
        """Return the number of sub-tiles."""
        return -(-self.tokens * self.heads // self.lanes)

    @property
    def rows(self) -> int:
        """Return the lanes of the whole tile; the last ones may stand for no row."""
        return self.subtiles * self.lanes

    def place(self, vector: Value, dim: int, element: int) -> Value:
        """Return where a vector of rows has an element, in [sub-tile][dim][lanes]."""
        sub, v = vector // self.vectors, vector % self.vectors
        return (sub * dim + element) * self.lanes + v * self.width


@dataclass(frozen=True)
class Lanes:
    """What each lane of the tile at hand stands for; lanes without a row repeat a valid one."""

    tile: Tile
    row: Memory  # int64: row of the query and output buffers
    head: Memory  # int32: query head
    position: Memory  # int32: absolute query position
    token: Memory  # int32: local token of the tile
    valid: Memory  # int32: 1 for lanes that stand for a row

    @staticmethod
    def fill(tile: Tile, first_row: Value, first_head: Value, first: Value, count: Value) -> Lanes:
        """Describe the tile of `count` <= tokens tokens.

        Args:
            first_row: int64 row of the first token; the others follow.
            first_head: int32 first head.
            first: int32 absolute position of the first token.
            count: int32 number of tokens that exist, at least one.
        """
        names = ("int64", "int32", "int32", "int32", "int32")
        lanes = Lanes(tile, *(T.alloc_buffer((tile.rows,), dtype) for dtype in names))
        with T.serial(tile.rows) as r:
            t = T.bind(minimum(r // tile.heads, count - 1))
            h = r % tile.heads
            store(lanes.row, first_row + cast(t, "int64"), r)
            store(lanes.head, first_head + h, r)
            store(lanes.position, first + t, r)
            store(lanes.token, t, r)
            store(lanes.valid, cast(r < count * tile.heads, "int32"), r)
        return lanes

    def element(self, r: Value, heads: int, dim: int) -> Value:
        """Return the first element of lane r in a flat [row, heads, dim]."""
        return (load(self.row, r) * heads + cast(load(self.head, r), "int64")) * dim


@dataclass(frozen=True)
class Column:
    """Elements [start, start + size) of each row of a flat buffer of rows of `stride` elements.

    `offset` is the int64 element offset of the part for a head (its int32 query head), inside a
    row.
    """

    memory: Memory
    dtype: str
    stride: int
    size: int
    offset: Callable[[Value], Value]
    fn: Expr | None = None

    def base(self, lanes: Lanes, r: Value) -> Value:
        """Return the offset of the first element for lane r."""
        return load(lanes.row, r) * self.stride + self.offset(load(lanes.head, r))


def load_queries(lanes: Lanes, columns: list[Column]) -> Memory:
    """Return the queries of a tile as float32 [sub-tile][element][lanes]."""
    dim = sum(c.size for c in columns)
    tile, width = lanes.tile, lanes.tile.width
    out = T.alloc_buffer((tile.subtiles * dim * tile.lanes,), "float32")

    def element(value: Value, fn: Expr | None) -> Value:
        return value if fn is None else emit(fn, Env(symbols={"x": T.bind(value)}))

    with T.serial(tile.rows // width) as vector:
        first = vector * width
        done = 0
        for column in columns:
            bases = [T.bind(column.base(lanes, first + n)) for n in range(width)]
            at = T.bind(tile.place(vector, dim, done))
            with T.serial(column.size // width) as c:
                rows = [
                    T.bind(load_f32(column.memory, column.dtype, base + c * width, lanes=width))
                    for base in bases
                ]
                for d, values in enumerate(transpose(rows)):
                    store(out, element(values, column.fn), at + (c * width + d) * tile.lanes)
            whole = column.size // width * width
            with T.serial(width) as n:
                base = T.bind(column.base(lanes, first + n))
                with T.serial(column.size - whole) as d:
                    value = load_f32(column.memory, column.dtype, base + (whole + d))
                    store(out, element(value, column.fn), at + (whole + d) * tile.lanes + n)
            done += column.size
    return out


def load_query_pairs(lanes: Lanes, columns: list[Column]) -> Memory:
    """Return bfloat16 queries as int32 [sub-tile][pair of elements][lanes].

    Every column has an even size.
    """
    dim = sum(c.size for c in columns) // 2
    tile, width = lanes.tile, lanes.tile.width
    out = T.alloc_buffer((tile.subtiles * dim * tile.lanes,), "int32")

    with T.serial(tile.rows // width) as vector:
        first = vector * width
        done = 0
        for column in columns:
            bases = [T.bind(column.base(lanes, first + n)) for n in range(width)]
            at = T.bind(tile.place(vector, dim, done))
            pairs = column.size // 2
            with T.serial(pairs // width) as c:
                rows = [
                    T.bind(load_pairs(column.memory, base + c * (2 * width), width))
                    for base in bases
                ]
                for d, values in enumerate(transpose(rows)):
                    store(out, values, at + (c * width + d) * tile.lanes)
            whole = pairs // width * width
            with T.serial(width) as n:
                base = T.bind(column.base(lanes, first + n))
                with T.serial(pairs - whole) as d:
                    value = load_pairs(column.memory, base + 2 * (whole + d), 1)
                    store(out, value, at + (whole + d) * tile.lanes + n)
            done += pairs
    return out


def load_pairs(memory: Memory, index: Value, lanes: int) -> Value:
    """Read `lanes` pairs of 16-bit elements as int32, the first of each pair in the low half."""
    halves = load(memory, index, lanes=2 * lanes)
    return T.reinterpret("int32" if lanes == 1 else f"int32x{lanes}", halves)


def store_outputs(
    lanes: Lanes, values: Memory, dim: int, scale: Memory, memory: Memory, dtype: str, heads: int
) -> None:
    """Write `values` [sub-tile][dim][lanes] times `scale` [rows] to flat [row, heads, dim]."""
    tile, width = lanes.tile, lanes.tile.width

    with T.serial(tile.rows // width) as vector:
        first = vector * width
        at = T.bind(tile.place(vector, dim, 0))
        factor = T.bind(load(scale, first, lanes=width))
        bases = [T.bind(lanes.element(first + n, heads, dim)) for n in range(width)]
        with T.serial(dim // width) as c:
            columns = [
                T.bind(load(values, at + (c * width + d) * tile.lanes, lanes=width) * factor)
                for d in range(width)
            ]
            for n, row in enumerate(transpose(columns)):
                with T.If(load(lanes.valid, first + n) > 0), T.Then():
                    store_f32(memory, dtype, row, bases[n] + c * width)
        done = dim // width * width
        with T.serial(width) as n, T.If(load(lanes.valid, first + n) > 0), T.Then():
            base = T.bind(lanes.element(first + n, heads, dim))
            with T.serial(dim - done) as d:
                value = load(values, at + (done + d) * tile.lanes + n) * load(scale, first + n)
                store_f32(memory, dtype, value, base + (done + d))
