"""Cut attention on mma.sync into tiles and chunks; say what a block and a thread take."""

from __future__ import annotations

from dataclasses import dataclass

from sparsegen.codegen.cpu.attend import shared_heads, token_lists
from sparsegen.codegen.gpu.chunks import ring_bytes
from sparsegen.codegen.gpu.tiles import inside
from sparsegen.lowering.tasks import AttendTask

REGISTERS = 128  # of a thread, for the sums of its rows
HELD = 176  # of a thread, for these, scores and queries; others are read from shared memory
PARTLY_HELD = 184  # the same where warps share rows, which then keep as many queries as fit
LOOKED_UP = 8  # of these, for pages, where lists name keys of one source of several


@dataclass(frozen=True)
class Shape:
    """How a kernel is cut.

    tokens, heads  rows of a tile: `tokens` by `heads`, at most 16 * tiles * row_warps
    row_warps      warps along the rows, `tiles` times 16 rows each
    columns        warps along the elements of the values, and along the keys of a chunk
    depths         warps of these that score the same keys, each by some columns of the queries
    keys           keys of a chunk
    stages         chunks in shared memory; with 1, keys and values are copied by turns
    """

    tokens: int
    heads: int
    row_warps: int
    tiles: int
    columns: int
    depths: int
    keys: int
    stages: int

    @property
    def rows(self) -> int:
        """Return the rows of a tile, those that stand for nothing too."""
        return 16 * self.tiles * self.row_warps

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return 32 * self.row_warps * self.columns


def rounded(n: int, step: int) -> int:
    """Return the next multiple of `step`."""
    return -(-n // step) * step


def dtype_of(task: AttendTask) -> str | None:
    """Return the type that tensor cores multiply: that of the 16-bit inputs; None without any."""
    operands = [task.q, *(x for s in task.sources for x in (s.k, s.v))]
    found = {p.buffer.dtype for o in operands for p in o.parts} - {"float32"}
    return "bfloat16" if "bfloat16" in found else next(iter(found), None)


def converts(task: AttendTask) -> bool:
    """Tell whether keys or values of another type are converted on their way to shared memory."""
    dtype = dtype_of(task)
    parts = [p for s in task.sources for o in (s.k, s.v) for p in o.parts]
    return any(p.fn is not None or p.buffer.dtype != dtype for p in parts)


def listed(task: AttendTask) -> bool:
    """Tell whether lists name keys, so that a thread looks up where each of a chunk is."""
    return any(c.keys is not None for s in task.sources for c in s.clauses)


def inner(task: AttendTask) -> list[int] | None:
    """Return where in the keys of each source its values are; None unless all lie there."""
    columns = [inside(s.v, s.k) for s in task.sources]
    found = [c for c in columns if c is not None and c % 64 == 0]
    return found if len(found) == len(columns) and len(set(found)) == 1 else None


def width_of(task: AttendTask, columns: int) -> int:
    """Return the elements of the values that a warp sums up: of several, 16, 32 or whole spans."""
    least = rounded(-(-task.sources[0].v.dim // columns), 16)
    return least if columns == 1 or least <= 32 else rounded(least, 64)


def pitches(task: AttendTask, columns: int) -> tuple[int, int, int]:
    """Return the elements of a row of queries, keys and values; no values where they are keys."""
    deep = rounded(task.q.dim, 16)
    wide = width_of(task, columns) * columns
    found = inner(task)
    if found is None:
        return deep, deep, wide
    return deep, max(deep, found[0] + wide), 0


def ahead(task: AttendTask, stages: int) -> int:
    """Return how many chunks before its use the keys of a chunk are found."""
    return 2 if stages == 1 and inner(task) is None else stages


def shared_bytes(task: AttendTask, shape: Shape) -> int:
    """Return the shared memory a block takes."""
    deep, keys, values = pitches(task, shape.columns)
    total = 2 * (shape.rows * deep + shape.stages * shape.keys * (keys + values))
    if shape.columns > 1:
        total += shape.rows * (2 * shape.keys + 4 * shape.columns)
    return total + ring_bytes(task, shape.keys, ahead(task, shape.stages) + 1) + 96


def registers(task: AttendTask, shape: Shape) -> int:
    """Return the registers of a thread for scores and sums."""
    keys = shape.keys // shape.columns * shape.depths
    return shape.tiles * (width_of(task, shape.columns) + keys) // 2


def shape_of(
    task: AttendTask, row_warps: int, tiles: int, columns: int, depths: int, keys: int, stages: int
) -> Shape:
    """Return a cut with so many warps along the rows, fewer where fewer rows share their keys."""
    heads = shared_heads(task)
    rows = 16 * tiles * row_warps
    while heads > rows:
        heads = max(n for n in range(1, heads) if heads % n == 0)
    tokens = 1 if token_lists(task) else rows // heads
    tiles = min(tiles, -(-tokens * heads // 16))
    warps = -(-tokens * heads // (16 * tiles))
    while tiles * width_of(task, columns) // 2 > REGISTERS:
        columns *= 2
    return Shape(tokens, heads, warps, tiles, columns, depths, keys, stages)


def held(task: AttendTask, shape: Shape) -> int:
    """Return how many times 16 columns of the queries a thread keeps in registers."""
    mine = rounded(task.q.dim, 16) // 16 // shape.depths
    room = (PARTLY_HELD if shape.columns > 1 else HELD) - registers(task, shape)
    if task.paged and listed(task) and len(task.sources) > 1:
        room -= LOOKED_UP
    fit = room // (4 * shape.tiles)
    return min(fit, mine) if shape.columns > 1 or fit >= mine else 0


def short(task: AttendTask, shape: Shape) -> bool:
    """Tell whether scores and sums leave a thread few registers for anything else."""
    return shape.columns == 1 and registers(task, shape) > HELD


def packs(task: AttendTask, shape: Shape) -> bool:
    """Tell whether all weights of a chunk are rounded before the first is used.

    That halves their registers, of which kernels lack some whose scores take more than their sums,
    whose code for a chunk is there several times, or whose keys lie in pages. Elsewhere tensor
    cores need not wait for it.
    """
    clauses = sum(len(s.clauses) for s in task.sources)
    wide = shape.keys > width_of(task, shape.columns)
    return short(task, shape) and (wide or clauses > 1 or task.paged)
