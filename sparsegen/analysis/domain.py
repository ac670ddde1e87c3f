"""Turn a predicate over (h, i, j) into closed-form key ranges, selection lists and a residual.

window | sink  ->  [max(0, i_min - W + 1), i_max + 1)  and, left of it,  [0, S)
(j <= i) & sel[i, j // 64]  ->  the list of i in blocks of 64, cut to [0, i_max + 1)

The ranges are expressions of a query tile, so their cost does not depend on sequence lengths, and
no mask is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsegen.analysis.affine import Affine, Floor, affine
from sparsegen.analysis.dnf import (
    Conjunction,
    Literal,
    alternatives,
    conjunction,
    contradictory,
    disjunction,
)
from sparsegen.analysis.interval import (
    Interval,
    Quantifier,
    Space,
    below,
    empty,
    evaluate,
    fold,
    solve,
    tidy,
    whole,
)
from sparsegen.ir.axes import Axis
from sparsegen.ir.expr import TRUE, BlockOf, Const, Expr, Member, Symbol, apply, rebuild

# Cutting later ranges by earlier ones splits them; beyond this many pieces one range covers all.
PIECES = 4


@dataclass(frozen=True, kw_only=True)
class KeyList:
    """A selection drives the iteration: item x of its list stands for keys
    [x * granule - shift, (x + 1) * granule - shift), or, for a "slash", for the key i - x.

    `member.keys[:-1]` say which list a (head, query) pair reads.
    """

    member: Member
    granule: int
    shift: int = 0
    slash: bool = False


@dataclass(frozen=True, kw_only=True)
class Clause:
    """One stretch of the iteration. Every visible (h, i, j) is produced by exactly one clause.

    hull      keys that the clause produces for some query of the tile (exact or larger)
    full      keys that the clause produces for every query of the tile (None: none known);
              `residual` need not be evaluated there
    keys      the list that drives the iteration, intersected with `hull`; None: iterate `hull`
    residual  everything to check per (h, i, j) outside `full`, with selections other than the
              driving one as Member, to be looked up
    """

    hull: Interval
    full: Interval | None
    keys: KeyList | None
    residual: Expr = TRUE

    @property
    def exact(self) -> bool:
        """Tell whether a single query sees every key of the hull."""
        return self.full is not None and _alone(self.full) == _alone(self.hull)


def _alone(interval: Interval) -> Interval:
    """Return an interval as a single query has it: the last of its tile is the first."""

    def rule(e: Expr) -> Expr | None:
        return Symbol("i_min") if e == Symbol("i_max") else None

    lo, hi = (tuple(rebuild(e, rule) for e in end) for end in (interval.lo, interval.hi))
    return Interval(lo=lo, hi=hi)


def clauses(where: Expr, *, query: Axis, key: Axis) -> tuple[Clause, ...]:
    """Partition the visible pairs of a bound predicate into ranges and lists.

    Ranges come first: their hulls are disjoint, and all of them check one residual, whatever does
    not ask for a selection. Lists follow and leave out what the clauses before them produce. A
    predicate that is never true has no clause.

    Args:
        where: without open sizes.
        query: axis of i; tiles run along it.
        key: axis of j, or of the entries.
    """
    space = Space(query, key)
    found = alternatives(where, space)
    if found is None:
        return (Clause(hull=whole(key), full=None, keys=None, residual=where),)
    drivers = [_driver(c, space) for c in found]
    listed = [(c, d) for c, d in zip(found, drivers, strict=True) if d is not None]
    bounded = [(c, *_bounds(c, space)) for c, d in zip(found, drivers, strict=True) if d is None]
    static = [c for c, hull, _ in bounded if hull is not None]
    residual = where if len(static) == len(found) else disjunction(static)
    ranges = _ranges([(h, f) for _, h, f in bounded if h is not None], residual)
    lists: list[Clause] = []
    before: list[Conjunction] = []
    for conj, (literal, keys) in listed:
        clause = _list(conj, literal, keys, static, ranges, before, space)
        before.append(conj)
        if clause is not None:
            lists.append(clause)
    return (*ranges, *lists)


# --- ranges -------------------------------------------------------------------------------------


def _ranges(bounded: list[tuple[Interval, Interval | None]], residual: Expr) -> list[Clause]:
    """Return clauses with disjoint hulls that cover every (hull, full) pair."""
    ranges: list[Clause] = []
    for hull, full in bounded:
        pieces = [Interval(lo=(), hi=())]
        for earlier in ranges:
            pieces = [p for piece in pieces for p in _without(piece, earlier.hull, hull)]
        for piece in pieces:
            sure = None if full is None or empty(full & piece) else tidy(full & piece)
            ranges.append(Clause(hull=tidy(hull & piece), full=sure, keys=None, residual=residual))
        if len(ranges) > PIECES:
            return [_joint(bounded, residual)]
    return ranges


def _joint(hulls: list[tuple[Interval, Interval | None]], residual: Expr) -> Clause:
    """Return one range from the least to the greatest key of several."""
    lo = fold("min", tuple(fold("max", hull.lo) for hull, _ in hulls))
    hi = fold("max", tuple(fold("min", hull.hi) for hull, _ in hulls))
    full = next((full for _, full in hulls if full is not None), None)
    return Clause(hull=Interval(lo=(lo,), hi=(hi,)), full=full, keys=None, residual=residual)


def _without(piece: Interval, taken: Interval, hull: Interval) -> list[Interval]:
    """Return what is left of `piece`, inside `hull`, beside a range already taken."""
    start = fold("max", taken.lo)
    end = apply("max", start, fold("min", taken.hi))
    if below(start, fold("min", taken.hi)):
        end = fold("min", taken.hi)
    left = Interval(lo=piece.lo, hi=(*piece.hi, start))
    right = Interval(lo=(*piece.lo, end), hi=piece.hi)
    inside = [
        # left ends where `taken` starts: nothing is there if the hull starts no earlier.
        (left, all(any(below(t, low) for low in hull.lo) for t in taken.lo)),
        (right, all(any(below(h, t) for h in hull.hi) for t in taken.hi)),
    ]
    return [p for p, covered in inside if not covered and not empty(hull & p)]


def _bounds(conj: Conjunction, space: Space) -> tuple[Interval | None, Interval | None]:
    """Return the keys some query may see (None: none) and those all see (None: unknown)."""
    hull = _meet(conj, space, "some")
    if hull is None or empty(hull):
        return None, None
    sure = all(x.bounds is not None for x in conj)
    full = _meet(conj, space, "all") if sure else None
    return tidy(hull), None if full is None or empty(full) else tidy(full)


def _meet(conj: Sequence[Literal], space: Space, over: Quantifier) -> Interval | None:
    total = whole(space.key)
    for literal in conj:
        for bound in literal.bounds or ():
            part = solve(bound, space, over)
            if part is None:
                return None
            total = total & part
    return total


# --- lists --------------------------------------------------------------------------------------


def _list(
    conj: Conjunction,
    driver: Literal,
    keys: KeyList,
    static: list[Conjunction],
    ranges: list[Clause],
    before: list[Conjunction],
    space: Space,
) -> Clause | None:
    """Return the clause of an alternative that a selection drives, without what came before."""
    checks = tuple(x for x in conj if x is not driver)
    hull, full = _bounds(checks, space)
    if hull is None:
        return None
    residual = conjunction(checks)
    excluded = [rest for c in static if (rest := _beyond(c, conj)) is not None]
    if excluded:
        residual = apply("and", residual, apply("not", disjunction(excluded)))
        for taken in ranges:
            full = None if full is None else _beside(full, hull, taken.hull)
    for other in before:
        rest = _beyond(other, conj)
        if rest is not None:
            residual = apply("and", residual, apply("not", conjunction(rest)))
            full = None
    if full is not None:
        full = None if empty(full) else tidy(full)
    return Clause(hull=hull, full=full, keys=keys, residual=residual)


def _beyond(other: Conjunction, conj: Conjunction) -> Conjunction | None:
    """Return what `other` asks beyond `conj`; None if both never hold together."""
    if contradictory((*other, *conj)):
        return None
    return tuple(x for x in other if x not in conj)


def _beside(full: Interval, hull: Interval, taken: Interval) -> Interval:
    """Return the larger evident part of `full` outside a range: left of it, or right of it."""
    starts_first = all(any(below(t, low) for low in hull.lo) for t in taken.lo)
    if starts_first:
        end = apply("max", fold("max", taken.lo), fold("min", taken.hi))
        return full & Interval(lo=(end,), hi=full.hi)
    return full & Interval(lo=full.lo, hi=(fold("max", taken.lo),))


def _driver(conj: Conjunction, space: Space) -> tuple[Literal, KeyList] | None:
    """Return the membership with the shortest list among the literals, and how to iterate it."""
    found: list[tuple[float, int, Literal, KeyList]] = []
    for n, literal in enumerate(conj):
        member = literal.member
        keys = None if member is None else _keylist(member, space)
        if member is not None and keys is not None:
            selection: Any = member.selection
            budget = selection.topk
            count = budget.value if isinstance(budget, Const) else float("inf")
            found.append((count * keys.granule, n, literal, keys))
    if not found:
        return None
    _, _, literal, keys = min(found, key=lambda item: item[:2])
    return literal, keys


def _keylist(member: Member, space: Space) -> KeyList | None:
    last = member.keys[-1]
    if isinstance(last, BlockOf):
        axis = last.axis
        if axis != space.key or axis.overlaps or last.width % axis.stride:
            return None
        return KeyList(member=member, granule=last.width // axis.stride)
    total = affine(last)
    if total is None:
        return None
    match total.terms:
        case ((Floor(Affine(((space.j, 1),), shift), int() as granule), 1),):
            return KeyList(member=member, granule=granule, shift=shift + total.const * granule)
        case ((space.j, 1),):
            return KeyList(member=member, granule=1, shift=total.const)
        case ((space.j, -1), (space.i, 1)) if not total.const:
            return KeyList(member=member, granule=1, slash=True)
    return None


__all__ = ["Clause", "Interval", "KeyList", "clauses", "evaluate"]
