"""Multiply tiles on tensor cores with mma.sync: fragments, and how they come out of shared memory.

Tiles lie in shared memory by rows of `pitch` elements, 8 more than they use, so that the eight
rows an ldmatrix reads fall into different banks. An accumulator of m16n8 holds, per lane, rows
lane / 4 and lane / 4 + 8, columns 2 * (lane % 4) and the next: element 2 * half + column. The same
registers, packed in pairs, are the A operand of the next product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsegen.codegen.tvm import Memory, T, Value, cast, const, reinterpret, store

PAD = 8
_PTX = {"bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Panel:
    """A tile of 16-bit elements in shared memory: row r, column c at r * pitch + first + c."""

    memory: Memory
    pitch: int
    first: int = 0

    def pointer(self, row: Value, column: Value) -> Value:
        """Return the address of an element."""
        return self.memory.ptr_to([row * self.pitch + (column + self.first)])


def ptx(instruction: str, *operands: Any) -> None:
    """Emit a PTX instruction; destinations are operands as the others."""
    T.evaluate(T.ptx[instruction](*operands))


def load_a(panel: Panel, row: Value, column: Value, lane: Value, out: Memory) -> None:
    """Load the A operand of 16 rows and 16 columns: `out` uint32 [4]."""
    r = row + lane % 16
    c = column + lane // 16 * 8
    _ldmatrix("", out, panel.pointer(r, c))


def load_b(panel: Panel, row: Value, column: Value, lane: Value, out: Memory) -> None:
    """Load the B operands whose columns are 16 rows of the tile, and their 16 depths its columns.

    `out` uint32 [4]: two registers for rows 0 to 7, and two for rows 8 to 15.
    """
    r = row + lane // 16 * 8 + lane % 8
    c = column + lane // 8 % 2 * 8
    _ldmatrix("", out, panel.pointer(r, c))


def load_b_transposed(panel: Panel, row: Value, column: Value, lane: Value, out: Memory) -> None:
    """Load the B operands whose depths are 16 rows of the tile, and their columns 16 of its own.

    `out` uint32 [4]: two registers for columns 0 to 7, and two for columns 8 to 15.
    """
    r = row + lane % 16
    c = column + lane // 16 * 8
    _ldmatrix(".trans", out, panel.pointer(r, c))


def _ldmatrix(kind: str, out: Memory, pointer: Value) -> None:
    ptx(f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16", *[out[n] for n in range(4)], pointer)


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


def clear(memory: Memory, count: int, value: float = 0.0) -> None:
    """Set the first `count` registers of an array."""
    with T.unroll(count) as n:
        store(memory, const(value, "float32"), n)


def copy_16_bytes(panel: Panel, row: Value, column: Value, source: Value, there: Value) -> None:
    """Copy 8 elements into a tile without waiting for them; zeros unless `there`."""
    size = T.Select(there, const(16, "uint32"), const(0, "uint32"))
    ptx("cp.async.cg.shared.global", panel.pointer(row, column), source, 16, size)


def copies_done() -> None:
    """Wait for the copies of this thread."""
    ptx("cp.async.commit_group")
    ptx("cp.async.wait_group", 0)
