"""Reduce scores by keys: head sums, block maxima, column mass, slashes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sparsegen.analysis.cost import Cost, Costing, rule
from sparsegen.errors import PatternError, Site, did_you_mean
from sparsegen.ir.axes import Fixed
from sparsegen.ir.expr import BlockOf, Expr, Pos
from sparsegen.ir.expr import walk as walk_expr
from sparsegen.ir.node import Node
from sparsegen.primitives._evaluate import Array, Env
from sparsegen.primitives._space import Space, keyed, softmax
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
    """Type `reduce(x, op, by=keys)`; `sparsegen.analysis.keys` checks the keys themselves."""
    if not isinstance(x, Score | Reduce):
        raise PatternError(
            f"reduce() takes scores or their reduction, not {x.title}",
            at=site,
            hint="reduce what sg.score() or sg.reduce() returned",
        )
    if how not in ("sum", "max", "mean", "lse"):
        raise PatternError(
            f"reduce() does not know how={how!r}",
            at=site,
            hint=did_you_mean(str(how), ("sum", "max", "mean", "lse")),
        )
    if norm not in (None, "softmax"):
        raise PatternError(
            f"norm={norm!r}: reduce() knows norm='softmax' or None",
            at=site,
            hint="norm='softmax' normalises over the last key",
        )
    if not by:
        raise PatternError("reduce() needs at least one key", at=site, hint="by=(i, j)")
    axes = tuple(Fixed(0) for _ in by)  # key spaces have no storage; see Select for their extents
    return Reduce(x=x, how=how, keys=by, norm=norm, axes=axes, site=site)


def coordinates(
    node: Reduce, keys: tuple[Expr, ...], coords: tuple[Array, ...], env: Env
) -> tuple[Array, ...]:
    """Return the integers that each key of `node` takes over the space (`keys`, `coords`).

    A key counts from 0, keys before the last that follow the query from their smallest value.
    """
    found = []
    for n, key in enumerate(node.keys):
        if isinstance(key, BlockOf) and key not in keys:
            found.append(np.arange(-(-env.sizes[key.axis.parent.name] // key.width)))
            continue
        values = keyed(keys, coords, env)(key)
        if values.size == 0:
            found.append(np.arange(0))
            continue
        moves = n < len(node.keys) - 1 and any(
            isinstance(e, Pos) and e.role == "query" for e in walk_expr(key)
        )
        found.append(np.arange(int(values.min()) if moves else 0, int(values.max()) + 1))
    return tuple(found)


@dataclass(frozen=True)
class Partial:
    """A reduction in progress: accumulated values, and how many visible elements went into each.

    NaN counts as -inf in "max", as it does in select(); the other operators carry it on.
    """

    value: Array
    count: Array

    @classmethod
    def empty(cls, node: Reduce, coords: tuple[Array, ...]) -> Partial:
        """Return the reduction of nothing."""
        shape = tuple(map(len, coords))
        return cls(np.full(shape, _IDENTITY[node.how]), np.zeros(shape))

    def add(self, node: Reduce, space: Space, coords: tuple[Array, ...], env: Env) -> Partial:
        """Return this reduction with the elements of `space` taken in."""
        if np.isneginf(space.values).all():
            return self
        space, weights, blocks = _split_blocks(node, space, env)
        visible = ~np.isneginf(space.values)
        value = np.where(visible, space.values, _IDENTITY[node.how])
        env = space.env(env).bind(blocks)
        places = [
            np.reshape(env(key), (1,) * value.ndim) if env(key).ndim == 0 else env(key)
            for key in node.keys
        ]
        index = [p - (c[0] if len(c) else 0) for p, c in zip(places, coords, strict=True)]
        shape = self.value.shape
        ufunc = _UFUNC[node.how]
        with np.errstate(all="ignore"):
            weighted = value * weights if node.how == "sum" else value
            value = _scatter(weighted, index, shape, ufunc, _IDENTITY[node.how])
            count = _scatter(visible.astype(float), index, shape, np.add, 0.0)
            return Partial(ufunc(self.value, value), self.count + count)

    def finish(self, node: Reduce, coords: tuple[Array, ...]) -> Space:
        """Return the reduced scores; groups without a visible element are -inf."""
        seen = self.count > 0
        value = self.value / np.where(seen, self.count, 1.0) if node.how == "mean" else self.value
        value = np.where(seen, value, -np.inf)
        return Space(node.keys, coords, softmax(value) if node.norm == "softmax" else value)


_UFUNC: dict[ReduceOp, np.ufunc] = {
    "sum": np.add,
    "mean": np.add,
    "max": np.fmax,
    "lse": np.logaddexp,
}
_IDENTITY: dict[ReduceOp, float] = {"sum": 0.0, "mean": 0.0, "max": -np.inf, "lse": -np.inf}


def _split_blocks(node: Reduce, space: Space, env: Env) -> tuple[Space, Array, dict[Expr, Array]]:
    """Repeat entries for each block they overlap; return weights and the blocks of the copies."""
    weights = np.ones((1,) * space.values.ndim)
    blocks: dict[Expr, Array] = {}
    for key in node.keys:
        if not isinstance(key, BlockOf) or key in space.keys:
            continue
        axis = next(
            n for n, k in enumerate(space.keys) if isinstance(k, Pos) and k.axis == key.axis
        )
        entries, block, overlap = _overlaps(key, space.coords[axis], env)
        shape = [-1 if n == axis else 1 for n in range(space.values.ndim)]
        coords = list(space.coords)
        coords[axis] = coords[axis][entries]
        space = Space(space.keys, tuple(coords), space.values.take(entries, axis))
        weights = weights * (overlap / key.axis.stride).reshape(shape)
        blocks[key] = block.reshape(shape)
    return space, weights, blocks


def _overlaps(key: BlockOf, entries: Array, env: Env) -> tuple[Array, Array, Array]:
    """Return every pair of an entry (as an index into `entries`) and a block, and their overlap."""
    length = env.sizes[key.axis.parent.name]
    start = entries * key.axis.stride
    stop = np.minimum(start + key.axis.width, length)
    block = np.arange(-(-length // key.width))
    low = np.maximum(start[:, None], block * key.width)
    high = np.minimum(stop[:, None], (block + 1) * key.width)
    pairs = np.nonzero(low < high)
    return pairs[0], pairs[1], (high - low)[pairs]


def _scatter(
    x: Array, index: list[Array], shape: tuple[int, ...], ufunc: np.ufunc, identity: float
) -> Array:
    """Reduce the elements of `x` into an array of `shape`; `index` broadcasts to the axes of `x`.

    Elements whose index lies outside `shape` are dropped.
    """
    out = np.full(shape, identity)
    moving = [[a for a in range(x.ndim) if i.shape[a] > 1] for i in index]
    owned = [axes[0] for axes in moving if axes]
    if any(len(axes) > 1 for axes in moving) or len(set(owned)) < len(owned):
        inside = x != identity
        place = np.zeros(x.shape, dtype=np.int64)
        for i, size in zip(index, shape, strict=True):
            inside &= (i >= 0) & (i < size)
            place = place * size + i
        ufunc.at(out.reshape(-1), place[inside], x[inside])
        return out
    # Every key follows one axis of its own (or none), so the axes are reduced one at a time.
    for axis in set(range(x.ndim)) - set(owned):
        x = ufunc.reduce(x, axis=axis, keepdims=True)
    target: list[slice | int] = []
    for i, size, axes in zip(index, shape, moving, strict=True):
        if axes:
            x = _segments(x, axes[0], i.reshape(-1), size, ufunc, identity)
            target.append(slice(None))
        elif not 0 <= i.item() < size:
            return out
        else:
            target.append(int(i.item()))
    idle = tuple(set(range(x.ndim)) - set(owned))
    out[tuple(target)] = x.transpose(*owned, *idle).reshape([x.shape[a] for a in owned])
    return out


def _segments(
    x: Array, axis: int, segment: Array, size: int, ufunc: np.ufunc, identity: float
) -> Array:
    """Reduce elements of equal `segment` along one axis, which gets the length `size`."""
    if len(segment) == size and np.array_equal(segment, np.arange(size)):
        return x
    kept = np.flatnonzero((segment >= 0) & (segment < size))
    order = kept[np.argsort(segment[kept], kind="stable")]
    groups, first = np.unique(segment[order], return_index=True)
    x = np.moveaxis(x, axis, -1)
    out = np.full((*x.shape[:-1], size), identity)
    if len(order):
        out[..., groups] = ufunc.reduceat(x[..., order], first, axis=-1)
    return np.moveaxis(out, -1, axis)


@rule("reduce", stored=False)
def cost(node: Reduce, at: Costing) -> Cost:
    """Count one operation for each visible score; a reduction of a reduction is small beside it."""
    if isinstance(node.x, Reduce):
        return Cost()
    seen = at.keys(node.x.where, node.x.q, node.x.k)
    return Cost(pointwise=at.size(node.x.q.axes[1]) * seen.total)
