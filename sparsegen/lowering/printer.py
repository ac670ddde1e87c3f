"""Print a plan: one block per task, with what it reads, its domain and what it writes."""

from __future__ import annotations

from collections.abc import Iterator

from sparsegen.ir.expr import TRUE, Expr, show
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.tasks import (
    AttendTask,
    Buffer,
    Clause,
    CompressTask,
    Interval,
    MergeTask,
    Operand,
    ProjectTask,
    SelectTask,
    Task,
)


def show_plan(plan: Plan) -> str:
    """Return the tasks of a plan as text."""
    lines = [f"plan {plan.program.name} ({plan.binding.layout}, {plan.binding.dtype})"]
    for task in plan.tasks:
        lines += [f"  {line}" for line in show_task(task)]
    results = ", ".join(r.buffer.name for r in plan.results)
    return "\n".join([*lines, f"  return {results}"])


def show_task(task: Task) -> Iterator[str]:
    """Yield the lines of a task: its name and what it writes first."""
    writes = ", ".join(_buffer(b) for b in task.writes)
    yield f"{task.name}: {writes}"
    match task:
        case AttendTask():
            sink = f", sink {task.sink.name}" if task.sink else ""
            yield f"  q {_operand(task.q)}, scale {task.scale:.6g}{sink}"
            if task.mod is not None:
                yield f"  mod {show(task.mod)}"
            for source in task.sources:
                yield f"  k {_operand(source.k)}, v {_operand(source.v)}"
                yield from (f"    {show_clause(c)}" for c in source.clauses)
        case SelectTask():
            norm = ", softmax" if task.norm else ""
            yield f"  q {_operand(task.q)}, k {_operand(task.k)}, scale {task.scale:.6g}{norm}"
            yield from (f"    {show_clause(c)}" for c in task.clauses)
            for what in ("mod", "act", "topk", "force"):
                expr = getattr(task, what)
                if expr is not None:
                    yield f"  {what} {show(expr)}"
            for stage in task.stages:
                keys = ", ".join(map(show, stage.keys))
                yield f"  {stage.how} by ({keys}){', softmax' if stage.norm else ''}"
            yield f"  of {show(task.last)} keys"
        case CompressTask():
            yield f"  {task.how} of {_operand(task.x)} over {task.entries}"
        case ProjectTask():
            yield f"  {_operand(task.x)} by {_buffer(task.w)}{' transposed' * task.transposed}"
        case MergeTask():
            how = f"gated by {task.gates.name}" if task.gates else "by lse"
            yield f"  {', '.join(b.name for b in task.parts)} {how}"


def _buffer(buffer: Buffer) -> str:
    rows = () if buffer.rows.space == "none" else (buffer.rows.space,)
    shape = " ".join(map(str, (*rows, *buffer.shape)))
    return f"{buffer.name} {buffer.dtype}[{shape}]"


def _operand(operand: Operand) -> str:
    parts = (
        p.buffer.name
        + (
            f"[{p.start}:{p.start + p.size}]"
            if (p.start, p.size) != (0, p.buffer.shape[-1])
            else ""
        )
        + (f" |> {show(p.fn)}" if p.fn is not None else "")
        for p in operand.parts
    )
    return f"({' + '.join(parts)} x {operand.heads} heads)"


def show_clause(clause: Clause) -> str:
    """Return one stretch of the iteration: its range, what needs no check, and the check."""
    keys = clause.keys
    over = ""
    if keys is not None:
        over = f"list {show(keys.member)} x {keys.granule} of "
    text = f"for j in {over}{show_interval(clause.hull)}"
    if clause.full is not None:
        text += f", full in {show_interval(clause.full)}"
    if clause.residual != TRUE:
        text += f", where {show(clause.residual)}"
    return text


def show_interval(interval: Interval) -> str:
    """Return [lo, hi) with max and min where there are several bounds."""
    return f"[{_bound('max', interval.lo)}, {_bound('min', interval.hi)})"


def _bound(how: str, bounds: tuple[Expr, ...]) -> str:
    shown = [show(b) for b in bounds]
    return shown[0] if len(shown) == 1 else f"{how}({', '.join(shown)})"
