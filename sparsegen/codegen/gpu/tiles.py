"""Fill tiles of shared memory with the elements of operands, for all threads of a block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparsegen.codegen.cpu.rows import Arguments
from sparsegen.codegen.cpu.stream import pin
from sparsegen.codegen.cpu.vec import load_f32
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.gpu.launch import FUNCTIONS
from sparsegen.codegen.gpu.mma import UNIT, Panel, copy_16_bytes
from sparsegen.codegen.tvm import T, Value, cast, const, store
from sparsegen.lowering.tasks import Buffer, Operand, Part, Rows

# Given a row of a tile: whether it exists (None: all do), the row of a buffer with these rows, and
# the head.
Locate = Callable[[Value, Rows], tuple[Value | None, Value, Value]]


@dataclass(frozen=True)
class Loader:
    """Copies rows of operands into tiles.

    thread, threads  the number of this thread, and how many there are
    dtype            of the tiles: float16, bfloat16 or float32
    """

    arguments: Arguments
    thread: Value
    threads: int
    dtype: str

    def fill(self, panel: Panel, rows: int, operand: Operand, locate: Locate) -> None:
        """Start to fill `rows` rows with an operand; rows that do not exist become zeros."""
        column = 0
        for part in operand.parts:
            if self._copied(part, column):
                self._copy(panel, rows, part, column, locate)
            else:
                self._convert(panel, rows, part, column, locate)
            column += part.size

    def zero(self, panel: Panel, elements: int) -> None:
        """Fill a tile with zeros."""
        self._each(elements, lambda n: store(panel.memory, const(0.0, self.dtype), n))

    def _copied(self, part: Part, column: int) -> bool:
        """Tell whether 8 elements at a time lie in memory as they do in the tile."""
        sizes = (part.size, part.start, column, part.buffer.shape[-1])
        if self.dtype == "float32":
            return False
        return part.fn is None and part.buffer.dtype == self.dtype and not any(n % 8 for n in sizes)

    def _each(self, count: int, body: Callable[[Value], None]) -> None:
        """Share `count` things among the threads."""
        with T.serial(-(-count // self.threads)) as step:
            n = T.bind(step * self.threads + self.thread)
            if count % self.threads:
                with T.If(n < count), T.Then():
                    body(n)
            else:
                body(n)

    def _offset(self, part: Part, row: Value, head: Value) -> Value:
        heads, dim = part.buffer.shape[-2:]
        base = row * (heads * dim) + part.start
        return base + cast(head, "int64") * dim if heads > 1 else base

    def _copy(self, panel: Panel, rows: int, part: Part, column: int, locate: Locate) -> None:
        """Copy by neighbouring threads, up to 8 of them to a row, whose place is found once."""
        beside = math.gcd(part.size // UNIT, 8)
        apart = self.threads // beside  # rows that are copied at a time
        flat = self.arguments[part.buffer].flat
        own, first = pin(self.thread // beside), pin(self.thread % beside * UNIT)
        # Threads that go on by whole spans and rows find the permutation of units once.
        span = beside * UNIT
        same = span % panel.span == 0 and (column + panel.first) % panel.span == 0
        steady = same and (apart % 8 == 0 or rows <= apart)
        origin = pin(panel.base + panel.origin(own, first)) if steady else None

        def row_of(step: int) -> None:
            r = own + step * apart
            there, row, head = locate(r, part.buffer.rows)
            at = T.bind(self._offset(part, row, head) + cast(first, "int64"))
            for n in range(0, part.size, span):
                if origin is None:
                    to = panel.index(r, first + (column + n))
                else:
                    to = panel.shifted(origin, column + n) + step * apart * panel.pitch
                copy_16_bytes(panel.memory.ptr_to([to]), flat.ptr_to([at + n]), there)

        for step in range(-(-rows // apart)):
            if (step + 1) * apart > rows:
                with T.If(own < rows - step * apart), T.Then():
                    row_of(step)
            else:
                row_of(step)

    def _convert(self, panel: Panel, rows: int, part: Part, column: int, locate: Locate) -> None:
        flat = self.arguments[part.buffer].flat

        def element(n: Value) -> None:
            r, c = T.bind(n // part.size), T.bind(n % part.size)
            there, row, head = locate(r, part.buffer.rows)
            at = T.bind(self._offset(part, row, head) + cast(c, "int64"))
            to = T.bind(panel.index(r, c + column))
            store(panel.memory, const(0.0, self.dtype), to)
            with T.If(const(True, "bool") if there is None else there), T.Then():
                x = load_f32(flat, part.buffer.dtype, at)
                if part.fn is not None:
                    x = emit(part.fn, Env(symbols={"x": T.bind(x)}, functions=FUNCTIONS))
                store(panel.memory, cast(x, self.dtype), to)

        self._each(rows * part.size, element)


def inside(inner: Operand, outer: Operand) -> int | None:
    """Return the column of `outer` at which all of `inner` lies, where there is one."""
    if len(inner.parts) != 1:
        return None
    (part,) = inner.parts
    column = 0
    for other in outer.parts:
        first = part.start - other.start
        fits = first >= 0 and first + part.size <= other.size
        if _same(part.buffer, other.buffer) and part.fn == other.fn and fits:
            return column + first
        column += other.size
    return None


def _same(a: Buffer, b: Buffer) -> bool:
    return a == b
