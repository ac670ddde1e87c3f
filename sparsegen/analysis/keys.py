"""Check the keys of reductions, selections and memberships; say forced keys in those keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from sparsegen.analysis.affine import Affine, Floor, affine, leaf
from sparsegen.errors import PatternError, Site
from sparsegen.ir.axes import Axis, Entries, extent
from sparsegen.ir.expr import (
    Apply,
    BlockOf,
    Const,
    Expr,
    Head,
    KeyVar,
    Member,
    Pos,
    Size,
    apply,
    rebuild,
    show,
    walk,
)
from sparsegen.ir.node import Node

if TYPE_CHECKING:
    from sparsegen.primitives.reduce import Reduce
    from sparsegen.primitives.select import Select

_AFFINE = "a key is i, j, an entry, h, i - j, or one of these // n"


@dataclass(frozen=True)
class Key:
    """What one key enumerates: `(position + shift) // granule` of an axis, or the slash i - j.

    For a key on disjoint entries, `axis` and `granule` are those of the positions they cover.
    """

    kind: Literal["head", "query", "key", "slash"]
    axis: Axis
    granule: int | Expr = 1
    shift: int = 0


def canonical(expr: Expr) -> Affine | None:
    """Return the sum that two spellings of one key share (entry e of blocks of 64 is j // 64)."""
    return affine(expr, merge_entries=True)


def same(a: Expr, b: Expr) -> bool:
    """Tell whether two key expressions are equal wherever they are evaluated."""
    if a == b:
        return True
    x, y = canonical(a), canonical(b)
    return x is not None and x == y


def classify(expr: Expr, site: Site | None, what: str = "reduce()") -> Key:
    """Return what a key expression enumerates.

    Raises:
        PatternError: it is not floor-affine in one position (or i - j), or may be negative.
    """
    total = affine(expr)
    if total is None:
        raise PatternError(f"the key {show(expr)} of {what} is not affine", at=site, hint=_AFFINE)
    merged = canonical(expr)
    assert merged is not None
    match merged.terms:
        case ((Floor(Affine(((Pos() | Head() as pos, 1),), shift), granule), 1),):
            if isinstance(granule, int):
                return _key(expr, pos, granule, shift + merged.const * granule, site, what)
            if not merged.const:
                return _key(expr, pos, granule, shift, site, what)
        case ((Pos() | Head() as pos, 1),):
            return _key(expr, pos, 1, merged.const, site, what)
        case ((Pos(role="key") as y, -1), (Pos(role="query"), 1)) if not merged.const:
            return Key("slash", y.axis)
    raise PatternError(
        f"the key {show(expr)} of {what} does not enumerate one axis", at=site, hint=_AFFINE
    )


def _key(
    expr: Expr, pos: Pos | Head, granule: int | Expr, shift: int, site: Site | None, what: str
) -> Key:
    if isinstance(pos, Head):
        kind: Literal["head", "query", "key"] = "head"
    else:
        kind = pos.role
    if shift < 0 or (shift and kind != "key"):
        raise PatternError(
            f"the key {show(expr)} of {what} is shifted by {shift}",
            at=site,
            hint="a shift is positive, and on the key axis only: (j + c) // n",
        )
    return Key(kind, pos.axis, granule, shift)


def over_keys(expr: Expr, keys: tuple[Expr, ...]) -> Expr:
    """Say `expr` as a function of the values of `keys`, as far as possible.

    A sub-expression that equals key n becomes KeyVar(n), and a coarser floor of key n its quotient.
    """
    merged = [canonical(k) for k in keys]

    def rule(e: Expr) -> Expr | None:
        if isinstance(e, Const | KeyVar | Size):
            return None
        for n, key in enumerate(keys):
            if e == key:
                return KeyVar(n)
        found = canonical(e) if isinstance(e, Pos | Head | Apply | BlockOf) else None
        if found is None or found.is_const:
            return None
        for n, key_sum in enumerate(merged):
            if key_sum is None:
                continue
            if found == key_sum:
                return KeyVar(n)
            quotient = _quotient(found, key_sum)
            if quotient is not None:
                return apply("floordiv", KeyVar(n), Const(quotient))
        return None

    return rebuild(expr, rule)


def _quotient(a: Affine, b: Affine) -> int | None:
    """Return n with a == b // n, if there is one."""
    match a.terms, b.terms:
        case ((Floor(_, int() as coarse), 1),), ((Floor(_, int() as fine), 1),):
            if coarse % fine == 0 and b // (coarse // fine) == a:
                return coarse // fine
    return None


def raw(expr: Expr) -> Iterator[Expr]:
    """Yield the positions and heads that `expr` mentions."""
    return (e for e in walk(expr) if isinstance(e, Pos | Head | BlockOf))


def check_reduce(node: Reduce, site: Site | None) -> None:
    """Check the keys of a reduction against the space it reduces.

    Raises:
        PatternError: a key is not floor-affine, or is no function of the keys of the space.
    """
    check_reduce_keys(node.x.keys, node.keys, site)


def check_reduce_keys(space: tuple[Expr, ...], by: tuple[Expr, ...], site: Site | None) -> None:
    """Check that every key of `by` is floor-affine and constant on each element of `space`.

    Raises:
        PatternError: a key is not, naming it and the keys of the space.
    """
    for key in by:
        if isinstance(key, BlockOf):
            known = key in space or Pos("key", key.axis) in space
        else:
            classify(key, site)
            known = not any(True for _ in raw(over_keys(key, space)))
        if not known:
            raise PatternError(
                f"the key {show(key)} of reduce() is no function of the keys reduced, "
                f"({', '.join(map(show, space))})",
                at=site,
                hint="build keys from those; for compressed keys use kc.blocks(n)",
            )


def check_select(node: Select, site: Site | None) -> Select:
    """Check a selection; return it with `force` and `topk` said in the keys it is made over.

    Raises:
        PatternError: the last key does not lie on the key axis or its entries overlap; an earlier
            key lies on the key axis; `force` or `topk` depend on more than the keys.
    """
    selection_axis(node)
    queries = 0
    for key in node.keys[:-1]:
        kind = classify(key, site, "select()")
        queries += kind.kind == "query"
        if kind.kind not in ("head", "query") or queries > 1:
            raise PatternError(
                f"select() chooses by ({', '.join(map(show, node.keys))}), but the keys before the "
                "last must be heads and at most one query position",
                at=site,
                hint="reduce(..., by=(h, i, j // n)) first",
            )
    if node.topk is not None:
        node = replace(node, topk=_function_of(node.topk, node.keys[:-1], "topk", node.keys, site))
    if node.force is not None:
        node = replace(node, force=_function_of(node.force, node.keys, "force", node.keys, site))
    return node


def _function_of(
    expr: Expr, keys: tuple[Expr, ...], what: str, shown: tuple[Expr, ...], site: Site | None
) -> Expr:
    rewritten = over_keys(expr, keys)
    left = next(raw(rewritten), None)
    if left is not None:
        before = "" if what == "force" else " before the last"
        raise PatternError(
            f"{what}={show(expr)} mentions {show(left)}, which differs between the elements of one "
            f"key ({', '.join(map(show, shown))})",
            at=site,
            hint=f"use only these keys{before}, numbers, tables and stops",
        )
    return rewritten


def selection_axis(node: Select) -> Key:
    """Return the axis a selection chooses from: its position, granule, shift, or the slash.

    Slash values below zero (j > i) are no keys: such pairs take part in no group.

    Raises:
        PatternError: the last key enumerates heads, queries or overlapping entries.
    """
    last = node.keys[-1]
    if isinstance(last, BlockOf):
        return Key("key", last.axis.parent, last.width)
    key = classify(last, node.site, "select()")
    if key.kind not in ("key", "slash"):
        raise PatternError(
            f"select() chooses {show(last)}, which is no key position",
            at=node.site,
            hint="put the key position last: reduce(..., by=(h, i, j // n))",
        )
    if isinstance(key.axis, Entries):
        _refuse_overlap(node, key.axis)
    return key


def _refuse_overlap(node: Node, axis: Entries) -> NoReturn:
    built = _builder(node, axis)
    where = f", built at {built}" if built is not None else ""
    raise PatternError(
        f"select() on overlapping entries (width={axis.width}, stride={axis.stride}{where})",
        at=node.site,
        hint="reduce(..., by=(i, kc.blocks(n))) to disjoint blocks first",
    )


def _builder(node: Node, axis: Entries) -> Site | None:
    """Return where the entries of `axis` were made."""
    for operand in node.operands():
        if operand.op == "compress" and operand.axes[0] == axis:
            return operand.site
        found = _builder(operand, axis)
        if found is not None:
            return found
    return None


def member_key(node: Node, keys: tuple[Expr, ...], site: Site | None) -> Member:
    """Return the membership `selection[keys]`.

    A head key names a list of the selection: on the selection's own head axis it must be the same
    expression, on another one any h // n or constant (extents are compared at binding). A query key
    and the last key must be the selection's, in any spelling.

    Raises:
        PatternError: the keys are not those of the selection, naming both.
    """
    selection: Any = node
    theirs: tuple[Expr, ...] = selection.keys
    shown = f"({', '.join(map(show, theirs))})"
    made = f"the selection made at {node.site} is" if node.site else "the selection is"
    if len(keys) != len(theirs):
        raise PatternError(
            f"{made} keyed by {shown}, but is read with {len(keys)} "
            f"key{'s' if len(keys) != 1 else ''} ({', '.join(map(show, keys))})",
            at=site,
            hint=f"write sel[{', '.join(map(show, theirs))}]",
        )
    for n, (mine, key) in enumerate(zip(keys, theirs, strict=True)):
        last = n == len(keys) - 1
        if isinstance(mine, BlockOf) and mine.axis.overlaps:
            raise PatternError(
                f"{made} read with {show(mine)}, but an entry lies in several blocks",
                at=site,
                hint=_advice(key, last),
            )
        fits = same(mine, key) or (not last and _names_list(mine, key))
        if not fits:
            raise PatternError(
                f"{made} keyed by {shown}, but is read with {show(mine)} in place of {show(key)}",
                at=site,
                hint=_advice(key, last),
            )
    return Member(node, keys)


def _names_list(mine: Expr, key: Expr) -> bool:
    """Tell whether a head key of another axis, or a constant, may address the lists of `key`."""
    heads = list(raw(key))
    if not heads or not all(isinstance(e, Head) for e in heads):
        return False
    if isinstance(mine, Const):
        return isinstance(mine.value, int) and mine.value >= 0
    used = list(raw(mine))
    total = affine(mine)
    single = total is not None and len(total.terms) == 1 and total.terms[0][1] == 1
    return (
        single
        and bool(used)
        and all(isinstance(e, Head) for e in used)
        and not set(used) & set(heads)
    )


def _advice(key: Expr, last: bool) -> str:
    if not last:
        return f"write {show(key)}, the key it was made with"
    merged = canonical(key) if not isinstance(key, BlockOf) else None
    if isinstance(key, BlockOf):
        return f"write j // {key.width} for the key position j"
    if merged is not None and merged != leaf(key) and isinstance(key, Pos):
        assert isinstance(key.axis, Entries)
        return f"write j // {key.axis.stride} for the key position j, or the entry itself"
    return f"write {show(key)}, over the axis it was chosen from"


def key_extent(key: Expr, sizes: dict[str, int]) -> int:
    """Return how many values a bound head key (h, h // n or a constant) can take, plus none below.

    A constant c counts c + 1: it must address an existing list.
    """
    match key:
        case Const(int() as value):
            return value + 1
        case Head(axis):
            return extent(axis, sizes)
        case Apply("floordiv", (Head(axis), Const(int() as n))):
            return -(-extent(axis, sizes) // n)
    raise ValueError(f"{show(key)} is no bound head key")
