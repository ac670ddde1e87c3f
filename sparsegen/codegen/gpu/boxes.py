"""Copy 64 neighbouring rows of keys at once, a box of the tensor memory accelerator per tile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sparsegen.codegen.cpu.rows import Arguments
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.gpu import cluster
from sparsegen.codegen.gpu.gather import Gather
from sparsegen.codegen.gpu.listed_cut import Columns
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.pipeline import Barrier
from sparsegen.codegen.gpu.slots import Rows, Slots, page_of, row_of
from sparsegen.codegen.gpu.wgmma import TILE
from sparsegen.codegen.tvm import Memory, T, Value, cast, const, equal
from sparsegen.lowering.tasks import AttendTask

ROWS = 64
_SWIZZLE_128, _PROMOTE_256 = 3, 3
_COPY = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"


def boxed(task: AttendTask) -> bool:
    """Tell whether 64 keys from a multiple of 64 on lie side by side: a range, no small pages."""
    source = task.sources[0]
    clauses = [c for s in task.sources for c in s.clauses]
    if len(clauses) > 1 or clauses[0].keys is not None:
        return False
    if source.k.heads > 1 or Columns.of(task).apart:
        return False
    return not source.k.rows.paged or source.k.rows.page % ROWS == 0


class Boxes:
    """Tensor maps of the buffers of keys; made before the device is entered."""

    def __init__(self, task: AttendTask, arguments: Arguments) -> None:
        self.kind = task.sources[0].k.rows
        self.maps: dict[str, Value] = {}
        for part in task.sources[0].k.parts:
            if part.buffer.name in self.maps:
                continue
            argument, dim = arguments[part.buffer], part.buffer.shape[-1]
            place = T.bind(T.tvm_stack_alloca("tensormap", 1))
            self.maps[part.buffer.name] = place
            # Memory of no rows cannot be described, and is not read.
            with T.If(argument.rows > 0), T.Then():
                T.evaluate(
                    T.tensormap_encode_tiled(
                        place, argument.flat.data, dim, argument.rows, dim * 2, 64, ROWS, 1, 1,
                        descriptor_dtype=part.buffer.dtype, rank=2, swizzle=_SWIZZLE_128,
                        l2_promotion=_PROMOTE_256,
                    )
                )  # fmt: skip

    def whole(self, slots: Slots, first: Value) -> Value:
        """Tell whether the 64 slots from `first` on are 64 neighbouring rows."""
        bounds = slots.stretches[0].bounds
        inside = bounds.lo + first + ROWS <= bounds.hi
        if not self.kind.paged:
            return T.bind(inside)
        return T.bind(T.And(inside, equal((bounds.lo + first) % ROWS, const(0, "int32"))))

    def page(self, slots: Slots, first: Value) -> Value:
        """Return the page (int32) of slot `first`, which must be one of a key; 0 without pages."""
        if not self.kind.paged:
            return const(0, "int32")
        return page_of(slots.view.sequence, self.kind, self._key(slots, first))

    def row(self, slots: Slots, first: Value, page: Value) -> Value:
        """Return the row (int32) of slot `first`, given its page."""
        found = page if self.kind.paged else None
        return cast(row_of(slots.view.sequence, self.kind, self._key(slots, first), found), "int32")

    def _key(self, slots: Slots, first: Value) -> Value:
        return T.bind(slots.stretches[0].bounds.lo + first)

    def copy(
        self, gather: Gather, pieces: Iterable[tuple[Sequence[int], Barrier]], row: Value,
        target: Memory, rank: Value | None,
    ) -> None:  # fmt: skip
        """Start to copy tiles of 64 rows to their places in `target`; for one thread.

        Args:
            pieces: tiles, and the barrier that waits for them.
            row: int32.
            rank: number of this block in its cluster, each of which copies every other tile for
                both; None if it is alone.
        """
        pairs = [(tile, ready) for tiles, ready in pieces for tile in tiles]
        for tiles, ready in pieces:
            ready.arrive_expecting(len(tiles) * TILE * 2)
        if rank is None:
            self._start(gather, pairs, row, target, _COPY)
            return
        for n in range(cluster.SIZE):
            with T.If(equal(rank, const(n, "int32"))), T.Then():
                ours, both = pairs[n :: cluster.SIZE], const(cluster.BOTH, "uint16")
                self._start(gather, ours, row, target, cluster.COPY, both)

    def _start(
        self, gather: Gather, pairs: list[tuple[int, Barrier]], row: Value, target: Memory,
        instruction: str, *more: Value,
    ) -> None:  # fmt: skip
        for tile, ready in pairs:
            buffer, start = gather.column(gather.task.sources[0].k, tile)
            to, box = target.ptr_to([tile * TILE]), T.address_of(self.maps[buffer.name])
            ptx(instruction, to, box, start, row, ready.pointer, *more)


class BoxedRows(Rows):
    """The rows of a chunk, which are looked up one by one only where a part of it is no box.

    found  of each part of 64 rows: whether it is a box (int32, 0 or 1), and its first row (int32)
    """

    def __init__(self, boxes: Boxes, slots: Slots, first: Value, count: int) -> None:
        super().__init__(slots, first, count)
        self.boxes, zero = boxes, const(0, "int32")
        self.start = cell("int32", zero)
        self.next, self.found = (
            [(cell("int32", zero), cell("int32", zero)) for _ in range(self.chunks)]
            for _ in range(2)
        )

    def fetch(self, start: Value) -> None:
        """Start to look the pages of a chunk up, the first slot of which is `start`."""
        put(self.start, start)
        for n, (whole, page) in enumerate(self.next):
            begin = T.bind(start + n * ROWS)
            there = self.boxes.whole(self.slots, begin)
            put(whole, cast(there, "int32"))
            with T.If(there), T.Then():
                put(page, self.boxes.page(self.slots, begin))

    def resolve(self, start: Value) -> None:
        """Do nothing: nobody waits for pages before the chunk is at hand."""

    def take(self) -> None:
        """Make the chunk that was looked up the one at hand."""
        start, boxes = T.bind(get(self.start)), const(0, "int32")
        for n, ((whole, page), (taken, row)) in enumerate(zip(self.next, self.found, strict=True)):
            put(taken, get(whole))
            put(row, self.boxes.row(self.slots, T.bind(start + n * ROWS), get(page)))
            boxes = boxes + get(taken)
        # One thread starts all boxes, and should have nothing else to do.
        with T.If(T.bind(boxes) < self.chunks):
            with T.Then():
                super().fetch(start)
                super().resolve(start)
                super().take()
            with T.Else():
                put(self.there, const((1 << self.count) - 1, "int32"))
