"""Offer the eight verbs as functions over lazy values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparsegen import primitives as verb
from sparsegen.analysis import keys as key_rules
from sparsegen.dsl.index import Index, _number, _truth, as_expr
from sparsegen.dsl.trace import current
from sparsegen.dsl.values import Attention, Compressed, Scores, Selection, Value, node_of
from sparsegen.errors import PatternError, Site, did_you_mean
from sparsegen.ir import expr as ir
from sparsegen.ir.expr import TRUE, Expr, Head, Pos

Mod = Callable[[Index], Any]


@dataclass(frozen=True)
class Pool:
    """A way to summarise a window without weights."""

    how: Literal["mean", "max", "min", "sum"]


@dataclass(frozen=True)
class SoftmaxPool:
    """Per-channel softmax pooling; see `softmax`."""

    gate: Value
    bias: Value | None = None
    previous: tuple[Value, Value] | None = None


mean, max, min, sum = Pool("mean"), Pool("max"), Pool("min"), Pool("sum")
_POOLS = {p.how: p for p in (mean, max, min, sum)}


def softmax(
    gate: Value, *, bias: Value | None = None, previous: tuple[Value, Value] | None = None
) -> SoftmaxPool:
    """Pool each channel by softmax(gate + slot bias) over the window.

    Args:
        gate: logits with the axes of the value to pool.
        bias: one row per slot, [slots dim].
        previous: (value, gate) to read the window before from, so that windows overlap by one
            (DeepSeek-V4 CSA); the bias then has 2 * width rows, those of the previous window first.
    """
    return SoftmaxPool(gate, bias, previous)


def index(q: Value, k: Value) -> tuple[Index, Index]:
    """Return the positions i of the query and j of the key (or entry e, for compressed keys).

    i counts in key coordinates: query row t stands at i = offset + t, where the offset is given at
    the call, or places the queries at the end of the keys.
    """
    site = Site.caller()
    trace = current("sg.index()")
    qn, kn = node_of(q, "the query of index()"), node_of(k, "the key of index()")
    trace.pair(qn, kn, site)
    return Index(Pos("query", qn.axes[0])), Index(Pos("key", kn.axes[0]))


def head(q: Value) -> Index:
    """Return the head h of the query."""
    current("sg.head()")
    node = node_of(q, "the query of head()")
    if len(node.axes) < 2:
        raise PatternError(
            f"{q} has no head axis",
            at=Site.caller(),
            hint="pass the query, declared [sequence heads dim]",
        )
    return Index(Head(node.axes[1]))


def project(x: Value, w: Value) -> Value:
    """Multiply the last axis of x by a weight [head in out] or [in out]."""
    current("sg.project()")
    site = Site.caller()
    return Value(
        verb.project(
            node_of(x, "the value of project()"), node_of(w, "the weight of project()"), site
        )
    )


def cat(*parts: Value) -> Value:
    """Join values along their last axis; never a copy."""
    current("sg.cat()")
    return Value(verb.cat(tuple(node_of(p, "a part of cat()") for p in parts), Site.caller()))


def compress(
    x: Value,
    how: Pool | SoftmaxPool | Value | str,
    *,
    width: int,
    stride: int | None = None,
    bias: Value | None = None,
    partial: bool = False,
) -> Compressed:
    """Summarise windows of `width` positions every `stride` (default: width).

    Args:
        x: [sequence heads dim].
        how: sg.mean, sg.max, sg.min, sg.sum; a weight [width] or [width in out] (linear, learned);
            or sg.softmax(gate).
        bias: for a weight, added to the window before it: one row per slot, [width in].
        partial: also keep the incomplete window at the end.
    """
    current("sg.compress()")
    site = Site.caller()
    node = node_of(x, "the value of compress()")
    if isinstance(how, str):
        if how not in _POOLS:
            hint = did_you_mean(how, _POOLS)
            raise PatternError(f"compress() does not know how={how!r}", at=site, hint=hint)
        how = _POOLS[how]
    weight = gate = previous = None
    if isinstance(how, Pool):
        name: Any = how.how
    elif isinstance(how, SoftmaxPool):
        if bias is not None:
            raise PatternError(
                "compress() with softmax pooling takes no bias= of its own",
                at=site,
                hint="pass it to the pooling: sg.softmax(gate, bias=b)",
            )
        name, gate, bias = "softmax", node_of(how.gate, "the gate of softmax()"), how.bias
        if how.previous is not None:
            a, b = how.previous
            previous = (node_of(a, "previous="), node_of(b, "previous="))
    else:
        name, weight = "linear", node_of(how, "how= of compress()")
    out = verb.compress(
        node, name, width=width, stride=width if stride is None else stride, partial=partial,
        weight=weight, gate=gate, bias=None if bias is None else node_of(bias, "bias="),
        previous=previous, site=site,
    )  # fmt: skip
    return Compressed(out)


def score(
    q: Value,
    k: Value,
    *,
    where: Any = True,
    scale: float | None = None,
    mod: Mod | None = None,
    act: Mod | None = None,
    weights: Value | None = None,
    norm: Literal["softmax"] | None = None,
) -> Scores:
    """Score every visible pair: weights * act(mod(scale * q . k)), never stored.

    Args:
        q: [queries heads dim]; k: [keys key-heads dim].
        where: predicate of visible pairs.
        scale: default: the scale given to compile, or dim ** -0.5.
        mod, act: functions of the score; they may use i, j, h and tables.
        weights: [queries heads].
        norm: "softmax" normalises each row over its visible keys.
    """
    site = Site.caller()
    trace = current("sg.score()")
    qn, kn = node_of(q, "the query of score()"), node_of(k, "the key of score()")
    trace.pair(qn, kn, site)
    w = None if weights is None else node_of(weights, "weights=")
    return Scores(
        verb.score(
            qn, kn, where=_truth_of(where), scale=_scale(scale, site), mod=_mod(mod, "mod", site),
            act=_mod(act, "act", site), weights=w, norm=norm, site=site,
        )
    )  # fmt: skip


def reduce(
    x: Scores,
    how: Literal["sum", "max", "mean", "lse"],
    *,
    by: Any,
    norm: Literal["softmax"] | None = None,
) -> Scores:
    """Reduce scores whose keys agree; keys are floor-affine in h, i and j.

    Args:
        by: the keys, such as (i, j) to sum over heads, (h, i, j // 64) for blocks.
        norm: "softmax" normalises the result over its last key.
    """
    site = Site.caller()
    current("sg.reduce()")
    node = node_of(x, "the scores of reduce()")
    parts = by if isinstance(by, tuple | list) else (by,)
    keys = tuple(as_expr(p, "a key of reduce()") for p in parts)
    out = verb.reduce(node, how, keys, norm, site)
    key_rules.check_reduce(out, site)
    return Scores(out)


def select(
    x: Scores,
    *,
    topk: Any = None,
    top_p: float | None = None,
    threshold: float | None = None,
    force: Any = None,
) -> Selection:
    """Choose keys of the last coordinate: the top-k, the top-p mass, or all above a threshold.

    Args:
        topk: how many: a number, or an expression of the other keys and of i.stop, j.stop.
        force: predicate of keys that are always chosen; they count inside the budget.
    """
    site = Site.caller()
    current("sg.select()")
    node = node_of(x, "the scores of select()")
    if isinstance(topk, bool) or (isinstance(topk, int) and topk < 1):
        raise PatternError(
            f"topk={topk!r}: a budget is a positive integer",
            at=site,
            hint="drop the selection from where= to choose nothing",
        )
    budget = None if topk is None else _number(topk)
    if budget is not None and ir.kind(budget) != "int":
        raise PatternError(
            f"topk={topk!r}: a budget is a whole number",
            at=site,
            hint="pass an integer, and divide with //",
        )
    forced = None if force is None else _truth_of(force, "force=")
    out = verb.select(node, topk=budget, top_p=top_p, threshold=threshold, force=forced, site=site)
    return Selection(key_rules.check_select(out, site))


def attend(
    q: Value,
    k: Value | Sequence[Value],
    v: Value | Sequence[Value],
    *,
    where: Any = True,
    scale: float | None = None,
    mod: Mod | None = None,
    sink: Value | None = None,
) -> Attention:
    """Attend from q to the keys that `where` admits; lists of k, v, where share one softmax.

    Args:
        q: [queries heads dim]; k: [keys key-heads dim]; v: [keys key-heads value-dim].
        where: predicate of visible pairs, with selections as sel[keys].
        scale: default: the scale given to compile, or dim ** -0.5.
        mod: function of the scaled score; may use i, j, h and tables.
        sink: [heads], logits in natural-log units that join the denominator only.
    """
    site = Site.caller()
    trace = current("sg.attend()")
    qn = node_of(q, "the query of attend()")
    keys, values = _listed(k), _listed(v)
    wheres = list(where) if isinstance(where, list | tuple) else [where] * len(keys)
    if not len(keys) == len(values) == len(wheres):
        raise PatternError(
            f"attend() has {len(keys)} keys, {len(values)} values and {len(wheres)} predicates",
            at=site,
            hint="give lists of equal length, one predicate per source",
        )
    sources = []
    for kk, vv, ww in zip(keys, values, wheres, strict=True):
        kn = node_of(kk, "the key of attend()")
        trace.pair(qn, kn, site)
        sources.append(
            verb.Source(k=kn, v=node_of(vv, "the value of attend()"), where=_truth_of(ww))
        )
    return Attention(
        verb.attend(
            qn, tuple(sources), scale=_scale(scale, site), mod=_mod(mod, "mod", site),
            sink=None if sink is None else node_of(sink, "sink="), site=site,
        )
    )  # fmt: skip


def merge(parts: Sequence[Attention], *, gates: Value | None = None) -> Attention:
    """Combine attentions: as one softmax over disjoint keys (by lse), or as a gated sum.

    Args:
        gates: [queries heads parts].
    """
    current("sg.merge()")
    site = Site.caller()
    nodes = tuple(node_of(p, "a part of merge()") for p in parts)
    return Attention(verb.merge(nodes, None if gates is None else node_of(gates, "gates="), site))


def _listed(value: Value | Sequence[Value]) -> list[Value]:
    return list(value) if isinstance(value, list | tuple) else [value]  # type: ignore[list-item]


def _truth_of(where: Any, what: str = "where=") -> Expr:
    return TRUE if where is True or where is None else _truth(where, what)


def _scale(scale: float | None, site: Site) -> float | None:
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise PatternError(
            f"scale={scale!r}: the scale is a number", at=site,
            hint="pass it as a hyperparameter of the pattern",
        )  # fmt: skip
    return float(scale)


def _mod(fn: Mod | None, what: str, site: Site) -> Expr | None:
    if fn is None:
        return None
    if not callable(fn):
        raise PatternError(
            f"{what}={fn!r} is no function of the score",
            at=site,
            hint=f"write {what}=sg.relu, or {what}=lambda s: 30 * sg.tanh(s / 30)",
        )
    return _number(fn(Index(ir.Symbol("s"))))
