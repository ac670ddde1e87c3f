"""Say where the microkernels find the keys and values of a chunk.

float32 keys are read in place. Others are converted, a chunk at a time, into a float32 copy that
stays in cache and whose size does not depend on the number of keys.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from sparsegen.codegen.cpu.attention import Segment
from sparsegen.codegen.cpu.rows import Arguments, Sequence
from sparsegen.codegen.cpu.stream import Chunk
from sparsegen.codegen.cpu.vec import load_f32
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.tvm import Memory, T, Value, const, load, store
from sparsegen.lowering.tasks import Operand, Part, Rows


@dataclass
class Feed:
    """The keys and values of one source for one key head of one sequence.

    copy   convert everything, also what could be read in place
    """

    arguments: Arguments
    sequence: Sequence
    chunk: Chunk
    head: Value  # int64
    lanes: int
    copy: bool
    rows: dict[Rows, Memory] = field(default_factory=dict)
    columns: list[tuple[Part, int]] = field(default_factory=list)  # copied parts, their offsets
    scratch: Memory | None = None
    pitch: int = 0

    def prepare(self, operands: Many[Operand]) -> None:
        """Allocate what a chunk needs."""
        for part in (p for operand in operands for p in operand.parts):
            if part.buffer.rows not in self.rows:
                self.rows[part.buffer.rows] = T.alloc_buffer((self.chunk.size,), "int64")
            if self._copied(part) and self._column(part) is None:
                self.columns.append((part, self.pitch))
                self.pitch += -(-part.size // self.lanes) * self.lanes
        if self.pitch:
            # One more line per row: rows a power of two apart would share few sets of the cache.
            self.pitch += 16
            self.scratch = T.alloc_buffer((self.chunk.size * self.pitch,), "float32")

    def load(self, count: Value) -> None:
        """Find the rows of a chunk of `count` keys, and convert what is not read in place."""
        slots = T.bind(self.chunk.padded(count))
        for rows, memory in self.rows.items():
            with T.serial(slots) as slot:
                position = T.bind(load(self.chunk.position, slot))
                store(memory, self.sequence.row(rows, position), slot)
        for part, column in self.columns:
            with T.serial(slots) as slot:
                self._convert(part, slot, column)

    def segments(self, operand: Operand) -> list[Segment]:
        """Return the elements of an operand, part by part."""
        return [self._segment(part) for part in operand.parts]

    def _copied(self, part: Part) -> bool:
        return self.copy or part.fn is not None or part.buffer.dtype != "float32"

    def _column(self, part: Part) -> int | None:
        """Return the offset of a part in the copy, where a part that holds it is copied."""
        for other, offset in self.columns:
            inside = other.start <= part.start and part.start + part.size <= (
                other.start + other.size
            )
            if other.buffer == part.buffer and other.fn == part.fn and inside:
                return offset + part.start - other.start
        return None

    def _base(self, part: Part, slot: Value) -> Value:
        heads, dim = part.buffer.shape[-2:]
        row = load(self.rows[part.buffer.rows], slot)
        head = self.head if heads > 1 else const(0, "int64")
        return row * (heads * dim) + (head * dim + part.start)

    def _segment(self, part: Part) -> Segment:
        if not self._copied(part):
            flat = self.arguments[part.buffer].flat
            return Segment(flat, part.size, lambda slot: self._base(part, slot))
        column = self._column(part)
        assert column is not None
        assert self.scratch is not None
        return Segment(self.scratch, part.size, lambda slot: slot * self.pitch + column)

    def _convert(self, part: Part, slot: Value, column: int) -> None:
        argument, scratch = self.arguments[part.buffer], self.scratch
        base = T.bind(self._base(part, slot))
        to = slot * self.pitch + column

        def piece(at: Value, lanes: int) -> None:
            value = load_f32(argument.flat, part.buffer.dtype, base + at, lanes=lanes)
            if part.fn is not None:
                value = emit(part.fn, Env(symbols={"x": T.bind(value)}))
            store(scratch, value, to + at)

        with T.serial(part.size // self.lanes) as c:
            piece(c * self.lanes, self.lanes)
        for at in range(part.size // self.lanes * self.lanes, part.size):
            piece(const(at, "int32"), 1)
