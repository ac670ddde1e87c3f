"""Multiply tiles on tensor cores with mma.sync: fragments, and how they come out of shared memory.

Tiles lie in shared memory by rows of `pitch` elements. Eight elements, 16 bytes, are a unit; the
units of a row are permuted so that those of eight neighbouring rows at one column fall into
different banks. An accumulator of m16n8 holds, per lane, rows lane / 4 and lane / 4 + 8, columns
2 * (lane % 4) and the next: element 2 * half + column. The same registers, packed in pairs, are the
A operand of the next product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sparsegen.codegen.cpu.stream import pin
from sparsegen.codegen.tvm import Memory, T, Value, cast, const, load, reinterpret, store

UNIT = 8  # elements of 16 bits that are copied and read together
_PTX = {"bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Panel:
    """A tile of elements in shared memory.

    pitch  elements of a row; a multiple of 16 for tiles that tensor cores read
    first  the column of the tile at which the columns of this panel start
    base   the element of `memory` at which the tile starts: a multiple of `span`
    """

    memory: Memory
    pitch: int
    first: int = 0
    base: Value = 0

    @property
    def span(self) -> int:
        """Return the elements of a row among which units change places."""
        units = self.pitch // UNIT
        return UNIT * min(units & -units, 8) if self.pitch % UNIT == 0 else 1

    def at(self, base: Value) -> Panel:
        """Return the panel of a tile that starts elsewhere in the same memory."""
        return replace(self, base=base)

    def index(self, row: Value, column: Value) -> Value:
        """Return where in `memory` an element is."""
        return self.base + row * self.pitch + self._permuted(row, column + self.first)

    def pointer(self, row: Value, column: Value) -> Value:
        """Return the address of an element."""
        return self.memory.ptr_to([self.index(row, column)])

    def origin(self, row: Value, column: Value) -> Value:
        """Return what `shifted` starts from: where an element of the tile is."""
        return row * self.pitch + self._permuted(row, column)

    def shifted(self, origin: Value, column: int) -> Value:
        """Return where an element is, `column` columns right of an origin.

        `column` and the column of the origin have no bit in common.
        """
        column += self.first
        low = column % self.span
        near = T.bitwise_xor(origin, const(low, "int32")) if low else origin
        return near + (column - low)

    def _permuted(self, row: Value, column: Value) -> Value:
        units = self.span // UNIT
        if units < 2:
            return column
        twist = row // (8 // units) % units * UNIT
        return T.bitwise_xor(column, twist)


def ptx(instruction: str, *operands: Any) -> None:
    """Emit a PTX instruction; destinations are operands as the others."""
    T.evaluate(T.ptx[instruction](*operands))


class Fragments:
    """Reads operands of 16 x 16 out of the tiles of a panel.

    row         the first row that is read, a multiple of 8
    column      the first column: what is read of it on is as wide as a span, or divides it
    beside      the operand is B, and the rows of the panel are its columns
    transposed  the operand is B, and the rows of the panel are its depth
    """

    def __init__(
        self, panel: Panel, lane: Value, row: Value = 0, column: Value = 0,
        *, beside: bool = False, transposed: bool = False,
    ) -> None:  # fmt: skip
        self.panel, self.kind = panel, ".trans" if transposed else ""
        if beside:
            r, c = lane // 16 * 8 + lane % 8, lane // 8 % 2 * 8
        else:
            r, c = lane % 16, lane // 16 * 8
        self.lane = pin(panel.origin(pin(r), pin(c + column)) + row * panel.pitch)

    def origin(self, base: Value = 0) -> Value:
        """Return where the tile starts whose first element is `base`, for `read`."""
        return pin(self.lane + base)

    def read(self, origin: Value, row: int, column: int, out: Memory, at: int = 0) -> None:
        """Read the fragment at a row and a column, multiples of 16: uint32 [4] from `at` on.

        As A: rows 0 to 7 and 8 to 15 of columns 0 to 7, then of columns 8 to 15. As B: two
        registers for columns 0 to 7 of the product, and two for columns 8 to 15.
        """
        where = self.panel.shifted(origin, column) + row * self.panel.pitch
        registers = [out[at + n] for n in range(4)]
        name = f"ldmatrix.sync.aligned.m8n8.x4{self.kind}.shared.b16"
        ptx(name, *registers, self.panel.memory.ptr_to([where]))


def multiply(acc: Memory, at: Value, a: list[Value], b0: Value, b1: Value, dtype: str) -> None:
    """Add a 16 x 16 by 16 x 8 product to four accumulators from `at` on."""
    kind = _PTX[dtype]
    d = [acc[at + n] for n in range(4)]
    ptx(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32", *d, *a, b0, b1, *d)


def pack(low: Value, high: Value, dtype: str) -> Value:
    """Round two numbers and put them into one register, the first in the low half."""
    if dtype == "bfloat16":
        return T.cuda.float22bfloat162_rn(low, high)
    halves = [cast(reinterpret(cast(x, "float16"), "uint16"), "uint32") for x in (low, high)]
    return T.bitwise_or(halves[0], T.shift_left(halves[1], const(16, "uint32")))


def exp2(memory: Memory, at: Value, exponent: Value) -> None:
    """Store 2 to the power `exponent`, 0 instead of a subnormal number."""
    ptx("ex2.approx.ftz.f32", memory[at], exponent)


def scale(memory: Memory, at: Value, factor: Value) -> None:
    """Multiply a number."""
    store(memory, load(memory, at) * factor, at)


def clear(memory: Memory, count: int, value: float = 0.0) -> None:
    """Set the first `count` registers of an array."""
    with T.unroll(count) as n:
        store(memory, const(value, "float32"), n)


def copy_16_bytes(target: Value, source: Value, there: Value | None) -> None:
    """Copy 8 elements into shared memory without waiting; zeros unless `there`, if it is given."""
    size = const(16, "uint32")
    if there is not None:
        size = T.Select(there, size, const(0, "uint32"))
    ptx("cp.async.cg.shared.global.L2::128B", target, source, 16, size)


def copies_started() -> None:
    """End a group of copies of this thread."""
    ptx("cp.async.commit_group")


def copies_done(later: int = 0) -> None:
    """Wait for the groups of copies of this thread, but for the `later` last ones."""
    ptx("cp.async.wait_group", later)
