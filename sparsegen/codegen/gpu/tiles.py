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
from sparsegen.codegen.gpu.mma import UNIT, Panel, copy_16_bytes, pack, ptx
from sparsegen.codegen.tvm import T, Value, cast, const, dtype_of, load, scratch, select, store
from sparsegen.ir.expr import Expr
from sparsegen.lowering.tasks import Buffer, Operand, Part, Rows

# Given a row of a tile: whether it exists (None: all do), the row of a buffer with these rows, and
# the head.
Locate = Callable[[Value, Rows], tuple[Value | None, Value, Value]]

# Moves 8 elements: of which part, to which address, from which element on, and whether they exist.
Move = Callable[[Part, Value, Value, Value | None], None]


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
            whole = self._in_units(part, column)
            if whole and part.fn is None and part.buffer.dtype == self.dtype:
                self._units(panel, rows, part, column, locate, self._copy)
            elif whole and part.buffer.dtype == "float32":
                self._units(panel, rows, part, column, locate, self._round)
            else:
                self._convert(panel, rows, part, column, locate)
            column += part.size

    def zero(self, panel: Panel, elements: int) -> None:
        """Fill a tile with zeros."""
        self._each(elements, lambda n: store(panel.memory, const(0.0, self.dtype), n))

    def _in_units(self, part: Part, column: int) -> bool:
        """Tell whether 8 elements beside each other in memory are so in the tile, of 16 bits."""
        sizes = (part.size, part.start, column, part.buffer.shape[-1])
        return self.dtype != "float32" and not any(n % UNIT for n in sizes)

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

    def _units(
        self, panel: Panel, rows: int, part: Part, column: int, locate: Locate, move: Move
    ) -> None:
        """Move 8 elements at a time, up to 8 threads to a row, whose place is found once."""
        beside = math.gcd(part.size // UNIT, 8)
        apart = self.threads // beside  # rows that are copied at a time
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
                move(part, panel.memory.ptr_to([to]), at + n, there)

        for step in range(-(-rows // apart)):
            if (step + 1) * apart > rows:
                with T.If(own < rows - step * apart), T.Then():
                    row_of(step)
            else:
                row_of(step)

    def _copy(self, part: Part, target: Value, at: Value, there: Value | None) -> None:
        copy_16_bytes(target, self.arguments[part.buffer].flat.ptr_to([at]), there)

    def _round(self, part: Part, target: Value, at: Value, there: Value | None) -> None:
        """Round 8 numbers of float32."""
        flat = self.arguments[part.buffer].flat
        wide, words = scratch(UNIT, "float32"), scratch(UNIT // 2, "uint32")
        for n in range(0, UNIT, 4):
            ptx("ld.global.v4.f32", *[wide[n + c] for c in range(4)], flat.ptr_to([at + n]))
        found = [pin(load(wide, n)) for n in range(UNIT)]
        if part.fn is not None:
            found = [self._applied(part.fn, x) for x in found]
        if there is not None:
            found = [select(there, x, const(0.0, "float32")) for x in found]
        for n in range(UNIT // 2):
            store(words, pack(found[2 * n], found[2 * n + 1], self.dtype), n)
        ptx("st.shared.v4.b32", target, *[words[n] for n in range(UNIT // 2)])

    def _applied(self, fn: Expr, x: Value) -> Value:
        """Return a function of a number as float32."""
        y = emit(fn, Env(symbols={"x": x}, functions=FUNCTIONS))
        return pin(y if dtype_of(y) == "float32" else cast(y, "float32"))

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
                    x = self._applied(part.fn, T.bind(x))
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
