"""Compute the figures of an explanation from the cost rules, the domains and the arch file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sparsegen.analysis import cost as costs
from sparsegen.analysis.cost import Cost, kernels, multi_head
from sparsegen.analysis.roofline import Bound, Rates, Roofline, of_batch, roofline
from sparsegen.analysis.sums import Sympy, value
from sparsegen.ir.expr import Expr, show
from sparsegen.ir.node import Input, Node
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.printer import show_clause, show_task
from sparsegen.lowering.tasks import AttendTask, Buffer, SelectTask, Task
from sparsegen.lowering.workspace import ITEMSIZE, scratch, workspace
from sparsegen.primitives import Attend, Reduce, Score, Select
from sparsegen.report.counts import NamedCounts
from sparsegen.report.model import Amount, CacheReport, Count, Domain, Kept, Step, TaskReport

_COSTS = {"FLOPs": "products", "pointwise": "pointwise", "read": "read", "written": "written"}


class Figures:
    """The numbers of a bound program at given sizes.

    Args:
        plan: what runs.
        sizes: of all letters.
        batch: how many sequences of these lengths.
        rates: of the processor.
    """

    def __init__(self, plan: Plan, sizes: Mapping[str, int], batch: int, rates: Rates) -> None:
        self.plan, self.batch, self.rates = plan, batch, rates
        self.at = NamedCounts(
            plan.program,
            sizes,
            itemsize={node.name: ITEMSIZE[buffer.dtype] for node, buffer in plan.inputs},
            default=ITEMSIZE[plan.binding.dtype],
        )
        # Every stored value is one task, in the same order.
        self._costs = tuple(
            (node, cost, task)
            for (node, cost), task in zip(kernels(self.at), plan.tasks, strict=True)
        )

    def tasks(self) -> Iterator[TaskReport]:
        """Yield the tasks, without their schedules."""
        for node, cost, task in self._costs:
            roof = self._roof(node, cost)
            first, *rest = (line.strip() for line in show_task(task))
            yield TaskReport(
                name=task.name,
                family=task.family,
                at="" if task.site is None else str(task.site),
                lines=(
                    f"writes {first.partition(': ')[2]}",
                    *(line for line in rest if not line.startswith("for j in")),
                ),
                domains=tuple(self._domains(node, task)),
                cost=self._amounts(cost),
                assumed=cost.assumed,
                intensity=self.amount(roof.intensity),
                ridge=roof.ridge,
                bound=self._bound(roof),
            )

    def total(self) -> dict[str, Amount]:
        """Return the cost of all tasks together."""
        return self._amounts(self._sum())

    def seconds(self) -> float:
        """Return the least time of the tasks one after the other, for all sequences."""
        return sum(self._bound(self._roof(node, cost)).seconds for node, cost, _ in self._costs)

    def workspace(self) -> Amount:
        """Return the bytes of what the tasks hand to each other."""
        return self.amount(workspace(self.plan, self.at, self.batch))

    def scratch(self, taken: Iterable[tuple[Buffer, Expr]]) -> Amount:
        """Return the bytes that a schedule takes beside the buffers of its task."""
        return self.amount(scratch(taken, self.at, self.batch))

    def cache(self) -> CacheReport:
        """Return what decoding keeps."""
        import sympy as sp

        found = costs.cache(self.at)
        growing = [c for c in found if c.last is None]
        elements = sum((c.elements for c in growing), sp.Integer(0))
        total, plain = self.amount(elements), multi_head(self.at)
        other = None if plain is None else self.amount(plain)
        return CacheReport(
            kept=tuple(
                Kept(
                    name=c.name,
                    elements=self.amount(c.elements),
                    bytes=self.amount(c.bytes),
                    last=None if c.last is None else self.amount(c.last),
                )
                for c in found
            ),
            elements=total,
            bytes=self.amount(sum((c.bytes for c in growing), sp.Integer(0))),
            multi_head=other,
            saving=None if other is None else 100 * (1 - total.value / other.value),
        )

    def step(self) -> Step:
        """Return what the last query asks for."""
        spent = self._sum()
        return Step(
            at_most=Amount(str(spent.at_most), value(spent.at_most, self.at.sizes)),
            attended=self.amount(spent.attended),
            scored=self.amount(spent.scored),
            flops={
                task.name: self.amount(cost.step) for _, cost, task in self._costs if cost.step != 0
            },
            total=self.amount(spent.step),
        )

    def amount(self, expr: Sympy) -> Amount:
        """Return an expression as text, with its value."""
        return Amount(self.at.formula(expr), value(expr, self.at.sizes))

    def _amounts(self, cost: Cost) -> dict[str, Amount]:
        return {name: self.amount(getattr(cost, field)) for name, field in _COSTS.items()}

    def _sum(self) -> Cost:
        return costs.total(cost for _, cost, _ in self._costs)

    def _roof(self, node: Node, cost: Cost) -> Roofline:
        return roofline(of_batch(cost, node, self.at, self.batch), self.rates)

    def _bound(self, roof: Roofline) -> Bound:
        return roof.bound(self.at.sizes)

    def _domains(self, node: Node, task: Task) -> Iterator[Domain]:
        match node, task:
            case Attend(q=q, sources=sources), AttendTask():
                for source, lowered in zip(sources, task.sources, strict=True):
                    yield self._domain(q, source.k, source.where, lowered.clauses)
            case Select(x=x), SelectTask(clauses=clauses):
                score = _score(x)
                yield self._domain(score.q, score.k, score.where, clauses)

    def _domain(self, q: Node, k: Node, where: Any, clauses: tuple[Any, ...]) -> Domain:
        seen = self.at.counted(where, q, k)
        return Domain(
            keys=f"{_name(k)} [{' '.join(map(str, k.axes))}] where {show(where)}",
            ranges=tuple(map(show_clause, clauses)),
            pairs=self._count(seen.total),
            distinct=self._count(seen.distinct),
            last=self.amount(seen.last),
        )

    def _count(self, count: Sympy) -> Count:
        amount = self.amount(count)
        return Count(amount.formula, amount.value, self.at.name(count))


def _score(node: Node) -> Score:
    while isinstance(node, Reduce):
        node = node.x
    assert isinstance(node, Score)
    return node


def _name(node: Node) -> str:
    return node.name if isinstance(node, Input) else node.op
