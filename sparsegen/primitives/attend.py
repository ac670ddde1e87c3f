"""Attend over an iteration domain: online softmax of one or several key sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsegen.errors import PatternError, Site
from sparsegen.ir.expr import TRUE, Expr
from sparsegen.ir.node import Node
from sparsegen.primitives.score import check_heads


@dataclass(frozen=True, kw_only=True)
class Source:
    """Keys, values and the predicate of the pairs (h, i, j) that see each other."""

    k: Node
    v: Node
    where: Expr = TRUE


@dataclass(frozen=True, kw_only=True)
class Attend(Node):
    """o[i, h] = sum_j softmax_j(mod(scale * q[i, h] . k[j, h // group])) v[j, h // group].

    One softmax runs over all sources. `sink` [heads] adds exp(sink[h]) to the denominator only.
    lse is the natural log of the sum without the sink. A row that sees nothing has o = 0 and
    lse = -inf. `scale` None means the binding's, or the query's last extent to the power -1/2.
    """

    op: ClassVar[str] = "attend"
    PARTS: ClassVar[tuple[type, ...]] = (Source,)
    q: Node
    sources: tuple[Source, ...]
    scale: float | None = None
    mod: Expr | None = None
    sink: Node | None = None


def attend(
    q: Node,
    sources: tuple[Source, ...],
    *,
    scale: float | None,
    mod: Expr | None,
    sink: Node | None,
    site: Site | None,
) -> Attend:
    """Type `attend(q, k, v, where=)`."""
    if not sources:
        raise PatternError("attend() needs at least one source of keys", at=site)
    dim = sources[0].v.axes[-1]
    for source in sources:
        check_heads("attend()", q, source.k, site)
        if len(source.v.axes) != 3 or source.v.axes[:2] != source.k.axes[:2]:
            raise PatternError(
                f"attend() has keys [{' '.join(map(str, source.k.axes))}] "
                f"but values [{' '.join(map(str, source.v.axes))}]",
                at=site,
                hint="keys and values share their first two axes",
            )
        if source.v.axes[-1] != dim:
            raise PatternError(
                f"attend() mixes values of last axis [{dim}] and [{source.v.axes[-1]}]", at=site
            )
    if sink is not None and sink.axes != (q.axes[1],):
        raise PatternError(
            f"the sink of attend() must be [{q.axes[1]}] (one per query head), "
            f"got [{' '.join(map(str, sink.axes))}]",
            at=site,
        )
    axes = (q.axes[0], q.axes[1], dim)
    return Attend(q=q, sources=sources, scale=scale, mod=mod, sink=sink, axes=axes, site=site)
