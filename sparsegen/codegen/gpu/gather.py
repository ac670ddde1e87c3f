"""Copy queries and rows of keys of one token into swizzled tiles: the work of one warp group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparsegen.codegen.cpu.rows import Arguments, Sequence, find_sequence
from sparsegen.codegen.gpu import mma, wgmma
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.pipeline import fence_tensor
from sparsegen.codegen.gpu.slots import STEP, Rows, Slots
from sparsegen.codegen.gpu.view import ThreadView
from sparsegen.codegen.gpu.wgmma import TILE
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    const,
    load,
    minimum,
    scratch,
    select,
    store,
)
from sparsegen.lowering.tasks import AttendTask, Buffer, KeySource, Operand, Part

_KEEP = 0x14F0000000000000  # L2: evict last
_COPY = "cp.async.cg.shared.global"
_AHEAD = ".L2::128B"  # 256 would read beyond most rows


def readable(part: Part, dtype: str) -> bool:
    """Tell whether pieces of 16 bytes of a part can be copied from where it lies."""
    whole = part.start % 8 == 0 and part.buffer.shape[-1] % 8 == 0
    return whole and part.fn is None and part.buffer.dtype == dtype


@dataclass(frozen=True)
class Place:
    """A token and neighbouring heads that read the same keys.

    token  row (int32)
    slots  of the keys
    key    head of the keys (int64)
    """

    token: Value
    slots: Slots
    key: Value


class Gather:
    """Copies for one task.

    thread  of the group; eight neighbours copy 64 columns of a row, 16 bytes each
    """

    def __init__(self, task: AttendTask, arguments: Arguments, thread: Value) -> None:
        self.task, self.arguments, self.thread = task, arguments, thread
        self.piece, self.first = T.bind(thread % 8), T.bind(thread // 8)

    def place(self, token: Value, head: Value) -> Place:
        """Find a token (int32) and the keys of a query head (int32)."""
        arguments = self.arguments
        number = find_sequence(arguments, lambda b: load(arguments.cu_q, b), token)
        sequence = Sequence.at(arguments, number)
        i = T.bind(sequence.q_off + (token - cast(sequence.q_start, "int32")))
        view = ThreadView(self.task, arguments, sequence, i, const(1, "int32"))
        slots = Slots(view, self.task.sources, i, head)
        return Place(token, slots, cast(head // self.task.group, "int64"))

    def column(self, operand: Operand, tile: int) -> tuple[Buffer, int]:
        """Return the buffer of a tile of 64 columns of an operand, and the first column in it."""
        column = tile * 64
        for part in operand.parts:
            if column < part.size:
                return part.buffer, part.start + column
            column -= part.size
        raise AssertionError(tile)

    def copy_keys(
        self, source: KeySource, rows: Rows, n: int, row: int, head: Value, tiles: Iterable[int],
        target: Memory, place: Value,
    ) -> None:  # fmt: skip
        """Start to copy row n of this thread, of some tiles, into row `row` of a chunk.

        Args:
            source: that of the row.
            head: of the keys (int64).
            tiles: of the keys, and after these, of the values.
            place: element of `target` at which the first of these tiles begins.
        """
        # Lists of neighbouring tokens name the same keys, ranges of decoding are read once.
        keep = any(c.keys is not None for c in source.clauses)
        at = wgmma.swizzled(self.first, self.piece) + row * STEP * 64
        size = T.bind(select(rows.exists(n), const(16, "uint32"), const(0, "uint32")))
        for order, tile in enumerate(tiles):
            beyond = tile - source.k.dim // 64
            operand, column = (source.k, tile) if beyond < 0 else (source.v, beyond)
            buffer, start = self.column(operand, column)
            own, dim = buffer.shape[-2:]
            line = cast(load(rows.rows, n), "int64")
            if own > 1:
                line = line * own + head
            base = line * dim + start
            read = self.arguments[buffer].flat.ptr_to([base + cast(self.piece * 8, "int64")])
            to = target.ptr_to([at + place + order * TILE])
            if keep:
                hinted = f"{_COPY}.L2::cache_hint{_AHEAD}"
                ptx(hinted, to, read, 16, size, const(_KEEP, "uint64"))
            else:
                ptx(f"{_COPY}{_AHEAD}", to, read, 16, size)

    def copy_queries(
        self, token: Value, head: Value, end: Value, target: Memory, count: int
    ) -> None:
        """Copy `count` heads from `head` on into tiles of `count` rows; from `end` on are zeros."""
        heads = self.task.q.heads
        for n in range(-(-count // STEP)):
            r = T.bind(self.first + n * STEP)
            h = T.bind(head + r)
            there = T.bind(h < end)
            near = minimum(h, const(heads - 1, "int32"))

            def row(r: Value = r, there: Value = there, near: Value = near) -> None:
                at = T.bind(wgmma.swizzled(r, self.piece))
                for tile in range(self.task.q.dim // 64):
                    buffer, start = self.column(self.task.q, tile)
                    own, dim = buffer.shape[-2:]
                    line = cast(token, "int64") * own
                    if own > 1:
                        line = line + cast(near, "int64")
                    base = T.bind(line * dim + start + cast(self.piece * 8, "int64"))
                    self._piece(buffer, base, there, target, at + tile * count * 64)

            if count % STEP and n == count // STEP:
                with T.If(r < count), T.Then():
                    row()
            else:
                row()
        if any(p.buffer.dtype == "float32" for p in self.task.q.parts):
            fence_tensor()

    def _piece(self, buffer: Buffer, base: Value, there: Value, target: Memory, at: Value) -> None:
        """Copy 8 elements, or convert them."""
        flat = self.arguments[buffer].flat
        if buffer.dtype != "float32":
            size = select(there, const(16, "uint32"), const(0, "uint32"))
            ptx(_COPY, target.ptr_to([at]), flat.ptr_to([base]), 16, size)
            return
        pairs = scratch(4, "uint32")
        for n in range(4):
            store(pairs, const(0, "uint32"), n)
        with T.If(there), T.Then():
            for n in range(4):
                low, high = (load(flat, base + (2 * n + c)) for c in range(2))
                store(pairs, mma.pack(low, high, target.dtype), n)
        words = [pairs[n] for n in range(4)]
        ptx("st.shared.v4.b32", target.ptr_to([at]), *words)
