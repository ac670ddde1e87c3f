"""Let Hopper's copy engine load tiles: tensor maps made by the host, boxes of 64 columns.

A box holds rows by heads of a buffer [rows, heads, dim], cut into panels of 64 columns, 128 bytes a
row, swizzled as wgmma reads them: panel after panel, row after row, head after head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sparsegen.codegen.cpu.rows import Arguments
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.tvm import Memory, T, Value, const
from sparsegen.lowering.tasks import Operand, Part, Rows

COLUMNS = 64  # of a panel
REPEAT = 8  # rows after which the swizzle repeats: boxes start at multiples
_SWIZZLE_128, _PROMOTE_128 = 3, 2  # values of cuTensorMapEncodeTiled
_LOAD = "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"


@dataclass(frozen=True)
class Source:
    """An operand, with a tensor map for each part.

    heads, rows  of a box
    pitch        rows of a panel in shared memory; those beside a box stay as they are
    apart        panels are loaded one by one, and may go to different places
    """

    operand: Operand
    maps: tuple[Memory, ...]
    heads: int
    rows: int
    pitch: int
    apart: bool

    @staticmethod
    def make(
        operand: Operand, arguments: Arguments, spare: Memory, *,
        heads: int, rows: int, pitch: int, apart: bool = False,
    ) -> Source:  # fmt: skip
        """Emit what makes the tensor maps, on the host.

        Args:
            spare: memory to point at where a buffer has no rows, and so no address.
        """
        source = Source(operand, (), heads, rows, pitch, apart)
        maps = tuple(source._encode(p, arguments, spare) for p in operand.parts)
        return replace(source, maps=maps)

    @property
    def bytes(self) -> int:
        """Return the bytes of a box."""
        return self.panels * self.panel_bytes

    @property
    def panels(self) -> int:
        """Return the panels of a box."""
        return self.operand.dim // COLUMNS

    @property
    def panel_bytes(self) -> int:
        """Return the bytes of a panel."""
        return COLUMNS * self.heads * self.rows * 2

    def load(
        self, to: Memory, first: Value, barrier: Value, row: Callable[[Rows], Value], head: Value,
        wanted: range | None = None,
    ) -> None:  # fmt: skip
        """Start to load a box, or the wanted panels of it; one thread does.

        Args:
            to, first: shared memory, and the element where the box starts.
            barrier: address of what is told about the bytes.
            row: gives the first row (int32) of buffers whose rows are as they are.
            head: the first one (int32).
            wanted: panels that are loaded; those of a source whose panels are not apart all are.
        """
        assert wanted is None or self.apart
        column = 0
        for part, tensor_map in zip(self.operand.parts, self.maps, strict=True):
            near = head if part.buffer.shape[-2] > 1 else const(0, "int32")
            step = self._panels(part)
            for panel in range(0, part.size // COLUMNS, step):
                number = column // COLUMNS + panel
                if wanted is not None and number not in wanted:
                    continue
                at = first + (number - (wanted.start if wanted else 0)) * (self.pitch * COLUMNS)
                place = (0, near, row(part.buffer.rows), part.start // COLUMNS + panel)
                ptx(_LOAD, to.ptr_to([at]), T.address_of(tensor_map), *place, barrier)
            column += part.size

    def _panels(self, part: Part) -> int:
        """Return how many panels one load brings."""
        adjacent = self.heads * self.rows == self.pitch and not self.apart
        return part.size // COLUMNS if adjacent else 1

    def _encode(self, part: Part, arguments: Arguments, spare: Memory) -> Memory:
        argument = arguments[part.buffer]
        heads, dim = part.buffer.shape[-2:]
        tensor_map = T.bind(T.tvm_stack_alloca("tensormap", 1), T.handle("tensormap").ty)

        def encode(data: Memory, rows: Value) -> None:
            T.evaluate(
                T.tensormap_encode_tiled(
                    tensor_map, data, COLUMNS, heads, rows, dim // COLUMNS,
                    dim * 2, heads * dim * 2, COLUMNS * 2,
                    COLUMNS, self.heads, self.rows, self._panels(part), 1, 1, 1, 1,
                    descriptor_dtype=part.buffer.dtype, rank=4,
                    swizzle=_SWIZZLE_128, l2_promotion=_PROMOTE_128,
                )
            )  # fmt: skip

        with T.If(argument.rows > 0):
            with T.Then():
                encode(argument.flat.data, argument.rows)
            with T.Else():
                encode(spare.data, const(1, "int64"))
        return tensor_map
