"""Multiply rows by a weight with mma.sync, one source from sm_80 on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.gpu.launch import kernel
from sparsegen.codegen.gpu.mma import UNIT
from sparsegen.codegen.gpu.project import Projection, shared_bytes
from sparsegen.errors import CompileError
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import ProjectTask

FAMILY = "project"
REQUIRES = frozenset({"mma", "cp_async", "ldmatrix"})
PRIORITY = 5


@dataclass(frozen=True)
class Knobs:
    """How copies run ahead. stages: chunks of 64 depths in shared memory."""

    stages: int = 3


def accepts(task: ProjectTask, arch: Arch) -> str | None:
    """Return None, or why this schedule does not take the task."""
    dtype = task.w.dtype
    if dtype not in ("bfloat16", "float16"):
        return "tensor cores multiply 16-bit numbers, and the weight is float32"
    for part in task.x.parts:
        if part.fn is not None or part.buffer.dtype != dtype:
            return f"some of what is projected is no {dtype} as it lies in memory"
        if any(n % UNIT for n in (part.size, part.start, part.buffer.shape[-1])):
            return f"elements come in parts of {part.size}: no multiples of {UNIT}"
    if task.w.shape[-1] % UNIT:
        return f"rows of the weight have {task.w.shape[-1]} elements: no multiple of {UNIT}"
    return None


def default(task: ProjectTask, arch: Arch) -> Knobs:
    """Return a ring that lets two blocks share a multiprocessor."""
    return Knobs(3 if 2 * shared_bytes(3) <= arch.shared_core_bytes else 2)


def space(task: ProjectTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first = default(task, arch)
    yield first
    for stages in (2, 3, 4):
        if stages != first.stages:
            reason = _excluded(Knobs(stages), arch)
            yield Knobs(stages) if reason is None else Rejected(asdict(Knobs(stages)), reason)


def apply(task: ProjectTask, knobs: Knobs, arch: Arch) -> Any:
    """for tile of rows, head, tile of columns: for chunk of depths: fragments

    Raises:
        CompileError: the knobs break an inequality.
    """
    reason = _excluded(knobs, arch)
    if reason is not None:
        raise CompileError(f"{task.name}: {reason}", at=task.site, hint="take knobs from space()")
    with kernel(task) as (builder, arguments):
        Projection(task, knobs.stages, arguments).emit()
    return builder.get()


def _excluded(knobs: Knobs, arch: Arch) -> str | None:
    if knobs.stages < 2:
        return f"{knobs.stages} stages: one is copied while another is multiplied"
    used = shared_bytes(knobs.stages)
    if used > arch.shared_bytes:
        return f"{used} bytes of shared memory, {arch.name} has {arch.shared_bytes}"
    return None
