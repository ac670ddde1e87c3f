"""Multiply packed rows by a weight: blocks of a job, and their transformation.

A job multiplies up to `chunk` rows by a panel of the weight's columns, in one of two ways. With
few rows the weight is what costs: it is read once, in the order of memory, and each element meets
`group` rows. With many rows, tiles of `rows` by `vectors` vectors of accumulators stay in
registers, and the weight is packed before if it is transposed or narrower than float32. Each kernel
has both ways, since the number of rows is known at call time only.

Columns are cut into strips as wide as a tile, and what is left over into at most two narrower
pieces, so that every inner loop has a constant extent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sparsegen.codegen.cpu.nest import Nest, registers, workspace
from sparsegen.codegen.cpu.vec import transpose
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    const,
    lanes_of,
    load,
    minimum,
    select,
    shuffle,
    store,
)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a product is cut.

    rows, vectors  accumulators of a tile: rows by vectors of `lanes`
    chunk          rows of a job
    strips         strips (a tile's width of columns) of a job's panel
    stream         with fewer rows than this, stream the weight
    group          rows that an element of a streamed weight meets
    depth          contracted elements between two visits of an output tile; divides their number
    pack           copy the panel to float32, in the order of use
    """

    lanes: int
    rows: int
    vectors: int
    chunk: int
    strips: int
    stream: int
    group: int
    depth: int
    pack: bool

    @property
    def width(self) -> int:
        """Return the columns of a strip."""
        return self.lanes * self.vectors

    def panels(self, columns: int) -> int:
        """Return how many panels `columns` are cut into."""
        return max(1, -(-(columns // self.width) // self.strips))


@dataclass(frozen=True)
class Piece:
    """`count` (at most `most`) runs of `vectors` x `lanes` columns, from column `first` on.

    `local` is the first column within what a panel holds at most.
    """

    tag: str
    first: Value
    count: Value
    local: int
    most: int
    vectors: int
    lanes: int

    @property
    def width(self) -> int:
        """Return the columns of one run."""
        return self.vectors * self.lanes


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """The product of a job.

    total       contracted elements
    columns     of the output
    x           float32 [chunk, total], packed by the caller
    weight      reads the float32 weight of (contracted index, column)
    transposed  whether the contracted axis is the consecutive one; `weight` then takes lanes of it
    result      writes the output of (row of the chunk, column, float32 value)
    """

    nest: Nest
    tiling: Tiling
    total: int
    columns: int
    x: Memory
    weight: Callable[[Value, Value, int], Value]
    transposed: bool
    result: Callable[[Value, Value, Value], None]

    def emit(self, rows: Value, panel: Value) -> None:
        """Emit the blocks for `rows` <= chunk rows of `x` and panel number `panel`."""
        t = self.tiling
        pieces = list(self._pieces(panel))
        blocks = self.total // t.depth
        # Bound out here: TVM puts what a scope touches in its head, where variables of it are not.
        tiles = T.bind(select(rows >= t.stream, rows // t.rows, const(0, "int64")))
        groups = T.bind((rows - tiles * t.rows) // t.group)
        if blocks == 1:
            _Job(self, rows, tiles, groups, pieces, const(0, "int64"), None).emit()
            return
        held = sum(p.most * p.width for p in pieces)
        partial = workspace((t.chunk, held))
        with self.nest.scope("depth", blocks) as (b,):
            _Job(self, rows, tiles, groups, pieces, b, partial).emit()
        for piece in pieces:
            name = f"finish_{piece.tag}"
            with self.nest.block(name, rows, piece.count, piece.width) as (m, s, j):
                column = s * piece.width + j
                self.result(m, piece.first + column, partial[m, column + piece.local])
            self.nest.vectorize(name, piece.width, piece.lanes)

    def _pieces(self, panel: Value) -> Iterator[Piece]:
        t = self.tiling
        strips, left = divmod(self.columns, t.width)
        held = min(t.strips, strips)
        if strips:
            count = T.bind(minimum(const(held, "int64"), strips - panel * held))
            yield Piece("strip", panel * held * t.width, count, 0, held, t.vectors, t.lanes)
        one = const(1, "int64")
        panels = t.panels(self.columns)
        last = one if panels == 1 else select(panel + 1 < panels, one - 1, one)
        whole, odd = left // t.lanes, left % t.lanes
        first, local = strips * t.width, held * t.width
        if whole:
            yield Piece("rest", const(first, "int64"), last, local, 1, whole, t.lanes)
        if odd:
            done = whole * t.lanes
            yield Piece("odd", const(first + done, "int64"), last, local + done, 1, 1, odd)


@dataclass(frozen=True)
class _Job:
    """One block of contracted elements of a product.

    tiles, groups  how many of the rows are taken by tiles, then by groups
    partial        the sums of the blocks before
    """

    gemm: Gemm
    rows: Value
    tiles: Value
    groups: Value
    pieces: list[Piece]
    block: Value
    partial: Memory | None

    def emit(self) -> None:
        t, tiles, groups = self.gemm.tiling, self.tiles, self.groups
        for piece in self.pieces:
            packed = self._pack(piece, tiles) if t.pack else None
            self._tiles(piece, packed, tiles)
        done = tiles * t.rows
        stream = self._stream_transposed if self.gemm.transposed else self._stream
        stream("group", done, groups, t.group)
        if t.group > 1:
            done = done + groups * t.group
            stream("single", done, self.rows - done, 1)

    # --- access -----------------------------------------------------------------------------------

    @property
    def _first(self) -> Value:
        return self.block * self.gemm.tiling.depth

    def _weight(self, k: Value, column: Value, lanes: int = 1) -> Value:
        return self.gemm.weight(self._first + k, column, lanes)

    def _start(self, m: Value, column: Value) -> Value:
        """Return what the accumulator of a row and a column held by the panel starts from."""
        zero = const(0.0, "float32")
        if self.partial is None:
            return zero
        return T.if_then_else(self.block > 0, self.partial[m, column], zero)

    def _finish(self, piece: Piece, m: Value, column: Value, value: Value) -> None:
        """Write the sum of a row and a column of a piece."""
        if self.partial is None:
            self.gemm.result(m, piece.first + column, value)
        else:
            store(self.partial, value, m, column + piece.local)

    # --- many rows --------------------------------------------------------------------------------

    def _pack(self, piece: Piece, tiles: Value) -> Memory:
        """Copy the weights of a piece to [run, contracted, column], unless there are no tiles."""
        t, nest, width = self.gemm.tiling, self.gemm.nest, piece.width
        packed = workspace((piece.most, t.depth, width))
        count = select(tiles > 0, piece.count, const(0, "int64"))
        name = f"pack_{piece.tag}"
        done = 0
        if self.gemm.transposed and piece.lanes == t.lanes:
            done = t.depth // t.lanes
            with nest.block(name, count, done, piece.vectors) as (s, kb, v):
                k, column = kb * t.lanes, v * t.lanes
                first = piece.first + s * width + column
                square = [self._weight(k, first + c, t.lanes) for c in range(t.lanes)]
                for i, row in enumerate(transpose([T.bind(v) for v in square])):
                    store(packed, row, s, k + i, column)
            done *= t.lanes
            name += "_rest"
        if done < t.depth:
            with nest.block(name, t.depth - done, count, width) as (k, s, j):
                value = self._weight(k + done, piece.first + s * width + j)
                store(packed, value, s, k + done, j)
            if not self.gemm.transposed:
                nest.vectorize(name, width, t.lanes)
        return packed

    def _tiles(self, piece: Piece, packed: Memory | None, tiles: Value) -> None:
        """Keep a tile of accumulators in registers while the contracted axis goes by."""
        t, nest, width = self.gemm.tiling, self.gemm.nest, piece.width
        dot, out = f"dot_{piece.tag}", f"store_{piece.tag}"
        with nest.scope(f"tile_{piece.tag}", piece.count, tiles) as (s, i):
            acc = registers((t.rows, width))
            with nest.block(dot, t.rows, width, t.depth, reduce=1) as (m, j, k):
                row, column = i * t.rows + m, s * width + j
                with T.init():
                    store(acc, self._start(row, column + piece.local), m, j)
                weight = (
                    self._weight(k, piece.first + column) if packed is None else packed[s, k, j]
                )
                store(acc, acc[m, j] + self.gemm.x[row, self._first + k] * weight, m, j)
            with nest.block(out, t.rows, width) as (m, j):
                self._finish(piece, i * t.rows + m, s * width + j, acc[m, j])

        def step(sch: Any) -> None:
            m, j, k = sch.get_loops(sch.get_sblock(dot))[-3:]
            vector, lane = sch.split(j, [None, piece.lanes])
            sch.reorder(k, m, vector, lane)
            sch.unroll(m)
            sch.unroll(vector)
            sch.vectorize(lane)
            sch.decompose_reduction(sch.get_sblock(dot), k)
            m, j = sch.get_loops(sch.get_sblock(out))[-2:]
            vector, lane = sch.split(j, [None, piece.lanes])
            sch.unroll(m)
            sch.unroll(vector)
            sch.vectorize(lane)

        nest.after(step)

    # --- few rows ---------------------------------------------------------------------------------

    def _stream(self, kind: str, done: Value, passes: Value, rows: int) -> None:
        """Add one contracted element after the other to the outputs of `rows` rows at a time."""
        for piece in self.pieces:
            self._stream_piece(piece, f"{kind}_{piece.tag}", done, passes, rows)

    def _stream_piece(self, piece: Piece, tag: str, done: Value, passes: Value, rows: int) -> None:
        t, nest, width = self.gemm.tiling, self.gemm.nest, piece.width
        with nest.scope(tag, passes) as (g,):
            acc = workspace((rows, piece.most, width))
            with nest.block(f"dot_{tag}", piece.count, width, t.depth, reduce=1) as (s, j, k):
                column, each = s * width + j, range(rows)
                row = [done + g * rows + m for m in each]
                with T.init():
                    for m in each:
                        store(acc, self._start(row[m], column + piece.local), m, s, j)
                weight = T.bind(self._weight(k, piece.first + column))
                for m in each:
                    product = self.gemm.x[row[m], self._first + k] * weight
                    store(acc, acc[m, s, j] + product, m, s, j)
            sizes = (rows, piece.count, width)
            with nest.block(f"store_{tag}", *sizes) as (m, s, j):
                self._finish(piece, done + g * rows + m, s * width + j, acc[m, s, j])

        def step(sch: Any) -> None:
            dot = sch.get_sblock(f"dot_{tag}")
            s, j, k = sch.get_loops(dot)[-3:]
            vector, lane = sch.split(j, [None, piece.lanes])
            sch.reorder(k, s, vector, lane)
            sch.unroll(vector)
            sch.vectorize(lane)
            init = sch.decompose_reduction(dot, k)
            sch.vectorize(sch.get_loops(init)[-1])

        nest.after(step)
        nest.vectorize(f"store_{tag}", width, piece.lanes)

    def _stream_transposed(self, kind: str, done: Value, passes: Value, rows: int) -> None:
        """Take the dot products of `rows` rows at a time with one column after the other."""
        for piece in self.pieces:
            self._dot_columns(piece, f"{kind}_{piece.tag}", done, passes, rows)

    def _dot_columns(self, piece: Piece, tag: str, done: Value, passes: Value, rows: int) -> None:
        t, nest, lanes = self.gemm.tiling, self.gemm.nest, self.gemm.tiling.lanes
        whole = t.depth // lanes

        def product(row: Value, column: Value, k: Value) -> Value:
            x = self.gemm.x[row, self._first + k]
            return x * self._weight(k, piece.first + column)

        with nest.scope(tag, passes, piece.count * piece.width) as (g, j):
            first = done + g * rows
            acc = registers((rows, lanes))
            if whole:
                with nest.block(f"dot_{tag}", rows, lanes, whole, reduce=1) as (m, lane, k):
                    with T.init():
                        store(acc, const(0.0, "float32"), m, lane)
                    value = product(first + m, j, k * lanes + lane)
                    store(acc, acc[m, lane] + value, m, lane)
            with nest.block(f"store_{tag}", rows) as (m,):
                value = self._start(first + m, j + piece.local)
                if whole:
                    value = value + total(T.bind(load(acc, m, 0, lanes=lanes)))
                for k in range(whole * lanes, t.depth):
                    value = T.bind(value + product(first + m, j, const(k, "int64")))
                self._finish(piece, first + m, j, value)

        def step(sch: Any) -> None:
            dot = sch.get_sblock(f"dot_{tag}")
            m, lane, k = sch.get_loops(dot)[-3:]
            sch.reorder(k, m, lane)
            sch.unroll(m)
            sch.vectorize(lane)
            init = sch.decompose_reduction(dot, k)
            sch.vectorize(sch.get_loops(init)[-1])

        if whole:
            nest.after(step)


def total(x: Value) -> Value:
    """Return the sum of the lanes (a power of two) of a bound vector."""
    while (lanes := lanes_of(x)) > 1:
        half = lanes // 2
        low, high = shuffle(x, x, list(range(half))), shuffle(x, x, list(range(half, lanes)))
        x = T.bind(low + high)
    return x
