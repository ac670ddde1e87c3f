"""Attention over key ranges or lists with mma.sync, one source from sm_80 on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.gpu.attend import AttendKernel, dtype_of, shape_of, shared_bytes
from sparsegen.codegen.gpu.launch import kernel
from sparsegen.errors import CompileError
from sparsegen.ir.expr import BlockOf, Member, walk
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import AttendTask

FAMILY = "attend"
REQUIRES = frozenset({"mma", "cp_async", "ldmatrix"})
PRIORITY = 0


@dataclass(frozen=True)
class Knobs:
    """How the work is cut.

    warps  warps along the rows of a tile, 16 (query, head) rows each
    keys   keys of a chunk: a multiple of 16
    """

    warps: int = 4
    keys: int = 64


def accepts(task: AttendTask, arch: Arch) -> str | None:
    """Return None, or why this schedule does not take the task."""
    if dtype_of(task) is None:
        return (
            "tensor cores multiply 16-bit numbers, and every input is float32: pass "
            'dtype="bfloat16" or "float16"'
        )
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
    if _excluded(task, Knobs(1, 16), arch) is not None:
        return _excluded(task, Knobs(1, 16), arch)
    return None


def default(task: AttendTask, arch: Arch) -> Knobs:
    """Return the largest tile and chunk that leave room for a second block."""
    for share in (2, 1):
        for knobs in (Knobs(4, 64), Knobs(4, 32), Knobs(4, 16), Knobs(2, 32), Knobs(2, 16)):
            shape = shape_of(task, knobs.warps, knobs.keys)
            if shared_bytes(task, shape) * share <= arch.shared_bytes and shape.threads >= 32:
                return knobs
    return Knobs(1, 16)


def space(task: AttendTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first = default(task, arch)
    yield first
    for warps in (1, 2, 4, 8):
        for keys in (16, 32, 64, 128):
            knobs = Knobs(warps, keys)
            if knobs != first:
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
    with kernel(task) as (builder, arguments):
        AttendKernel(task, shape_of(task, knobs.warps, knobs.keys), arguments).emit()
    return builder.get()


def _excluded(task: AttendTask, knobs: Knobs, arch: Arch) -> str | None:
    if knobs.keys % 16 or knobs.keys < 16 or knobs.warps < 1:
        return f"{knobs.warps} warps and {knobs.keys} keys: keys are a multiple of 16"
    shape = shape_of(task, knobs.warps, knobs.keys)
    used = shared_bytes(task, shape)
    if used > arch.shared_bytes:
        return f"{used} bytes of shared memory, {arch.name} has {arch.shared_bytes}"
    if shape.threads > 1024:
        return f"{shape.threads} threads of a block"
    return None
