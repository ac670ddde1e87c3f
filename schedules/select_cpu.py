"""Exact selection on a CPU: heads in SIMD lanes, one row of scores at a time, radix top-k."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.lists import mentions
from sparsegen.codegen.cpu.scores import Lanes
from sparsegen.codegen.cpu.select import SelectKernel
from sparsegen.codegen.cpu.select_task import lanes_of_pass, looked_up, mixed_stops
from sparsegen.codegen.cpu.vec import float_lanes
from sparsegen.codegen.tvm import I, IRBuilder, T
from sparsegen.errors import CompileError
from sparsegen.ir.expr import BlockOf, Head
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import SelectTask

FAMILY = "select"
REQUIRES = frozenset({"cpu"})
PRIORITY = 0


@dataclass(frozen=True)
class Knobs:
    """How scores are tiled. keys: keys of a register tile, each met by up to four vectors."""

    keys: int = 6


def accepts(task: SelectTask, arch: Arch) -> str | None:
    """Return None, or why this schedule does not take the task."""
    if len(task.stages) > 2:
        return f"{len(task.stages)} reductions follow each other; two are lowered"
    if len(task.stages) == 2 and isinstance(task.stages[0].keys[-1], BlockOf):
        return "a reduction to blocks of overlapping entries is reduced again"
    if looked_up(task):
        return "a predicate looks keys up in a second selection"
    if any(mentions(c.residual, Head) for c in task.clauses) and lanes_of_pass(task) > 1:
        return "a predicate depends on the head, but several heads share a list"
    if mixed_stops(task):
        return "an expression mentions the length of another key axis than the scored one"
    return None


def default(task: SelectTask, arch: Arch) -> Knobs:
    """Return a register tile that leaves room for the query and a key."""
    vectors = min(4, -(-lanes_of_pass(task) // float_lanes(arch)))
    limit = (arch.vector_registers - vectors - 2) // vectors
    return Knobs(keys=min(limit, 6 if vectors == 4 else 8))


def space(task: SelectTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first = default(task, arch)
    yield first
    for keys in (1, 2, 4, 6, 8, 12):
        knobs = Knobs(keys=keys)
        if knobs != first:
            reason = _excluded(task, knobs, arch)
            yield knobs if reason is None else Rejected(asdict(knobs), reason)


def apply(task: SelectTask, knobs: Knobs, arch: Arch) -> Any:
    """for list: for token: (positions; scores; reduce); select  ->  one parallel loop over lists

    Raises:
        CompileError: the knobs break an inequality.
    """
    reason = _excluded(task, knobs, arch)
    if reason is not None:
        raise CompileError(f"{task.name}: {reason}", at=task.site, hint="take knobs from space()")
    lanes = Lanes(lanes_of_pass(task), float_lanes(arch), knobs.keys)
    with IRBuilder() as builder, I.ir_module(), T.prim_func(s_tir=True):
        SelectKernel(task, arch, lanes).emit()
    return builder.get()


def _excluded(task: SelectTask, knobs: Knobs, arch: Arch) -> str | None:
    vectors = min(4, -(-lanes_of_pass(task) // float_lanes(arch)))
    used = knobs.keys * vectors + vectors + 1
    if knobs.keys < 1 or used > arch.vector_registers:
        return f"{used} vectors in use, {arch.vector_registers} registers"
    return None
