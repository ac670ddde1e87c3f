"""Copy 64 neighbouring rows of keys at once, a box of the tensor memory accelerator per tile."""

from __future__ import annotations

from collections.abc import Iterable

from sparsegen.codegen.cpu.rows import Arguments
from sparsegen.codegen.gpu.gather import Gather
from sparsegen.codegen.gpu.listed_cut import Columns
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.pipeline import Barrier
from sparsegen.codegen.gpu.slots import Slots, page_of, row_of
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

    def row(self, slots: Slots, first: Value) -> Value:
        """Return the row (int32) of slot `first`, which must be one of a key."""
        sequence = slots.view.sequence
        key = T.bind(slots.stretches[0].bounds.lo + first)
        page = page_of(sequence, self.kind, key) if self.kind.paged else None
        return cast(row_of(sequence, self.kind, key, page), "int32")

    def copy(
        self, gather: Gather, tiles: Iterable[int], place: Value, row: Value, target: Memory,
        ready: Barrier,
    ) -> None:  # fmt: skip
        """Start to copy tiles of 64 rows; every thread of the group arrives at `ready`.

        Args:
            place: element of `target` at which the first tile begins.
            row: int32.
        """
        tiles = tuple(tiles)
        with T.If(gather.thread < 1):
            with T.Then():
                ready.arrive_expecting(len(tiles) * TILE * 2)
                for order, tile in enumerate(tiles):
                    buffer, start = gather.column(gather.task.sources[0].k, tile)
                    to = target.ptr_to([place + order * TILE])
                    box = T.address_of(self.maps[buffer.name])
                    ptx(_COPY, to, box, start, row, ready.pointer)
            with T.Else():
                ready.arrive()
