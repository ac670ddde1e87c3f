"""Score chunks of keys on mma.sync, and sum up values by an online softmax, in registers of a warp.

A warp has `tiles` times 16 rows. Element 2 * half + column of the accumulator of 16 rows and 8
columns is number (tile * columns / 8 + n) * 4 + 2 * half + column of an array; row 2 * tile + half
of an array of rows is row 16 * tile + 8 * half + lane / 4 of the warp.

Where several warps share rows, each scores a slice of the keys and sums up a slice of the values:
they tell each other their maxima and weights through shared memory. Two of them may score both
their slices, each by half of the products, and tell each other these too: larger tiles of products
take fewer reads of shared memory, which bounds them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any

from sparsegen.codegen.cpu.stream import get, pin
from sparsegen.codegen.gpu import mma
from sparsegen.codegen.gpu.launch import FULL, across
from sparsegen.codegen.gpu.mma import Fragments, Panel
from sparsegen.codegen.gpu.outputs import FINITE
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    const,
    equal,
    load,
    maximum,
    scratch,
    store,
)

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.attend import Tile

# The running maximum before any score, more than a hidden score: exp2 of their difference is
# exactly 0.
NO_SCORE = -1e29


class Softmax:
    """The scores of a chunk, and the sums over all chunks before."""

    def __init__(self, tile: Tile) -> None:
        kernel, shape = tile.kernel, tile.shape
        self.kernel, self.shape, self.lane = kernel, shape, tile.lane
        self.mode, self.tiles, self.rows = tile.mode, shape.tiles, 2 * shape.tiles
        self.slice, self.width = shape.keys // shape.columns, kernel.width
        self.row, self.part = tile.row, tile.part
        count = self.tiles * self.slice // 2
        self.scores, self.others = scratch(count, "float32"), scratch(count, "float32")
        self.out = scratch(self.tiles * self.width // 2, "float32")
        self.peak, self.total = (scratch(self.rows, "float32") for _ in range(2))
        self.shrink = scratch(self.rows, "float32")
        self.a, self.b = scratch(8 * self.tiles, "uint32"), scratch(8, "uint32")
        self.shared = tile.exchange
        lane = self.lane
        # With two depths a warp takes 32 columns of every 64.
        depth = pin(self.part % 2 * 32) if shape.depths > 1 else 0
        self.queries = Fragments(tile.queries, lane, self.row, depth)
        parts = [self.part] if shape.depths == 1 else [self.part, T.bitwise_xor(self.part, 1)]
        self.keys = [Fragments(tile.keys, lane, p * self.slice, depth, beside=True) for p in parts]
        column = pin(self.part * self.width) if shape.columns > 1 else 0
        self.values = Fragments(tile.values, lane, 0, column, transposed=True)
        self.held = scratch(max(4 * self.tiles * kernel.held, 1), "uint32")
        if self.shared is not None:
            self.weights = Fragments(self.shared.weights, lane, self.row)
        self.packed = scratch(count // 2, "uint32") if kernel.packs else None

    def clear(self) -> None:
        """Start to sum."""
        mma.clear(self.out, self.tiles * self.width // 2)
        mma.clear(self.peak, self.rows, NO_SCORE)
        mma.clear(self.total, self.rows)

    def hold(self) -> None:
        """Keep queries in registers, as many columns as fit."""
        at = self.queries.origin()
        for k in range(self.kernel.held):
            for m in range(self.tiles):
                to = 4 * (k * self.tiles + m)
                self.queries.read(at, 16 * m, self._depth(k), self.held, to)

    def _depth(self, k: int) -> int:
        """Return the first column of the k-th 16 that this warp multiplies."""
        return 16 * k if self.shape.depths == 1 else k // 2 * 64 + k % 2 * 16

    def elements(self) -> list[tuple[int, int, int, int]]:
        """Return row, 8-column tile, column and number of all scores."""
        columns = self.slice // 8
        return [
            (2 * m + half, n, c, (m * columns + n) * 4 + 2 * half + c)
            for m in range(self.tiles)
            for half in range(2)
            for n in range(columns)
            for c in range(2)
        ]

    # --- products -------------------------------------------------------------------------------

    def score(self, base: Value) -> None:
        """Multiply the queries by the slice of a chunk of keys; the chunk starts at `base`."""
        tiles, held, steps = self.tiles, self.kernel.held, self.slice // 16
        to = [self.scores, self.others][: self.shape.depths]
        for memory in to:
            mma.clear(memory, tiles * self.slice // 2)
        rows, keys = self.queries.origin(), [part.origin(base) for part in self.keys]

        def read(step: int) -> None:
            k, n = divmod(step, steps * len(to))
            if n == 0 and k >= held:
                for m in range(tiles):
                    at = 4 * (k % 2 * tiles + m)
                    self.queries.read(rows, 16 * m, self._depth(k), self.a, at)
            part, n = divmod(n, steps)
            self.keys[part].read(keys[part], 16 * n, self._depth(k), self.b, step % 2 * 4)

        def multiply(step: int) -> None:
            k, n = divmod(step, steps * len(to))
            part, n = divmod(n, steps)
            for m in range(tiles):
                memory, at = (self.held, k) if k < held else (self.a, k % 2)
                a = [memory[4 * (at * tiles + m) + x] for x in range(4)]
                self._multiply(to[part], (m * steps + n) * 8, a, step)

        _ahead(self.kernel.deep // 16 * steps, read, multiply)
        if self.shape.depths > 1:
            assert self.shared is not None
            self.shared.join(self.scores, self.others)

    def weigh(self, base: Value) -> None:
        """Add the values of a chunk by their weights; the chunk starts at `base`."""
        tiles, steps = self.tiles, self.width // 16
        values = self.values.origin(base)
        weights = None if self.shared is None else self.weights.origin()

        def read(step: int) -> None:
            k, n = divmod(step, steps)
            if n == 0 and weights is not None:
                for m in range(tiles):
                    self.weights.read(weights, 16 * m, 16 * k, self.a, 4 * (k % 2 * tiles + m))
            self.values.read(values, 16 * k, 16 * n, self.b, step % 2 * 4)

        def multiply(step: int) -> None:
            k, n = divmod(step, steps)
            for m in range(tiles):
                at, first = 4 * (k % 2 * tiles + m), (m * self.slice // 8 + 2 * k) * 2
                if n == 0 and weights is None and self.packed is None:
                    for x in range(4):
                        store(self.a, self._pair(2 * (first + x)), at + x)
                memory, at = (self.a, at) if self.packed is None else (self.packed, first)
                a = [memory[at + x] for x in range(4)]
                self._multiply(self.out, (m * steps + n) * 8, a, step)

        _ahead(self.shape.keys // 16 * steps, read, multiply)

    def _multiply(self, to: Memory, at: int, a: list[Value], step: int) -> None:
        for half in range(2):
            b = step % 2 * 4 + 2 * half
            mma.multiply(to, at + 4 * half, a, self.b[b], self.b[b + 1], self.kernel.dtype)

    def _pair(self, at: int) -> Value:
        return mma.pack(load(self.scores, at), load(self.scores, at + 1), self.kernel.dtype)

    # --- the softmax ----------------------------------------------------------------------------

    def normalize(self) -> None:
        """Turn scores into weights, and shrink what was summed before."""
        rate = const(self.kernel.rate, "float32")
        elements = self.elements()
        tops = []
        for row in range(self.rows):
            mine = [load(self.scores, at) for r, _, _, at in elements if r == row]
            tops.append(across(_tree(maximum, mine), maximum, 4))
        if self.shared is not None:
            tops = self.shared.maxima(tops)
        tops = [pin(maximum(load(self.peak, row), top)) for row, top in enumerate(tops)]
        # Sums shrink only where a maximum has changed, which gets rare.
        same = reduce(T.And, (equal(load(self.peak, row), top) for row, top in enumerate(tops)))
        moved = cast(T.Not(same), "int32")
        votes = T.bind(T.cuda.ballot_sync(const(FULL, "uint32"), pin(moved)))
        with T.If(votes > const(0, "uint32")), T.Then():
            self._shrink(tops, rate)
        for row, top in enumerate(tops):
            level = pin(top * rate)
            mine = [at for r, _, _, at in elements if r == row]
            for at in mine:
                mma.exp2(self.scores, at, load(self.scores, at) * rate - level)
            some = _tree(lambda a, b: a + b, [load(self.scores, at) for at in mine])
            store(self.total, load(self.total, row) + some, row)

    def _shrink(self, tops: list[Value], rate: Value) -> None:
        for row, top in enumerate(tops):
            mma.exp2(self.shrink, row, (load(self.peak, row) - top) * rate)
            store(self.peak, top, row)
            mma.scale(self.total, row, load(self.shrink, row))
        # Marks do not fade.
        with T.If(get(self.mode) <= FINITE), T.Then():
            for at in range(self.tiles * self.width // 2):
                row = at // (self.width // 2) * 2 + at // 2 % 2
                mma.scale(self.out, at, load(self.shrink, row))

    def mark(self) -> None:
        """Count each key that is seen once."""
        for *_, at in self.elements():
            seen = T.bind(load(self.scores, at) > const(0.0, "float32"))
            store(self.scores, cast(seen, "float32"), at)

    def pack(self) -> None:
        """Round all weights of the chunk, where registers are short."""
        for at in range(self.tiles * self.slice // 4):
            store(self.packed, self._pair(2 * at), at)

    def share(self) -> None:
        """Let the warps that share rows have all weights of the chunk."""
        if self.shared is None:
            return
        for row in range(self.rows):
            r = pin(self.row + (self.lane // 4 + row // 2 * 16 + row % 2 * 8))
            for n in range(self.slice // 8):
                column = self.part * self.slice + (8 * n + self.lane % 4 * 2)
                at = (row // 2 * self.slice // 8 + n) * 4 + row % 2 * 2
                self.shared.store(r, column, self._pair(at))
        self.shared.meet(self.shape.columns)

    def finish(self) -> None:
        """Complete the sums of the weights of each row."""
        totals = [across(load(self.total, row), lambda a, b: a + b, 4) for row in range(self.rows)]
        if self.shared is not None:
            totals = self.shared.sums(totals)
        for row, total in enumerate(totals):
            store(self.total, total, row)


class Exchange:
    """What the warps that share rows tell each other through shared memory.

    weights  16-bit [rows][keys]
    """

    def __init__(self, tile: Tile, pool: Any) -> None:
        self.shape, self.lane, self.row, self.part = tile.shape, tile.lane, tile.row, tile.part
        rows, keys = self.shape.rows, self.shape.keys
        halves = pool.alloc((rows * keys,), tile.kernel.dtype, align=128)
        self.weights = Panel(halves, keys)
        # The same memory by pairs, and for products.
        start = pool.offset - 2 * rows * keys
        pool.move_base_to(start)
        self.words = pool.alloc((rows * keys // 2,), "uint32", align=128)
        pool.move_base_to(start)
        self.floats = pool.alloc((rows * keys // 2,), "float32", align=128)
        # A barrier for the warps that share rows, and one for each two of them.
        self.group = pin(tile.place.warp % self.shape.row_warps)
        self.pair = pin(self.group * (self.shape.columns // 2) + self.part // 2)
        self.cells = pool.alloc((rows * self.shape.columns,), "float32", align=16)

    def join(self, scores: Memory, others: Memory) -> None:
        """Add up the products of two warps: each keeps `scores`, and passes on `others`."""
        shape = self.shape
        count = shape.keys // shape.columns // 2  # of 16 rows; the weights have room for as many
        start = self.row * (shape.keys // 2) + self.lane
        mine, theirs = (pin(start + p * 32) for p in (self.part, T.bitwise_xor(self.part, 1)))
        for m in range(shape.tiles):
            if m:
                self.meet(2)
            for n in range(count):
                store(self.floats, load(others, m * count + n), mine + n * (32 * shape.columns))
            self.meet(2)
            for n in range(count):
                at, to = theirs + n * (32 * shape.columns), m * count + n
                store(scores, load(scores, to) + load(self.floats, at), to)

    def meet(self, warps: int) -> None:
        """Wait for the warps that share rows, or for the other one of two."""
        shape = self.shape
        number = self.group + 1
        if warps == 2 and shape.columns > 2:
            number = self.pair + (1 + shape.row_warps)
        mma.ptx("bar.sync", pin(cast(number, "uint32")), 32 * warps)

    def store(self, row: Value, column: Value, pair: Value) -> None:
        """Store two weights beside each other."""
        store(self.words, pair, self.weights.index(row, column) // 2)

    def maxima(self, rows: list[Value]) -> list[Value]:
        """Return the maximum over the warps for each row."""
        return self._all(rows, maximum)

    def sums(self, rows: list[Value]) -> list[Value]:
        """Return the sum over the warps for each row."""
        return self._all(rows, lambda a, b: a + b)

    def _all(self, rows: list[Value], combine: Callable[[Value, Value], Value]) -> list[Value]:
        shape = self.shape
        rows = [pin(x) for x in rows]
        places = [
            pin(self.row + (self.lane // 4 + row // 2 * 16 + row % 2 * 8))
            for row in range(len(rows))
        ]
        with T.If(equal(self.lane % 4, const(0, "int32"))), T.Then():
            for place, x in zip(places, rows, strict=True):
                store(self.cells, x, self.part * shape.rows + place)
        self.meet(shape.columns)
        return [
            _tree(combine, [load(self.cells, place + n * shape.rows) for n in range(shape.columns)])
            for place in places
        ]


def _tree(combine: Callable[[Value, Value], Value], values: list[Value]) -> Value:
    """Combine values pairwise, for short chains."""
    while len(values) > 1:
        pairs = [pin(combine(a, b)) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]


def _ahead(steps: int, read: Callable[[int], None], use: Callable[[int], None]) -> None:
    """Use what is read, reading a step ahead."""
    read(0)
    for step in range(steps):
        if step + 1 < steps:
            read(step + 1)
        use(step)
