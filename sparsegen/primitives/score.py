"""Score queries against keys: a virtual tensor over (head, query, key) that is never a buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sparsegen.analysis.cost import Cost, Costing, operations, rule
from sparsegen.errors import PatternError, Site
from sparsegen.ir.axes import Axis, Fixed, Named
from sparsegen.ir.expr import TRUE, Expr, Head, Pos, Symbol
from sparsegen.ir.node import Node
from sparsegen.primitives._evaluate import Array, Env
from sparsegen.primitives._space import softmax


@dataclass(frozen=True, kw_only=True)
class Score(Node):
    """s[h, i, j] = weights[i, h] * act(mod(scale * q[i, h] . k[j, h // group])); -inf where hidden.

    `norm` "softmax" normalises each row (h, i) over its visible keys. Scale None means that of the
    binding, or the query's last extent to the power -1/2. `mod` and `act` are over Symbol("s").
    """

    op: ClassVar[str] = "score"
    q: Node
    k: Node
    where: Expr = TRUE
    scale: float | None = None
    mod: Expr | None = None
    act: Expr | None = None
    weights: Node | None = None
    norm: Literal["softmax"] | None = None

    @property
    def head(self) -> Head:
        """Return the head variable of the space."""
        return Head(self.q.axes[1])

    @property
    def keys(self) -> tuple[Expr, ...]:
        """Return the coordinates of the space: head, query position, key position."""
        return (self.head, Pos("query", self.q.axes[0]), Pos("key", self.k.axes[0]))


def check_heads(what: str, q: Node, k: Node, site: Site | None) -> None:
    """Refuse operands of q . k whose ranks, head axes or last axes cannot agree."""
    for name, node in (("query", q), ("key", k)):
        if len(node.axes) != 3:
            raise PatternError(
                f"the {name} of {what} must be [sequence heads dim], "
                f"got [{' '.join(map(str, node.axes))}]",
                at=site,
                hint="declare three axes; a literal 1 stands for a single head",
            )
    qd, kd = q.axes[-1], k.axes[-1]
    if (
        qd != kd
        and (isinstance(qd, Named | Fixed) or isinstance(kd, Named | Fixed))
        and _clash(qd, kd)
    ):
        raise PatternError(
            f"{what} multiplies a query of last axis [{qd}] with a key of last axis [{kd}]",
            at=site,
            hint="give both the same letter",
        )
    qh, kh = q.axes[1], k.axes[1]
    if isinstance(qh, Fixed) and isinstance(kh, Fixed) and qh.size % kh.size:
        raise PatternError(
            f"{what}: {qh.size} query heads are no multiple of {kh.size} key heads",
            at=site,
            hint="every key head serves the same number of query heads",
        )


def _clash(a: Axis, b: Axis) -> bool:
    """Tell whether two last axes can never have equal extents (letters may still be equal)."""
    return type(a) is type(b) and a != b


def score(
    q: Node,
    k: Node,
    *,
    where: Expr,
    scale: float | None,
    mod: Expr | None,
    act: Expr | None,
    weights: Node | None,
    norm: Literal["softmax"] | None,
    site: Site | None,
) -> Score:
    """Type `score(q, k)`; weights must be [query heads]."""
    check_heads("score()", q, k, site)
    if weights is not None and weights.axes != q.axes[:2]:
        raise PatternError(
            f"the weights of score() must be [{q.axes[0]} {q.axes[1]}] (one per query and head), "
            f"got [{' '.join(map(str, weights.axes))}]",
            at=site,
            hint="declare them with the first two axes of the query",
        )
    if norm not in (None, "softmax"):
        raise PatternError(
            f"norm={norm!r}: score() knows norm='softmax' or None",
            at=site,
            hint="use mod= or act= for pointwise functions of the score",
        )
    return Score(
        q=q, k=k, where=where, scale=scale, mod=mod, act=act, weights=weights, norm=norm,
        axes=(q.axes[1], q.axes[0], k.axes[0]), site=site,
    )  # fmt: skip


def reference(
    node: Score, q: Array, k: Array, *, scale: float, weights: Array | None, env: Env
) -> Array:
    """Evaluate in float64: q [t heads dim], k [keys kv_heads dim], weights [t heads].

    `env` binds head, query and key positions to arrays that broadcast to [heads t keys], the
    shape of the result.
    """
    s, visible, seen, env = visible_scores(node.where, node.k, node.mod, q, k, scale, env)
    with np.errstate(all="ignore"):
        if node.act is not None:
            s = env.bind({Symbol("s"): s})(node.act)
        if weights is not None:
            s = weights.T[:, :, None] * s
    s = np.where(visible, s, -np.inf)
    out = np.full((q.shape[1], len(q), len(k)), -np.inf)
    out[:, :, seen] = softmax(s) if node.norm == "softmax" else s
    return out


def visible_scores(
    where: Expr, keys: Node, mod: Expr | None, q: Array, k: Array, scale: float, env: Env
) -> tuple[Array, Array, Array, Env]:
    """Score the keys that some query sees, so that the cost follows the predicate.

    Returns mod(scale * q . k) as [heads t seen], what is visible of it, the seen keys, and `env`
    with the key position bound to them.
    """
    position = Pos("key", keys.axes[0])
    visible = np.broadcast_to(env(where), (q.shape[1], len(q), len(k)))
    seen = np.flatnonzero(visible.any(axis=(0, 1)))
    env = env.bind({position: env.values[position][..., seen]})
    s = scaled_products(q, k[seen], scale)
    if mod is not None:
        s = env.bind({Symbol("s"): s})(mod)
    return s, visible[..., seen], seen, env


def scaled_products(q: Array, k: Array, scale: float) -> Array:
    """Return scale * q . k as [heads t keys]; each key head serves a group of query heads."""
    t, heads, dim = q.shape
    keys, kv_heads, _ = k.shape
    grouped = q.transpose(1, 0, 2).reshape(kv_heads, heads // kv_heads * t, dim) * scale
    with np.errstate(all="ignore"):
        s: Array = grouped @ k.transpose(1, 2, 0)
    return s.reshape(heads, t, keys)


@rule("score", stored=False)
def cost(node: Score, at: Costing) -> Cost:
    """Count q . k for every visible pair, and each seen key once; scores are not stored."""
    heads = at.size(node.q.axes[1])
    seen = at.keys(node.where, node.q, node.k)
    products = 2 * heads * at.size(node.q.axes[-1])
    each = operations(node.mod) + operations(node.act)
    each += (node.weights is not None) + 2 * (node.norm is not None)
    return Cost(
        products=products * seen.total,
        pointwise=heads * seen.total * each,
        read=at.read(node.q, node.weights)
        + at.read(node.k, rows=seen.distinct)
        + at.tables(node.where, node.mod, node.act),
        step=products * seen.last,
        scored=seen.last,
        assumed=seen.assumed,
    )
