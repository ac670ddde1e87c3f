"""Select a set of keys: exact top-k, top-p or threshold, with forced keys inside the budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsegen.analysis.cost import Cost, Costing, list_bytes, rule
from sparsegen.errors import PatternError, Site
from sparsegen.ir.expr import Expr, Pos
from sparsegen.ir.expr import walk as walk_expr
from sparsegen.ir.node import Node
from sparsegen.primitives._evaluate import Array, Env
from sparsegen.primitives._space import Space
from sparsegen.primitives.reduce import Reduce
from sparsegen.primitives.score import Score


@dataclass(frozen=True, kw_only=True)
class Select(Node):
    """The best keys of the last coordinate, for each value of the coordinates before it.

    Order: score descending, then index ascending; NaN counts as -inf; forced keys come before all
    others, by index whatever their scores, and count inside the budget; keys whose score is -inf
    are never chosen unless forced. Indices are int32, ascending, padded with -1 on the right.

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
        """Return the word printed for it."""
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
        raise PatternError(
            f"select() takes scores or their reduction, not {x.title}",
            at=site,
            hint="select from what sg.score() or sg.reduce() returned",
        )
    if topk is None and top_p is None and threshold is None:
        raise PatternError(
            "select() needs a budget", at=site, hint="give topk=, top_p= or threshold="
        )
    if top_p is not None and threshold is not None:
        raise PatternError(
            "select() takes top_p= or threshold=, not both",
            at=site,
            hint="keep one; topk= may cap it",
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise PatternError(
            f"top_p={top_p}: a share of the mass lies in (0, 1]",
            at=site,
            hint="use topk= for a number of keys",
        )
    return Select(
        x=x, topk=topk, top_p=top_p, threshold=threshold, force=force, axes=x.axes, site=site
    )


@dataclass(frozen=True)
class Selection:
    """The lists of one sequence.

    indices   int32 [rows, *groups, width]: ascending keys, padded with -1 on the right; the row
              axis is the key that follows the query, and is absent without one
    first     the value that index 0 stands for, of each axis of `indices` but the last
    order     for each axis of `indices` but the last, the position of its key
    capacity  how many keys there are to choose from
    """

    indices: Array
    first: tuple[int, ...]
    order: tuple[int, ...]
    capacity: int

    def contains(self, keys: tuple[Array, ...]) -> Array:
        """Tell for arrays of keys that broadcast against each other which are selected."""
        rank = max(k.ndim for k in keys)
        keys = tuple(k.reshape((1,) * (rank - k.ndim) + k.shape) for k in keys)
        groups = np.broadcast_shapes((1,) * rank, *(k.shape for k in keys[:-1]))
        index, known = [], np.ones(groups, dtype=bool)
        for axis, n in enumerate(self.order):
            at = keys[n] - self.first[axis]
            known = known & (at >= 0) & (at < self.indices.shape[axis])
            index.append(np.clip(at, 0, max(self.indices.shape[axis] - 1, 0)))
        if 0 in self.indices.shape:
            return np.zeros(np.broadcast_shapes(groups, keys[-1].shape), dtype=bool)
        lists = np.broadcast_to(self.indices[tuple(index)], (*groups, self.indices.shape[-1]))
        lists = np.where(known[..., None], lists, -1)
        if rank and groups[-1] > 1:  # one list for each key: look through it
            listed: Array = ((lists == keys[-1][..., None]) & (lists >= 0)).any(axis=-1)
            return listed
        # One row of truth values for each list, with a last one that is never true.
        chosen = np.zeros((*groups, self.capacity + 1), dtype=bool)
        inside = (lists >= 0) & (lists < self.capacity)
        np.put_along_axis(chosen, np.where(inside, lists, self.capacity), True, axis=-1)
        chosen[..., self.capacity] = False
        last = keys[-1]
        last = np.where((last >= 0) & (last < self.capacity), last, self.capacity)
        mesh = np.ix_(*(range(n) for n in groups)) if rank else ()
        found: Array = chosen[(*mesh, last)]
        return found


def reference(
    node: Select, spaces: Iterable[Space], coords: tuple[Array, ...], env: Env
) -> Selection:
    """Select from scores in float64.

    The spaces follow each other along the key of the query, if there is one; together they cover
    `coords`.
    """
    rows = next((n for n, key in enumerate(node.keys[:-1]) if follows_query(key)), None)
    order = tuple(range(len(node.keys) - 1))
    if rows is not None:
        order = (rows, *(n for n in order if n != rows))
    lists = [_choose(node, space, env).transpose(*order, -1) for space in spaces]
    return Selection(
        indices=np.concatenate(lists) if rows is not None else lists[0],
        first=tuple(int(coords[n][0]) if len(coords[n]) else 0 for n in order),
        order=order,
        capacity=len(coords[-1]),
    )


def follows_query(key: Expr) -> bool:
    """Tell whether a key changes with the position of the query."""
    return any(isinstance(e, Pos) and e.role == "query" for e in walk_expr(key))


def _choose(node: Select, space: Space, env: Env) -> Array:
    """Return lists [*keys before the last, width]: the budget or, if it varies, the capacity."""
    env = space.env(env)
    score = np.where(np.isnan(space.values), -np.inf, space.values)
    forced = np.zeros(score.shape, dtype=bool)
    if node.force is not None:
        forced = np.broadcast_to(env(node.force), score.shape)
    # Stable sorts: score descending, then index ascending; then forced keys before the others.
    ranked = np.argsort(np.where(forced, -np.inf, -score), axis=-1, kind="stable")
    first = np.argsort(~np.take_along_axis(forced, ranked, -1), axis=-1, kind="stable")
    ranked = np.take_along_axis(ranked, first, -1)
    score, forced = (np.take_along_axis(x, ranked, -1) for x in (score, forced))
    kept = score > -np.inf
    if node.threshold is not None:
        kept &= score >= node.threshold
    if node.top_p is not None:
        mass = np.cumsum(np.where(kept, score, 0.0), axis=-1)
        before = np.concatenate([np.zeros_like(mass[..., :1]), mass[..., :-1]], axis=-1)
        kept &= before < node.top_p * mass[..., -1:]
    kept |= forced
    capacity = score.shape[-1]
    width = capacity
    if node.topk is not None:
        budget = env(node.topk)
        kept &= np.cumsum(kept, axis=-1) <= budget
        width = max(0, int(budget)) if budget.ndim == 0 else capacity
    chosen = np.zeros_like(kept)
    np.put_along_axis(chosen, ranked, kept, axis=-1)
    lists = np.full((*score.shape[:-1], width), -1, dtype=np.int32)
    where = np.nonzero(chosen)
    lists[(*where[:-1], np.cumsum(chosen, axis=-1)[where] - 1)] = where[-1]
    return lists


@rule("select", stored=True)
def cost(node: Select, at: Costing) -> Cost:
    """Count the lists; choosing compares and computes nothing."""
    return Cost(read=at.tables(node.topk, node.force), written=list_bytes(node, at))
