"""Multiply tiles on Hopper's tensor cores with wgmma: descriptors, swizzles, fragments.

Operands in shared memory are panels of tiles of 64 rows and 64 16-bit columns, a row 128 bytes.
Eight 16-byte pieces make a row; piece c of row r lies at c ^ (r % 8), the swizzle that wgmma
undoes. An accumulator of 64 x n holds, per lane, rows 16 * warp + lane / 4 and 8 more, columns
8 * j + 2 * (lane % 4) and the next: element 4 * j + 2 * half + column. The same registers, packed
in pairs, are the A operand of the next product.
"""

from __future__ import annotations

from collections.abc import Iterable

from sparsegen.codegen.gpu.mma import pack, ptx
from sparsegen.codegen.tvm import Memory, T, Value, cast, const, load, store

TILE = 64 * 64  # elements of a tile
DEPTHS = 4  # products of depth 16 in a tile
_PTX = {"bfloat16": "bf16", "float16": "f16"}

# Rows are 128 bytes, swizzled; groups of 8 rows are 1024 bytes apart.
_SWIZZLED = (1 << 62) | (64 << 32)
# The depth runs along the columns of a tile.
ALONG = _SWIZZLED | (1 << 16)


def across(rows: int) -> int:
    """Return the kind of descriptor whose depth runs along the rows of panels of `rows` rows."""
    return _SWIZZLED | ((rows * 128 >> 4) << 16)


# The depth runs along the rows; the next 64 columns are one tile further.
ACROSS = across(64)

_HOLD = """
__device__ __forceinline__ void sparsegen_hold_%d(float* x) {
#pragma unroll
  for (int i = 0; i < %d; ++i) asm volatile("" : "+f"(x[i]) :: "memory");
}
"""
_OPAQUE = """
__device__ __forceinline__ unsigned long long sparsegen_opaque(unsigned long long x) {
  asm volatile("" : "+l"(x));
  return x;
}
"""


def descriptor(kind: int, pointer: Value) -> Value:
    """Describe the tiles from an address on; `kind` is ALONG or ACROSS."""
    address = T.cuda.cvta_generic_to_shared(pointer)
    field = T.bitwise_and(T.shift_right(address, const(4, "uint32")), const(0x3FFF, "uint32"))
    return T.bind(T.bitwise_or(const(kind, "uint64"), cast(field, "uint64")))


def opaque(value: Value) -> Value:
    """Hide a descriptor from the compiler, which keeps one per product in registers otherwise."""
    return T.bind(
        T.cuda.func_call("sparsegen_opaque", value, source_code=_OPAQUE, return_type="uint64")
    )


def hold(memory: Memory, count: int) -> None:
    """Keep reads and writes of accumulators on their side of a wait."""
    source = _HOLD % (count, count)
    T.evaluate(T.cuda.func_call(f"sparsegen_hold_{count}", memory.data, source_code=source))


def begin() -> None:
    """Order what was written to accumulators before the products that follow."""
    ptx("wgmma.fence.sync.aligned")


def commit() -> None:
    """Close a group of products."""
    ptx("wgmma.commit_group.sync.aligned")


def wait(groups: int) -> None:
    """Wait until at most so many groups are under way."""
    ptx("wgmma.wait_group.sync.aligned", groups)


def product(
    acc: Memory, columns: int, a: Value | list[Value], b: Value, dtype: str,
    *, first: int = 0, clear: bool = False, a_across: bool = False, b_across: bool = False,
) -> None:  # fmt: skip
    """Add a product of depth 16 to 64 rows of `columns` accumulators, from register `first` on.

    Args:
        a, b: descriptors, or `a` as four registers; where one is ACROSS, the depth runs along the
            rows of its tiles.
        clear: forget what the accumulators hold.
    """
    sums = [acc[first + i] for i in range(columns // 2)]
    registers = isinstance(a, list)
    rows = a if isinstance(a, list) else [a]
    flags = [1, 1, *([] if registers else [int(a_across)]), int(b_across)]
    ptx(_name(columns, dtype), *sums, *rows, b, T.bool(not clear), *flags)


def scores(
    acc: Memory, queries: Value, keys: Value, tiles: Iterable[int], dtype: str, *, clear: bool
) -> None:
    """Add the product of 64 queries and 64 keys, both ALONG, over the columns of `tiles`."""
    for tile in tiles:
        for depth in range(DEPTHS):
            step = const((tile * TILE * 2 + depth * 32) >> 4, "uint64")
            product(acc, 64, queries + step, keys + step, dtype, clear=clear)
            clear = False


def weigh(
    acc: Memory, columns: int, weights: Memory, values: Value, dtype: str, first: int = 0
) -> None:
    """Add the product of 64 x 64 weights in registers (uint32 [16]) and values, ACROSS.

    Accumulators begin at register `first`.
    """
    for depth in range(DEPTHS):
        a = [weights[depth * 4 + i] for i in range(4)]
        b = values + const(depth * 128, "uint64")
        product(acc, columns, a, b, dtype, first=first, b_across=True)


def weigh_shared(acc: Memory, columns: int, weights: Value, values: Value, dtype: str) -> None:
    """Add the product of 64 x 64 weights in shared memory, ALONG, and values, ACROSS."""
    for depth in range(DEPTHS):
        a, b = weights + const(depth * 2, "uint64"), values + const(depth * 128, "uint64")
        product(acc, columns, a, b, dtype, b_across=True)


def scores_across(
    acc: Memory, heads: int, keys: Value, queries: Value, tiles: int, dtype: str, *, clear: bool
) -> None:
    """Add the product of 64 keys and `heads` queries, both ALONG, over `tiles` tiles.

    Rows of the accumulator are keys, its columns heads; tiles of queries have `heads` rows.
    """
    for tile in range(tiles):
        for depth in range(DEPTHS):
            a = keys + const((tile * TILE * 2 + depth * 32) >> 4, "uint64")
            b = queries + const((tile * heads * 128 + depth * 32) >> 4, "uint64")
            product(acc, heads, a, b, dtype, clear=clear)
            clear = False


def weigh_across(
    acc: Memory, first: int, heads: int, values: Value, weights: Value, dtype: str
) -> None:
    """Add the product of 64 columns of 64 values, ACROSS, and the weights of `heads`, ALONG.

    Rows of the accumulator, which begins at register `first`, are columns of the values.
    """
    for depth in range(DEPTHS):
        a, b = values + const(depth * 128, "uint64"), weights + const(depth * 2, "uint64")
        product(acc, heads, a, b, dtype, first=first, a_across=True)


def _name(columns: int, dtype: str) -> str:
    kind = _PTX[dtype]
    return f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"


def pack_tile(
    out: Memory, acc: Memory, dtype: str, first: int = 0, scale: Memory | None = None,
    columns: int = 64,
) -> None:  # fmt: skip
    """Round columns of accumulators, from register `first` on, into A operands.

    Args:
        out: uint32 [columns / 4].
        scale: float32 [2], a factor for either half of the rows.
    """
    for j in range(columns // 8):
        for half in range(2):
            low, high = (load(acc, first + 4 * j + 2 * half + c) for c in range(2))
            if scale is not None:
                low, high = low * load(scale, half), high * load(scale, half)
            store(out, pack(low, high, dtype), 4 * (j // 2) + 2 * (j % 2) + half)


def swizzled(row: Value, piece: Value) -> Value:
    """Return the element of a tile at which 8 columns of a row begin."""
    return row * 64 + T.bitwise_xor(piece, row % 8) * 8


def store_tile(packed: Memory, tile: Memory, first: int, warp: Value, lane: Value) -> None:
    """Write a packed tile into shared memory, from element `first` on."""
    row = T.bind(warp * 16 + lane % 16)
    for pair in range(4):
        to = tile.ptr_to([swizzled(row, 2 * pair + lane // 16) + first])
        registers = [packed[4 * pair + i] for i in range(4)]
        ptx("stmatrix.sync.aligned.m8n8.x4.shared.b16", to, *registers)


def store_across(
    packed: Memory, heads: int, tile: Memory, first: Value, warp: Value, lane: Value
) -> None:
    """Write weights whose rows are 64 keys into a tile whose rows are heads.

    Args:
        packed: uint32 [heads / 4], pairs of neighbouring heads of 8 * block and more: register
            2 * block + half has the keys of that half of the rows.
        first: element of `tile` at which it begins.
    """
    row, half = lane % 8, lane // 8 % 2
    at = T.bind(swizzled(row, warp * 2 + half) + first)
    for block in range(0, heads // 8, 2):
        # Where one block is left over, the upper lanes write what the lower ones do.
        two = block + 1 < heads // 8
        upper = lane // 16 * 8 * 64 if two else const(0, "int32")
        to = tile.ptr_to([at + block * 8 * 64 + upper])
        registers = [packed[2 * (block + (n // 2 if two else 0)) + n % 2] for n in range(4)]
        ptx("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16", to, *registers)
