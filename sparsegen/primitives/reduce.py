"""Reduce scores by keys: head sums, block maxima, column mass, slashes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sparsegen.errors import PatternError, Site
from sparsegen.ir.axes import Fixed
from sparsegen.ir.expr import Expr
from sparsegen.ir.node import Node
from sparsegen.primitives.score import Score

ReduceOp = Literal["sum", "max", "mean", "lse"]


@dataclass(frozen=True, kw_only=True)
class Reduce(Node):
    """r[keys] = op over every visible (h, i, j) whose `by` expressions equal the keys.

    A group without a visible element is absent: -inf, never selected unless forced. `norm`
    "softmax" then normalises over the last key. Over a `BlockOf` key, "sum" weighs an entry by
    overlap / stride.
    """

    op: ClassVar[str] = "reduce"
    x: Score | Reduce
    how: ReduceOp
    keys: tuple[Expr, ...]
    norm: Literal["softmax"] | None = None


def source(x: Score | Reduce) -> Score:
    """Return the score at the bottom of a chain of reductions."""
    return x if isinstance(x, Score) else source(x.x)


def reduce(
    x: Node, how: ReduceOp, by: tuple[Expr, ...], norm: Literal["softmax"] | None, site: Site | None
) -> Reduce:
    """Type `reduce(x, op, by=keys)`; key well-formedness is checked by `sparsegen.analysis.keys`."""
    if not isinstance(x, Score | Reduce):
        raise PatternError(f"reduce() takes a score or a reduction, not a {x.op}", at=site)
    if how not in ("sum", "max", "mean", "lse"):
        raise PatternError(f"reduce() knows sum, max, mean and lse, not {how!r}", at=site)
    if norm not in (None, "softmax"):
        raise PatternError(f"norm={norm!r}: reduce() knows norm='softmax' or None", at=site)
    if not by:
        raise PatternError("reduce() needs at least one key", at=site, hint="by=(i, j)")
    axes = tuple(Fixed(0) for _ in by)  # key spaces have no storage; see Select for their extents
    return Reduce(x=x, how=how, keys=by, norm=norm, axes=axes, site=site)
