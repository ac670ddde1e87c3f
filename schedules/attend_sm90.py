"""Attention over a list of keys per token with wgmma and warp roles, for Hopper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.attend import shared_heads
from sparsegen.codegen.gpu.attend import dtype_of
from sparsegen.codegen.gpu.launch import kernel
from sparsegen.codegen.gpu.listed import Cut, ListedKernel, shared_bytes
from sparsegen.codegen.gpu.tiles import inside
from sparsegen.errors import CompileError
from sparsegen.ir.expr import TRUE, Expr, Symbol, rebuild
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import AttendTask, Clause, Interval

FAMILY = "attend"
REQUIRES = frozenset({"wgmma", "cp_async", "mbarrier", "setmaxnreg"})
PRIORITY = 10

# Registers of a block at its start, 168 a thread: three groups of warps share them.
_REGISTERS = 504


@dataclass(frozen=True)
class Knobs:
    """How registers are shared.

    compute  registers of a thread of the two groups that multiply
    copy     registers of a thread of the group that gathers
    """

    compute: int = 216
    copy: int = 72


def accepts(task: AttendTask, arch: Arch) -> str | None:
    """Return None, or why this schedule does not take the task."""
    dtype = dtype_of(task)
    if dtype is None:
        return "tensor cores multiply 16-bit numbers, and every input is float32"
    if len(task.sources) != 1 or len(task.sources[0].clauses) != 1:
        return "it attends to one list of keys, not to several sources or stretches"
    (source,) = task.sources
    (clause,) = source.clauses
    if clause.keys is None or clause.keys.granule != 1 or clause.keys.shift or clause.keys.slash:
        return "no list of single keys drives the iteration"
    if clause.residual != TRUE and not _exact(clause):
        return "keys of the list must be checked one by one"
    if task.mod is not None or task.scale <= 0:
        return "scores are modified, or their scale is not positive"
    if source.k.heads != 1 or shared_heads(task) != task.q.heads:
        return "the query heads do not share one key head and one list"
    if task.q.rows.space != "query" or source.k.rows.space != "key":
        return "queries or keys are not tokens"
    if inside(source.v, source.k) != 0:
        return "values are no prefix of the keys"
    for operand in (task.q, source.k):
        for part in operand.parts:
            if part.fn is not None or part.buffer.dtype != dtype or task.o.dtype != dtype:
                return "operands need a conversion on their way into shared memory"
            if part.size % 64 or part.start % 8 or part.buffer.shape[-1] % 8:
                return "parts of queries and keys are no multiples of 64 elements"
    if source.v.dim != 512:
        return f"values of {source.v.dim} elements: only 512 have been checked on a GPU"
    if task.sink is not None or task.paged or len(task.q.parts) + len(source.k.parts) > 2:
        return "sinks, pages and joined operands have not been checked on a GPU"
    if shared_bytes(task) > arch.shared_bytes:
        return f"{shared_bytes(task)} bytes of shared memory, {arch.name} has {arch.shared_bytes}"
    return None


def default(task: AttendTask, arch: Arch) -> Knobs:
    """Return the split that keeps accumulators of 64 x 256 in registers."""
    return Knobs()


def space(task: AttendTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    for knobs in (Knobs(), Knobs(208, 88), Knobs(224, 56), Knobs(216, 96)):
        reason = _excluded(knobs)
        yield knobs if reason is None else Rejected(asdict(knobs), reason)


def apply(task: AttendTask, knobs: Knobs, arch: Arch) -> Any:
    """Return the module of the kernel.

    Raises:
        CompileError: the knobs break an inequality.
    """
    reason = _excluded(knobs)
    if reason is not None:
        raise CompileError(f"{task.name}: {reason}", at=task.site, hint="take knobs from space()")
    dtype = dtype_of(task)
    assert dtype is not None
    cut = Cut(arch.cores or 1, knobs.compute, knobs.copy)
    with kernel(task) as (builder, arguments):
        ListedKernel(task, cut, dtype, arguments).emit()
    return builder.get()


def _exact(clause: Clause) -> bool:
    """Tell whether one query sees every key of the hull."""

    def alone(interval: Interval) -> Interval:
        def name(e: Expr) -> Expr | None:
            return Symbol("i_min") if e == Symbol("i_max") else None

        lo, hi = (tuple(rebuild(e, name) for e in end) for end in (interval.lo, interval.hi))
        return Interval(lo=lo, hi=hi)

    return clause.full is not None and alone(clause.full) == alone(clause.hull)


def _excluded(knobs: Knobs) -> str | None:
    used = 2 * knobs.compute + knobs.copy
    if knobs.compute % 8 or knobs.copy % 8:
        return f"{knobs.compute} and {knobs.copy} registers: multiples of 8 are handed out"
    if used > _REGISTERS:
        return f"{used} registers of the three groups, a block has {_REGISTERS}"
    return None
