"""Say what values that are not finite make of sums, where values lie apart from the keys.

A weight that 16 bits round to 0 makes NaN of an infinity, and so does a sum that shrinks to 0.
Heads of a tile see the same keys, so an infinity or NaN that they see is the result of its column,
whatever the weights are. Sums that are not finite are seldom; only then are the values looked at.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.vec import load_f32
from sparsegen.codegen.gpu.gather import Gather
from sparsegen.codegen.gpu.launch import across
from sparsegen.codegen.gpu.pipeline import GROUP, meet
from sparsegen.codegen.gpu.slots import CHUNK, page_of, row_of
from sparsegen.codegen.tvm import Memory, T, Value, cast, const, equal, load, maximum, select, store

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.few import FewKernel
    from sparsegen.codegen.gpu.listed import ListedKernel
    from sparsegen.lowering.tasks import KeySource

INF = math.inf


def marks_bytes(dim: int) -> int:
    """Return the shared memory that marks of values of `dim` elements take."""
    return (2 * dim + 8) * 4


class Marks:
    """The marks of the columns that a computing group writes.

    odd   int32 [8] in shared memory, by warp of both groups: whether a sum is not finite
    seen  int32 [2 * dim] in shared memory: whether a column has inf or NaN; -inf or NaN
    """

    def __init__(self, kernel: ListedKernel | FewKernel, side: int, barrier: int) -> None:
        self.kernel, self.side, self.barrier = kernel, side, barrier
        self.odd, self.seen = kernel.odd, kernel.seen

    def note(self, sums: Memory, count: int) -> None:
        """Put down whether one of this warp's sums is not finite; all meet before they ask."""
        odd = cell("int32", const(0, "int32"))
        for n in range(count):
            x = T.bind(load(sums, n))
            finite = T.And(x > const(-INF, "float32"), x < const(INF, "float32"))
            put(odd, select(finite, get(odd), const(1, "int32")))
        found = across(get(odd), maximum)
        # By all lanes: ptxas 13.0 serializes products where a branch of some of them is near.
        store(self.odd, found, self.side * 4 + self.kernel.warp)

    def any(self, sides: range) -> Value:
        """Tell whether a sum of the groups is not finite."""
        found = const(0, "int32")
        for side in sides:
            for warp in range(4):
                found = found + load(self.odd, 4 * side + warp)
        return T.bind(found > 0)

    def find(self, token: Value, head: Value, tiles: range) -> None:
        """Look at the values that a head sees, of tiles of 64 columns."""
        kernel, dim = self.kernel, self.kernel.dim
        thread = kernel.thread
        with T.serial(-(-64 * len(tiles) // GROUP)) as step:
            at = T.bind(step * GROUP + thread)
            with T.If(at < 64 * len(tiles)), T.Then():
                for n in range(2):
                    store(self.seen, const(0, "int32"), at + (tiles.start * 64 + n * dim))
        meet(self.barrier, GROUP)
        gather = Gather(kernel.task, kernel.arguments, thread)
        place = gather.place(token, head)
        slot = cell("int32", thread)
        with T.While(get(slot) < place.slots.count):
            at = T.bind(get(slot))
            key = place.slots.key(at, place.slots.raw(at))
            number = place.slots.source_of(T.bind(at // CHUNK * CHUNK))
            for which, source in enumerate(kernel.task.sources):
                ours = T.And(key >= 0, equal(number, const(which, "int32")))
                with T.If(ours), T.Then():
                    kind, sequence = source.k.rows, place.slots.view.sequence
                    page = T.bind(page_of(sequence, kind, key)) if kind.paged else None
                    row = T.bind(row_of(sequence, kind, key, page))
                    self._look(gather, source, row, place.key, tiles)
            put(slot, at + GROUP)
        meet(self.barrier, GROUP)

    def _look(
        self, gather: Gather, source: KeySource, row: Value, head: Value, tiles: range
    ) -> None:
        for tile in tiles:
            buffer, start = gather.column(source.v, tile)
            own, dim = buffer.shape[-2:]
            base = T.bind((row * own + head if own > 1 else row) * dim + start)
            flat = gather.arguments[buffer].flat
            with T.serial(64) as c:
                x = T.bind(load_f32(flat, buffer.dtype, base + cast(c, "int64")))
                for n, end in enumerate((INF, -INF)):
                    odd = T.Or(T.isnan(x), equal(x, const(end, "float32")))
                    with T.If(odd), T.Then():
                        at = c + (tile * 64 + n * self.kernel.dim)
                        store(self.seen, const(1, "int32"), at)

    def mark(self, x: Value, column: Value) -> Value:
        """Return a result of a column, or what its marks make of it."""
        up, down = (T.bind(load(self.seen, column + n * self.kernel.dim)) for n in range(2))
        nan, low, high = (const(v, "float32") for v in (math.nan, -INF, INF))
        odd = select(up > 0, select(down > 0, nan, high), low)
        return select(up + down > 0, odd, x)
