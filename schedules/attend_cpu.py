"""Attention over key ranges or lists on a CPU: rows in SIMD lanes, keys broadcast from memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.attend import AttendKernel, Plan, shared_heads, token_lists
from sparsegen.codegen.cpu.attention import Blocking
from sparsegen.codegen.cpu.tile import Tile
from sparsegen.codegen.cpu.vec import float_lanes
from sparsegen.codegen.tvm import I, IRBuilder, T
from sparsegen.errors import CompileError
from sparsegen.ir.expr import BlockOf, Member, walk
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import AttendTask

FAMILY = "attend"
REQUIRES = frozenset({"cpu"})
PRIORITY = 0


@dataclass(frozen=True)
class Knobs:
    """How the work is cut.

    tokens   queries of a tile
    heads    query heads of a tile: a divisor of those that share keys and lists
    vectors  vectors of a sub-tile, what registers hold of a tile's rows
    chunk    keys handled at a time: scores of so many keys are stored
    keys     keys of a register tile of scores; divides `chunk`
    dims     elements of a register tile of values
    pieces   pieces a tile's keys may be cut in when there are fewer tiles than cores
    copy     convert keys even where they could be read in place
    """

    tokens: int = 1
    heads: int = 1
    vectors: int = 1
    chunk: int = 64
    keys: int = 8
    dims: int = 16
    pieces: int = 8
    copy: bool = False


def accepts(task: AttendTask, arch: Arch) -> str | None:
    """Return None, or why this schedule does not take the task."""
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
    return None


def default(task: AttendTask, arch: Arch) -> Knobs:
    """Return knobs that are good without measuring."""
    width = float_lanes(arch)
    heads = shared_heads(task)
    # Tokens that differ in their lists share a tile only to fill the lanes.
    tokens = max(1, (width if token_lists(task) else 4 * width) // heads)
    tokens = min(tokens, 32) if _looks_up(task) else tokens
    vectors = 2 if heads * tokens >= 2 * width and arch.vector_registers >= 32 else 1
    dims = 8 if vectors == 2 or arch.vector_registers < 32 else 16
    return Knobs(tokens=tokens, heads=heads, vectors=vectors, dims=dims)


def space(task: AttendTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first = default(task, arch)
    yield first
    width = float_lanes(arch)
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128):
        for vectors, keys, dims in ((1, 8, 16), (1, 16, 16), (2, 8, 8), (4, 4, 4)):
            for chunk in (32, 64, 128):
                knobs = replace(
                    first, tokens=tokens, vectors=vectors, keys=keys, dims=dims, chunk=chunk
                )
                if knobs == first or tokens * first.heads > 16 * width:
                    continue
                reason = _excluded(task, knobs, arch)
                yield knobs if reason is None else Rejected(asdict(knobs), reason)


def apply(task: AttendTask, knobs: Knobs, arch: Arch) -> Any:
    """Return the module of the kernel.

    Raises:
        CompileError: the knobs break an inequality.
    """
    reason = _excluded(task, knobs, arch)
    if reason is not None:
        raise CompileError(f"{task.name}: {reason}", at=task.site, hint="take knobs from space()")
    tile = Tile(knobs.tokens, knobs.heads, float_lanes(arch), knobs.vectors)
    blocking = Blocking(knobs.chunk, knobs.keys, knobs.dims)
    with IRBuilder() as builder, I.ir_module(), T.prim_func(s_tir=True):
        AttendKernel(task, Plan(tile, blocking, knobs.pieces, knobs.copy), arch).emit()
    return builder.get()


def _looks_up(task: AttendTask) -> bool:
    """Tell whether a selection is looked up key by key, which takes a bit per token."""
    residuals = [c.residual for s in task.sources for c in s.clauses]
    return any(isinstance(e, Member) for r in residuals for e in walk(r))


def _excluded(task: AttendTask, knobs: Knobs, arch: Arch) -> str | None:
    registers = arch.vector_registers
    used = max(knobs.keys, knobs.dims) * knobs.vectors + knobs.vectors + 1
    if used > registers:
        return f"{used} vectors in use, {registers} registers"
    if knobs.chunk % knobs.keys:
        return f"chunk {knobs.chunk} is no multiple of keys {knobs.keys}"
    if shared_heads(task) % knobs.heads:
        return f"{knobs.heads} heads do not divide the {shared_heads(task)} that share keys"
    if knobs.tokens > 32 and (_looks_up(task) or token_lists(task)):
        return f"{knobs.tokens} tokens, but there are 32 bits to say which of them see a key"
    rows = knobs.tokens * knobs.heads
    lanes = knobs.vectors * float_lanes(arch)
    if knobs.vectors > 1 and rows <= lanes // 2:
        return f"{rows} rows leave half of {lanes} lanes idle"
    return None
