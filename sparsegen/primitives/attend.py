"""Attend over an iteration domain: online softmax of one or several key sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsegen.analysis.cost import INDEX_BYTES, Cost, Costing, operations, rule
from sparsegen.analysis.sums import Sympy
from sparsegen.errors import PatternError, Site
from sparsegen.ir.expr import TRUE, Expr
from sparsegen.ir.node import Node
from sparsegen.primitives._evaluate import Array, Env
from sparsegen.primitives.score import check_heads, visible_scores


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
        raise PatternError(
            "attend() needs at least one source of keys", at=site, hint="sg.attend(q, k, v)"
        )
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
                f"attend() mixes values of last axis [{dim}] and [{source.v.axes[-1]}]",
                at=site,
                hint="all sources of one softmax have values of one width",
            )
    if sink is not None and sink.axes != (q.axes[1],):
        raise PatternError(
            f"the sink of attend() must be [{q.axes[1]}] (one per query head), "
            f"got [{' '.join(map(str, sink.axes))}]",
            at=site,
            hint=f'declare it as sink: sg.Tensor["{q.axes[1]}"]',
        )
    axes = (q.axes[0], q.axes[1], dim)
    return Attend(q=q, sources=sources, scale=scale, mod=mod, sink=sink, axes=axes, site=site)


def reference(
    node: Attend,
    q: Array,
    sources: Sequence[tuple[Array, Array, Env]],
    *,
    scale: float,
    sink: Array | None,
) -> tuple[Array, Array]:
    """Evaluate in float64: q [t heads dim], sources (k, v, env), sink [heads].

    The env of a source binds head, query and key positions to arrays that broadcast to
    [heads t keys]. Returns o [t heads dim_v] and lse [t heads], natural log without the sink.
    """
    scores, values = [], []
    for source, (k, v, env) in zip(node.sources, sources, strict=True):
        s, visible, seen, _ = visible_scores(source.where, source.k, node.mod, q, k, scale, env)
        scores.append(np.where(visible, s, -np.inf))
        values.append(v[seen])
    with np.errstate(all="ignore"):
        top = np.max([s.max(axis=-1, initial=-np.inf) for s in scores], axis=0)
        shift = np.where(np.isneginf(top), 0.0, top)
        weights = [np.exp(s - shift[:, :, None]) for s in scores]
        total = sum(w.sum(axis=-1) for w in weights)
        lse = np.where(total == 0.0, -np.inf, shift + np.log(total))
        o = sum(_mix(w, v) for w, v in zip(weights, values, strict=True))
        o = o / np.where(total == 0.0, 1.0, total)[:, :, None]
        if sink is not None:
            kept = 1.0 / (1.0 + np.exp(sink[:, None] - lse))
            o = o * np.where(np.isneginf(lse), 0.0, kept)[:, :, None]
    return o.transpose(1, 0, 2), lse.T


def _mix(weights: Array, v: Array) -> Array:
    """Return weights [heads t keys] times v [keys kv_heads dim]; a key of weight 0 is not read."""
    heads, t, keys = weights.shape
    kv_heads, dim = v.shape[1:]
    odd = np.flatnonzero(~np.isfinite(v).all(axis=(1, 2)))
    calm = v
    if len(odd):
        calm = v.copy()
        calm[odd] = 0.0
    grouped = weights.reshape(kv_heads, heads // kv_heads * t, keys)
    o: Array = (grouped @ calm.transpose(1, 0, 2)).reshape(heads, t, dim)
    for j in odd:
        w = weights[:, :, j, None]
        row = np.repeat(v[j], heads // kv_heads, axis=0)[:, None, :]
        o += np.where(w != 0.0, w * row, 0.0)
    return o


@rule("attend", stored=True)
def cost(node: Attend, at: Costing) -> Cost:
    """Count q . k and p . v for every visible pair, and each seen key and value once."""
    heads, dim = at.size(node.q.axes[1]), at.size(node.q.axes[-1])
    wide = 2 * heads * (dim + at.size(node.axes[-1]))
    found = Cost(
        read=at.read(node.q) + (0 if node.sink is None else at.read(node.sink)),
        written=at.written(node) + _lse_bytes(node, at),
    )
    for source in node.sources:
        seen = at.keys(source.where, node.q, source.k)
        found += Cost(
            products=wide * seen.total,
            pointwise=heads * seen.total * (1 + operations(node.mod)),
            read=at.read(source.k, source.v, rows=seen.distinct) + at.tables(source.where),
            step=wide * seen.last,
            attended=seen.last,
            at_most=seen.step,
            assumed=seen.assumed,
        )
    return found + Cost(read=at.tables(node.mod))


def _lse_bytes(node: Attend, at: Costing) -> Sympy:
    merged = any(
        n.op == "merge" and getattr(n, "gates", None) is None and node in n.operands()
        for n in at.program.nodes
    )
    if not merged and (node, "lse") not in at.returned:
        return 0
    return at.size(node.axes[0]) * at.size(node.axes[1]) * INDEX_BYTES
