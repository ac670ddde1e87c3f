"""Write predicates as alternatives of literals, each with the affine inequalities it stands for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, product

from sparsegen.analysis.affine import Affine, affine, leaf, to_expr
from sparsegen.analysis.interval import Space
from sparsegen.ir.expr import COMPARE, FALSE, TRUE, Apply, Const, Expr, Member, apply, kind

# More alternatives than any mask of the literature has; beyond, the whole key range is visited.
LIMIT = 24
_NEGATED = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}


@dataclass(frozen=True)
class Literal:
    """A condition: `expr` holds exactly where every bound is <= 0. Bounds None: nothing known."""

    expr: Expr
    bounds: tuple[Affine, ...] | None

    @property
    def member(self) -> Member | None:
        """Return the membership this literal asks for, if it is one."""
        return self.expr if isinstance(self.expr, Member) else None


Conjunction = tuple[Literal, ...]


class _TooManyError(Exception):
    """The alternatives outgrew `LIMIT`."""


def alternatives(where: Expr, space: Space) -> tuple[Conjunction, ...] | None:
    """Return the disjunctive normal form without impossible or implied alternatives.

    None if it has more than `LIMIT` alternatives.
    """
    try:
        found = _normal(where, False, space)
    except _TooManyError:
        return None
    possible = [c for c in dict.fromkeys(found) if not contradictory(c)]
    return tuple(
        c
        for n, c in enumerate(possible)
        if not any(set(d) < set(c) or (set(d) == set(c) and m < n) for m, d in enumerate(possible))
    )


def _normal(expr: Expr, negated: bool, space: Space) -> list[Conjunction]:
    match expr:
        case Const(value):
            return [()] if bool(value) != negated else []
        case Apply("not", (x,)):
            return _normal(x, not negated, space)
        case Apply("and" | "or" as op, (a, b)):
            left, right = _normal(a, negated, space), _normal(b, negated, space)
            return left + right if (op == "or") != negated else _both(left, right)
        case Apply("where", (c, a, b)):
            chosen = _both(_normal(c, False, space), _normal(a, negated, space))
            return chosen + _both(_normal(c, True, space), _normal(b, negated, space))
        case Apply(op, (a, b)) if op in COMPARE:
            op = _NEGATED[op] if negated else op
            return _comparison(op, a, b, space)
    return [(Literal(apply("not", expr) if negated else expr, None),)]


def _both(left: list[Conjunction], right: list[Conjunction]) -> list[Conjunction]:
    if len(left) * len(right) > LIMIT:
        raise _TooManyError
    return [tuple(dict.fromkeys(a + b)) for a, b in product(left, right)]


def _comparison(op: str, a: Expr, b: Expr, space: Space) -> list[Conjunction]:
    whole = Apply(op, (a, b))
    if kind(a) != "int" or kind(b) != "int":
        return [(Literal(whole, None),)]
    x, y = affine(a, opaque=True), affine(b, opaque=True)
    assert x is not None
    assert y is not None
    if op == "ne":
        if not space.knows(x - y):
            return [(Literal(whole, None),)]
        return _comparison("lt", a, b, space) + _comparison("gt", a, b, space)
    wanted = {
        "le": (x - y,), "lt": (x - y + 1,), "ge": (y - x,), "gt": (y - x + 1,), "eq": (x - y, y - x)
    }[op]  # fmt: skip
    cases: list[tuple[Affine, ...]] = [()]
    for bound in wanted:
        cases = [c + d for c in cases for d in _split(bound)]
    if not all(space.knows(bound) for case in cases for bound in case):
        return [(Literal(whole, None),)]
    if len(cases) == 1:
        literal = Literal(whole, cases[0])
        return _decided(literal)
    return [
        conj
        for case in cases
        for conj in [tuple(Literal(_inequality(b), (b,)) for b in case if not b.is_const)]
        if not any(b.is_const and b.const > 0 for b in case)
    ]


def _decided(literal: Literal) -> list[Conjunction]:
    """Drop a literal of constants only."""
    assert literal.bounds is not None
    if any(b.is_const and b.const > 0 for b in literal.bounds):
        return []
    return [()] if all(b.is_const for b in literal.bounds) else [(literal,)]


def _split(bound: Affine) -> list[tuple[Affine, ...]]:
    """Write bound <= 0 without abs, min and max: alternatives of inequalities."""
    for term, factor in bound.terms:
        if not isinstance(term, Apply) or term.op not in ("abs", "min", "max"):
            continue
        values = [v for a in term.args if (v := affine(a, opaque=True)) is not None]
        assert len(values) == len(term.args)
        if term.op == "abs":
            values.append(-values[0])
        rest = bound - leaf(term) * factor
        parts = [rest + v * factor for v in values]
        # c * max(x, y) <= r asks for both when c > 0, for one of them when c < 0.
        if (factor > 0) == (term.op != "min"):
            return [sum(combo, ()) for combo in product(*(_split(p) for p in parts))]
        return [case for p in parts for case in _split(p)]
    return [(bound,)]


def _inequality(bound: Affine) -> Expr:
    """Return bound <= 0 with positive terms left and negative terms right."""
    left = Affine(tuple((t, c) for t, c in bound.terms if c > 0))
    return apply("le", to_expr(left), to_expr(left - bound))


def contradictory(literals: Iterable[Literal]) -> bool:
    """Tell whether the literals evidently never hold together."""
    literals = list(literals)
    exprs = {x.expr for x in literals}
    if any(_opposite(e) in exprs for e in exprs):
        return True
    bounds = [b for x in literals for b in x.bounds or ()]
    if any(b.is_const and b.const > 0 for b in bounds):
        return True
    return any((a + b).is_const and (a + b).const > 0 for a, b in combinations(bounds, 2))


def _opposite(expr: Expr) -> Expr:
    match expr:
        case Apply(op, args) if op in _NEGATED:
            return Apply(_NEGATED[op], args)
    return apply("not", expr)


def conjunction(literals: Iterable[Literal]) -> Expr:
    """Return the predicate that all literals hold."""
    result: Expr = TRUE
    for literal in literals:
        result = apply("and", result, literal.expr)
    return result


def disjunction(conjunctions: Iterable[Conjunction]) -> Expr:
    """Return the predicate that one alternative holds, with common literals factored out."""
    found = list(conjunctions)
    if not found:
        return FALSE
    common = [x for x in found[0] if all(x in c for c in found[1:])]
    rest: Expr = FALSE
    for c in found:
        rest = apply("or", rest, conjunction(x for x in c if x not in common))
    return apply("and", conjunction(common), rest)
