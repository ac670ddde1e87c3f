"""Attention over key ranges or lists with mma.sync, one source from sm_80 on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.gpu.attend import AttendKernel
from sparsegen.codegen.gpu.attend_cut import (
    Shape,
    converts,
    dtype_of,
    listed,
    registers,
    shape_of,
    shared_bytes,
    short,
)
from sparsegen.codegen.gpu.attend_maps import MappedKernel
from sparsegen.codegen.gpu.launch import FUNCTIONS, kernel
from sparsegen.codegen.gpu.membership import map_buffers, members_of, spread
from sparsegen.codegen.gpu.spans import Spans, span_buffers
from sparsegen.errors import CompileError
from sparsegen.ir.expr import TRUE, Apply, BlockOf, Expr, Member, walk
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import AttendTask, Buffer

FAMILY = "attend"
REQUIRES = frozenset({"mma", "cp_async", "ldmatrix"})
PRIORITY = 0


@dataclass(frozen=True)
class Knobs:
    """How the work is cut.

    warps    warps along the rows of a tile
    tiles    16 (query, head) rows of a warp: 1 or 2
    columns  warps along the elements of the values, and along the keys of a chunk
    depths   warps of these that score the same keys, each by half of the elements: 1 or 2
    keys     keys of a chunk: a multiple of 16 for each column
    stages   chunks in shared memory; with 1, keys and values are copied by turns
    """

    warps: int = 4
    tiles: int = 2
    columns: int = 1
    depths: int = 1
    keys: int = 64
    stages: int = 1


SUMS = 192  # registers of a thread for scores and sums; what is left holds operands and addresses
# Of these, what is not left where keys or values are converted, where a score mod calls functions
# and keys lie in pages, or where lists name the keys.
CONVERTED, CALLED, LISTED = 16, 16, 32
_BARRIERS = 15
_RESERVED = 1024  # bytes of shared memory that a block takes beside its own
# The best on an H100 first, of those that fit.
_PREFERRED = (
    Knobs(4, 2, 1, 1, 128, 1),
    Knobs(4, 2, 1, 1, 64, 1),
    Knobs(4, 2, 1, 1, 48, 1),
    Knobs(4, 2, 1, 1, 32, 1),
    Knobs(2, 2, 2, 1, 64, 1),
    Knobs(2, 2, 2, 1, 32, 1),
    Knobs(2, 2, 4, 2, 64, 2),
    Knobs(2, 2, 4, 1, 64, 2),
    Knobs(2, 2, 4, 2, 64, 1),
    Knobs(2, 2, 4, 1, 64, 1),
    Knobs(4, 1, 1, 1, 64, 1),
    Knobs(4, 1, 1, 1, 32, 1),
    Knobs(2, 1, 2, 1, 32, 1),
    Knobs(2, 1, 1, 1, 32, 1),
)
# Where no more than 16 rows share their keys: several warps are then found along the values only.
_NARROW = (Knobs(1, 1, 4, 1, 64, 1), Knobs(1, 1, 2, 1, 64, 1))


def accepts(task: AttendTask, arch: Arch) -> str | None:
    """Return None, or why this schedule does not take the task."""
    if dtype_of(task) is None:
        return (
            "tensor cores multiply 16-bit numbers, and every input is float32: pass "
            'dtype="bfloat16" or "float16"'
        )
    # Lists are taken as they are where they have an item twice.
    reason = _excluded(task, _least(task), arch)
    if reason is not None:
        return reason
    task = spread(task)
    for source in task.sources:
        for clause in source.clauses:
            for member in walk(clause.residual):
                if isinstance(member, Member):
                    last = member.keys[-1]
                    if isinstance(last, BlockOf) and last.axis.overlaps:
                        return (
                            "an entry that overlaps several blocks is looked up in a selection of "
                            "blocks beside another one"
                        )
    return _excluded(task, _least(task), arch)


def default(task: AttendTask, arch: Arch) -> Knobs:
    """Return the largest cut of which enough warps fit a multiprocessor to hide each other's waits.

    Two for each of its four schedulers; one where tensor cores are slow beside shared memory, as
    on the smaller multiprocessors of workstations.
    """
    task = spread(task)
    slow = arch.shared_core_bytes < 128 << 10
    narrow = _shape(task, Knobs()).rows == 16
    for wanted in (4, 1) if slow else (8, 4, 1):
        for knobs in (*_NARROW, *_PREFERRED) if narrow else _PREFERRED:
            if _excluded(task, knobs, arch) is not None or _spills(task, knobs, arch):
                continue
            if _resident(task, knobs, arch) >= wanted:
                return knobs
    return _least(task)


def _spills(task: AttendTask, knobs: Knobs, arch: Arch) -> bool:
    """Tell whether a cut is known to lack registers, though they are enough by their number.

    Compilers for GPUs after Hopper keep the addresses of copies in them, of each clause, and where
    masks ask pair by pair; those for all GPUs where pairs are asked of maps.
    """
    clauses = [c for s in task.sources for c in s.clauses]
    many = len(clauses) > 1 or any(c.residual != TRUE and not c.exact for c in clauses)
    after = "tma" in arch.features and "wgmma" not in arch.features
    return ((after and many) or bool(members_of(task))) and short(task, _shape(task, knobs))


def _resident(task: AttendTask, knobs: Knobs, arch: Arch) -> int:
    """Return the warps that a multiprocessor holds, each with all registers a thread can have."""
    shape = _shape(task, knobs)
    shared = arch.shared_core_bytes // (shared_bytes(task, shape) + _RESERVED)
    registers = arch.vector_registers // (256 * shape.threads)
    return min(shared, registers) * shape.threads // 32


def space(task: AttendTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first, task = default(task, arch), spread(task)
    yield first
    for values in itertools.product(
        (1, 2, 4, 8), (1, 2), ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2)), (32, 48, 64, 128), (1, 2)
    ):
        warps, tiles, split, keys, stages = values
        knobs = Knobs(warps, tiles, *split, keys, stages)
        shape = _shape(task, knobs)
        # Fewer rows share their keys than so many warps would take: others are the same cut.
        if knobs == first or (shape.row_warps, shape.tiles) != (warps, tiles):
            continue
        reason = _excluded(task, knobs, arch)
        yield knobs if reason is None else Rejected(asdict(knobs), reason)


def apply(task: AttendTask, knobs: Knobs, arch: Arch) -> Any:
    """Return the module of the kernel.

    Raises:
        CompileError: the knobs break an inequality.
    """
    asked, task = task, spread(task)
    reason = _excluded(task, knobs, arch)
    if reason is not None:
        raise CompileError(f"{task.name}: {reason}", at=task.site, hint="take knobs from space()")
    shape = _shape(task, knobs)
    buffers = tuple(b for b, _ in scratch(task, knobs, arch))
    with kernel(task, buffers) as (builder, arguments):
        if map_buffers(task):
            MappedKernel(asked, shape, arguments, arch.shared_bytes).emit()
        else:
            spans = Spans.of(task, arguments, shape.tokens, 1)
            AttendKernel(task, shape, arguments, spans=spans).emit()
    return builder.get()


def scratch(task: AttendTask, knobs: Knobs, arch: Arch) -> tuple[tuple[Buffer, Expr], ...]:
    """Return the maps of lists that are spread, or what narrows ranges."""
    task = spread(task)
    return tuple(map_buffers(task) or span_buffers(task, _shape(task, knobs).tokens, 1))


def _least(task: AttendTask) -> Knobs:
    """Return the knobs that need least."""
    columns = _shape(task, Knobs(1, 1, 1, 1, 16, 1)).columns
    return Knobs(1, 1, columns, 1, 16 * columns, 1)


def _shape(task: AttendTask, knobs: Knobs) -> Shape:
    return shape_of(
        task, knobs.warps, knobs.tiles, knobs.columns, knobs.depths, knobs.keys, knobs.stages
    )


def _calls(task: AttendTask) -> bool:
    """Tell whether a score mod calls functions while threads look pages up."""
    mod = walk(task.mod) if task.paged and task.mod is not None else ()
    return any(isinstance(e, Apply) and e.op in FUNCTIONS for e in mod)


def _excluded(task: AttendTask, knobs: Knobs, arch: Arch) -> str | None:
    if min(knobs.warps, knobs.tiles, knobs.columns, knobs.depths, knobs.stages) < 1:
        return "warps, tiles, columns, depths and stages are at least 1"
    shape = _shape(task, knobs)
    if knobs.keys < 16 or knobs.keys % (16 * shape.columns) or knobs.keys > 128:
        return f"{knobs.keys} keys: a multiple of {16 * shape.columns} up to 128"
    if shape.columns != knobs.columns:
        return f"{knobs.columns} columns, sums need {shape.columns}"
    if knobs.depths > 1:
        if knobs.depths != 2 or shape.tiles != 2 or shape.columns % 2:
            return "2 depths take 2 tiles, and an even number of columns"
        if task.q.dim % 64:
            return f"2 depths of {task.q.dim} elements: a multiple of 64"
    barriers = shape.row_warps * (1 + (shape.depths > 1) * shape.columns // 2)
    if shape.columns > 1 and barriers > _BARRIERS:
        return f"{barriers} barriers of a block, beside that of all its threads, of {_BARRIERS}"
    used = shared_bytes(task, shape)
    if used > arch.shared_bytes:
        return f"{used} bytes of shared memory, {arch.name} has {arch.shared_bytes}"
    if shape.threads > 1024:
        return f"{shape.threads} threads of a block"
    sums = registers(task, shape)
    taken = CONVERTED * converts(task), CALLED * _calls(task), LISTED * listed(task)
    most = SUMS - max(taken)
    if sums > most:
        return f"{sums} registers of a thread for scores and sums, of {most}"
    if sums * shape.threads > 48 << 10:
        return f"{sums * shape.threads} registers of a block for scores and sums"
    return None
