"""Select a set of keys: exact top-k, top-p or threshold, with forced keys inside the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsegen.errors import PatternError, Site
from sparsegen.ir.expr import Expr
from sparsegen.ir.node import Node
from sparsegen.primitives.reduce import Reduce
from sparsegen.primitives.score import Score


@dataclass(frozen=True, kw_only=True)
class Select(Node):
    """The best keys of the last coordinate, for each value of the coordinates before it.

    Order: score descending, then index ascending; NaN counts as -inf; forced keys come first and
    count inside the budget; keys whose score is -inf are never chosen unless forced. Indices are
    int32, ascending, padded with -1 on the right.

    topk        how many (an expression of the keys before the last, and of stops, is allowed)
    top_p       the shortest prefix of that order whose mass reaches top_p of the row's total mass;
                scores must be non-negative
    threshold   every key whose score is at least this
    topk together with top_p or threshold caps the list. `force` is a predicate over KeyVar.
    """

    op: ClassVar[str] = "select"
    x: Score | Reduce
    topk: Expr | None = None
    top_p: float | None = None
    threshold: float | None = None
    force: Expr | None = None

    @property
    def keys(self) -> tuple[Expr, ...]:
        """Return the key expressions of the space selected over; the last one is selected."""
        return self.x.keys

    @property
    def label(self) -> str:
        return "sel"


def select(
    x: Node,
    *,
    topk: Expr | None,
    top_p: float | None,
    threshold: float | None,
    force: Expr | None,
    site: Site | None,
) -> Select:
    """Type `select(x, topk=...)`."""
    if not isinstance(x, Score | Reduce):
        raise PatternError(f"select() takes a score or a reduction, not a {x.op}", at=site)
    if topk is None and top_p is None and threshold is None:
        raise PatternError(
            "select() needs a budget", at=site, hint="give topk=, top_p= or threshold="
        )
    if top_p is not None and threshold is not None:
        raise PatternError("select() takes top_p= or threshold=, not both", at=site)
    if top_p is not None and not 0 < top_p <= 1:
        raise PatternError(f"top_p={top_p}: a share of the mass lies in (0, 1]", at=site)
    return Select(
        x=x, topk=topk, top_p=top_p, threshold=threshold, force=force, axes=x.axes, site=site
    )
