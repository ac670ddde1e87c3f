"""Exact selection on a GPU: tensor cores where operands have 16 bits, else float32 products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.select_task import Facts, granule, is_slash
from sparsegen.codegen.gpu.launch import kernel
from sparsegen.codegen.gpu.score import Shape
from sparsegen.codegen.gpu.select import RESIDENT, SelectKernel, memory_of, shared_bytes
from sparsegen.errors import CompileError
from sparsegen.ir.expr import BlockOf, Expr
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import Buffer, SelectTask

FAMILY = "select"
REQUIRES = frozenset({"mma", "cp_async", "ldmatrix"})
PRIORITY = 0

# Keys of a chunk, the best first: a warp wants 16 of them at least.
KEYS = (128, 64, 32, 16)


@dataclass(frozen=True)
class Knobs:
    """How scores are tiled.

    rows    (query, head) rows of a tile, at most: a multiple of 16
    keys    keys of a chunk: 16, 32, 64 or 128
    blocks  blocks at work; each has memory for the rows of groups of one tile
    """

    rows: int = 64
    keys: int = 128
    blocks: int = 264


def accepts(task: SelectTask, arch: Arch) -> str | None:
    """Return None, or why this schedule does not take the task."""
    reason = Facts(task).refusal()
    return _excluded(task, Knobs(16, 16), arch) if reason is None else reason


def default(task: SelectTask, arch: Arch) -> Knobs:
    """Return the largest tile and chunk that leave room for a second block."""
    blocks = RESIDENT * (arch.cores or 132)
    for share in (RESIDENT, 1):
        for rows in (64, 32, 16):
            for keys in (128, 64):
                knobs = Knobs(rows, keys, blocks)
                if shared_bytes(task, _shape(task, knobs)) * share <= arch.shared_bytes:
                    return knobs
    return Knobs(16, 16, blocks)


def space(task: SelectTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first = default(task, arch)
    yield first
    for rows in (16, 32, 64):
        for keys in KEYS:
            knobs = Knobs(rows, keys, first.blocks)
            if knobs != first:
                reason = _excluded(task, knobs, arch)
                yield knobs if reason is None else Rejected(asdict(knobs), reason)


def scratch(task: SelectTask, knobs: Knobs, arch: Arch) -> tuple[tuple[Buffer, Expr], ...]:
    """Return the memory of the blocks, and how large it is."""
    return (memory_of(task, _shape(task, knobs), knobs.blocks),)


def apply(task: SelectTask, knobs: Knobs, arch: Arch) -> Any:
    """Return the module of the kernel.

    Raises:
        CompileError: the knobs break an inequality.
    """
    reason = _excluded(task, knobs, arch)
    if reason is not None:
        raise CompileError(f"{task.name}: {reason}", at=task.site, hint="take knobs from space()")
    shape = _shape(task, knobs)
    memory, _ = memory_of(task, shape, knobs.blocks)
    with kernel(task, (memory,)) as (builder, arguments):
        SelectKernel(task, shape, arguments, memory).emit()
    return builder.get()


def _shape(task: SelectTask, knobs: Knobs) -> Shape:
    """Return the cut: as many heads that share a key as rows hold, then queries."""
    facts = Facts(task)
    heads = max(n for n in range(1, knobs.rows + 1) if facts.shareable % n == 0)
    tokens = 1 if facts.token_lists else knobs.rows // heads
    if facts.block == 1:
        tokens = min(tokens, max(1, _rows(facts) // facts.head_rows))
    return Shape(facts.fitting(max(1, tokens)), heads, knobs.keys, 256)


def _rows(facts: Facts) -> int:
    """Return how many rows of groups a block may keep: fewer where a group is a key."""
    key, entries = facts.stages[0].keys[-1], facts.task.k.rows.entries
    stride = 1 if entries is None else entries.stride
    if is_slash(key):
        return 8
    if isinstance(key, BlockOf):
        return 8 * key.width
    found = granule(key)
    assert found is not None
    return 8 * found[0] * stride


def _excluded(task: SelectTask, knobs: Knobs, arch: Arch) -> str | None:
    if knobs.rows % 16 or not 16 <= knobs.rows <= 256 or knobs.keys not in KEYS:
        return f"{knobs.rows} rows and {knobs.keys} keys: multiples of 16, and powers of two"
    if knobs.blocks < 1:
        return "no block"
    used = shared_bytes(task, _shape(task, knobs))
    if used > arch.shared_bytes:
        return f"{used} bytes of shared memory, {arch.name} has {arch.shared_bytes}"
    return None
