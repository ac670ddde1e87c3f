"""Describe a plan to the runner: tensors, tasks and results as plain data."""

from __future__ import annotations

from collections.abc import Mapping

from sparsegen.arch import Arch
from sparsegen.errors import UnsupportedError
from sparsegen.ir.axes import Entries
from sparsegen.ir.expr import Apply, Const, Expr, Stop, show
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.tasks import Buffer
from sparsegen.runtime.standalone.spec import (
    OPERATORS,
    Count,
    ResultSpec,
    Spec,
    TaskSpec,
    TensorSpec,
)


def describe(
    plan: Plan,
    op: str,
    arch: Arch,
    scratch: Mapping[str, tuple[TensorSpec, ...]] | None = None,
    codes: tuple[str, ...] = (),
    shared: int = 0,
) -> Spec:
    """Return the specification of a plan.

    Args:
        plan: what to run.
        op: the name its torch operator gets.
        arch: what it is compiled for.
        scratch: the memory that schedules take beside the buffers of their task, by task.
        codes: what its library holds for GPUs.
        shared: bytes of shared memory that a block takes.

    Raises:
        UnsupportedError: a result has rows that the binding's layout cannot show.
    """
    program, binding = plan.program, plan.binding
    widths = {name: count(expr) for name, expr in plan.widths}
    outputs: dict[str, Buffer] = {r.buffer.name: r.buffer for r in plan.results}
    for result, output in zip(plan.results, program.outputs, strict=True):
        space = result.buffer.rows.space
        if space in ("entry", "query_block") and binding.layout != "sequence":
            raise UnsupportedError(
                f"{program.name} returns {result.buffer.name}, one row for each "
                f"{'entry' if space == 'entry' else 'block of queries'}, whose number differs "
                f"between the sequences of the {binding.layout} layout",
                at=output.node.site,
                hint='bind it with layout="sequence", or return what is made of it',
            )
    buffers = {b.name: b for b in plan.intermediates} | outputs
    taken: dict[str, tuple[TensorSpec, ...]] = {
        t.name: (scratch or {}).get(t.name, ()) for t in plan.tasks
    }
    return Spec(
        name=program.name,
        op=op,
        layout=binding.layout,
        page=binding.page_size if binding.layout == "paged" else 0,
        query=program.query,
        key=program.key,
        single=program.single,
        inputs=tuple(
            tensor(buffer, axes=tuple(map(str, node.axes))) for node, buffer in plan.inputs
        ),
        buffers=(
            *(tensor(b, capacity=widths.get(b.name, 0)) for b in buffers.values()),
            *(memory for several in taken.values() for memory in several),
        ),
        tasks=tuple(
            TaskSpec(
                name=t.name,
                buffers=tuple(b.name for b in (*t.reads, *t.writes))
                + tuple(memory.name for memory in taken[t.name]),
            )
            for t in plan.tasks
        ),
        results=tuple(ResultSpec(buffer=r.buffer.name, what=r.what) for r in plan.results),
        device=arch.kind,
        codes=codes,
        shared=shared,
    )


def tensor(buffer: Buffer, axes: tuple[str, ...] = (), capacity: Count = 0) -> TensorSpec:
    """Return the specification of a buffer; `capacity` is its extent -1."""
    rows = buffer.rows
    visible: Count = 0
    if rows.space == "entry":
        assert rows.entries is not None
        # Entries of queries are counted from the first query, wherever it stands.
        visible = _entries(rows.entries, ("stop", "rows" if rows.role == "query" else "key"))
    divisor = rows.block if rows.space == "query_block" else 1
    return TensorSpec(
        name=buffer.name,
        dtype=buffer.dtype,
        shape=buffer.shape,
        space=rows.space,
        axes=axes if rows.space == "none" else axes[1:],
        role=rows.role,
        divisor=rows.entries.stride if rows.entries is not None else divisor,
        paged=rows.paged,
        visible=visible,
        capacity=capacity,
    )


def _entries(entries: Entries, length: Count) -> Count:
    """Return how many entries `length` positions have; see `Entries.count`."""
    if entries.partial:
        return ("floordiv", ("add", length, entries.stride - 1), entries.stride)
    whole: Count = ("floordiv", ("sub", length, entries.width), entries.stride)
    return ("max", 0, ("add", whole, 1))


def count(expr: Expr) -> Count:
    """Return a width, over the stops that a call has."""
    match expr:
        case Const(int(value)):
            return value
        case Stop(role, Entries() as entries):
            return _entries(entries, ("stop", role))
        case Stop(role):
            return ("stop", role)
        case Apply(op, args) if op in OPERATORS:
            return (op, *map(count, args))
    raise UnsupportedError(
        f"the width of a selection is {show(expr)}, which cannot be computed before it runs",
        hint="give topk= as a number",
    )
