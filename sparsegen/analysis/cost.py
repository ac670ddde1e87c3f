"""Say what a program costs as expressions of its letters: FLOPs, bytes, cache, tokens.

Each verb states its own cost, beside its reference, as a rule `cost(node, at) -> Cost`; this file
holds what rules share and walks a program. A kernel's cost is that of its node and of the values
it computes on the way and never stores: scores, reductions, views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sparsegen.analysis.count import Extents, Keys, count
from sparsegen.analysis.sums import Sympy
from sparsegen.ir.axes import Axis, Entries
from sparsegen.ir.expr import Apply, BlockOf, Const, Expr, Head, Member, Pos, Size, rebuild, walk
from sparsegen.ir.node import Input, Map, Node, Slice
from sparsegen.ir.program import Program

INDEX_BYTES = 4
"""Of an index of a selection, and of an lse: both have 32 bits."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one value costs in one sequence; sympy expressions of letters.

    products   FLOPs of matrix products, an fma counting two
    pointwise  other operations on elements: exponentials, mods, activations, pooling
    read       bytes that have to be read, each once
    written    bytes of the results, where the value is stored
    step       FLOPs of matrix products that the last query alone asks for
    attended   keys that the last query attends to, per head
    scored     keys that the last query is scored against, per head of the score
    at_most    `attended` without the edges of windows, linear in the length
    assumed    what the numbers take for granted about data
    """

    products: Sympy = 0
    pointwise: Sympy = 0
    read: Sympy = 0
    written: Sympy = 0
    step: Sympy = 0
    attended: Sympy = 0
    scored: Sympy = 0
    at_most: Sympy = 0
    assumed: tuple[str, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        both = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        both["assumed"] = tuple(dict.fromkeys(both["assumed"]))
        return Cost(**both)

    @property
    def bytes(self) -> Sympy:
        """Return the bytes that have to be moved."""
        return self.read + self.written


Rule = Callable[[Any, "Costing"], Cost]
_RULES: dict[str, tuple[Rule, bool]] = {}


def rule(op: str, *, stored: bool) -> Callable[[Rule], Rule]:
    """Register the cost rule of a verb; `stored` says that its result is written to memory."""

    def register(function: Rule) -> Rule:
        _RULES[op] = (function, stored)
        return function

    return register


def stored(node: Node) -> bool:
    """Tell whether a kernel writes a value to memory."""
    return node.op != Input.op and _RULES[node.op][1]


class Costing:
    """What a rule may ask: extents, visible keys and bytes, in one sequence of a program.

    Args:
        program: whose values are costed.
        known: sizes of letters that predicates mention, such as the heads of `h // q.group`.
        itemsize: bytes of an element of an input, by name; `default` of the others and of results.
        intermediate: bytes of an element of values between kernels.
    """

    def __init__(
        self,
        program: Program,
        known: Mapping[str, int],
        *,
        itemsize: Mapping[str, int] | None = None,
        default: int = 4,
        intermediate: int = 4,
    ) -> None:
        self.program = program
        self.extents = Extents(program, known)
        self._itemsize = dict(itemsize or {})
        self._default = default
        self._intermediate = intermediate
        self.returned = {(o.node, o.what) for o in program.outputs}
        self._keys: dict[tuple[Expr, Axis, Axis, Axis], Keys] = {}

    def size(self, axis: Axis) -> Sympy:
        """Return the extent of an axis."""
        return self.extents.of(axis)

    def elements(self, node: Node) -> Sympy:
        """Return how many elements a tensor has."""
        import sympy as sp

        return sp.prod(map(self.size, node.axes))

    def keys(self, where: Expr, q: Node, k: Node) -> Keys:
        """Return the keys of `k` that the queries of `q` see."""
        at = (where, q.axes[0], k.axes[0], k.axes[1])
        if at not in self._keys:
            self._keys[at] = count(
                self.resolved(where), query=q.axes[0], key=k.axes[0], heads=self.size(k.axes[1]),
                extents=self.extents,
            )  # fmt: skip
        return self._keys[at]

    def resolved(self, expr: Expr) -> Expr:
        """Replace every named size that is known by its value."""
        known = self.extents.known
        return rebuild(
            expr,
            lambda e: Const(known[e.name]) if isinstance(e, Size) and e.name in known else None,
        )

    def values_of(self, key: Expr) -> Sympy:
        """Return how many values a key of a selection takes."""
        import sympy as sp

        match self.resolved(key):
            case Head(axis) | Pos(axis=axis):
                return self.size(axis)
            case BlockOf(axis, width):
                return sp.ceiling(self.size(axis.parent) / width)
            case Apply("floordiv", (inner, Const(int() as n))):
                return sp.ceiling(self.values_of(inner) / n)
            case Apply("add", (inner, Const(int() as n))):
                return self.values_of(inner) + n
            case Apply("sub", (Pos("query", axis), Pos("key"))):
                return self.extents.queries(axis)[1]
        raise ValueError(f"{key} is no key of a selection")

    def itemsize(self, node: Node) -> int:
        """Return the bytes of one element of a stored value."""
        if isinstance(node, Input):
            whole = INDEX_BYTES if node.kind == "int" else self._default
            return self._itemsize.get(node.name, whole)
        return self._default if (node, "o") in self.returned else self._intermediate

    def written(self, node: Node) -> Sympy:
        """Return the bytes of a result."""
        return self.elements(node) * self.itemsize(node)

    def read(self, *nodes: Node | None, rows: Sympy | None = None) -> Sympy:
        """Return the bytes to read of values, each element once however many values show it.

        Args:
            nodes: tensors or views of them; None is skipped.
            rows: how many of their rows (default: all).
        """
        import sympy as sp

        spans: dict[Node, set[tuple[Sympy, Sympy]]] = {}
        for node in nodes:
            if node is not None:
                for leaf, start, stop in self.leaves(node):
                    spans.setdefault(leaf, set()).add((start, stop))
        total = sp.Integer(0)
        for leaf, found in spans.items():
            width = self.size(leaf.axes[-1])
            whole = any(start == 0 and stop == width for start, stop in found)
            part = width if whole else min_of(width, sum(b - a for a, b in found))
            count = self.elements(leaf) / width * part
            if rows is not None:
                count = count / self.size(leaf.axes[0]) * rows
            total += count * self.itemsize(leaf)
        return total

    def leaves(self, node: Node) -> Iterator[tuple[Node, Sympy, Sympy]]:
        """Yield the stored values a view shows, with the span of the last axis."""
        parts = getattr(node, "parts", ()) if node.op == "cat" else ()
        match node:
            case Map(x=x):
                yield from self.leaves(x)
            case Slice(x=x, start=start, stop=stop):
                at: Sympy = 0
                for leaf, first, end in self.leaves(x):
                    width = end - first
                    low, high = max_of(start - at, 0), min_of(stop - at, width)
                    if not (high - low).is_nonpositive:
                        yield leaf, first + low, first + high
                    at += width
            case _ if parts:
                for part in parts:
                    yield from self.leaves(part)
            case _:
                yield node, 0, self.size(node.axes[-1])

    def tables(self, *exprs: Expr | None) -> Sympy:
        """Return the bytes of the tables and of the lists that expressions read."""
        import sympy as sp

        found: dict[Node, None] = {}
        for expr in exprs:
            for e in () if expr is None else walk(expr):
                match e:
                    case Member(selection=node):
                        found[node] = None
                    case _ if hasattr(e, "tensor"):
                        found[e.tensor] = None
        return sum(
            (list_bytes(n, self) if n.op == "select" else self.written(n) for n in found),
            sp.Integer(0),
        )


def max_of(a: Sympy, b: Sympy) -> Sympy:
    """Return the larger of two expressions."""
    import sympy as sp

    return sp.Max(a, b)


def min_of(a: Sympy, b: Sympy) -> Sympy:
    """Return the smaller of two expressions."""
    import sympy as sp

    return sp.Min(a, b)


def operations(expr: Expr | None) -> int:
    """Count the operations of an expression, each shared one once."""
    return 0 if expr is None else len({e for e in walk(expr) if isinstance(e, Apply)})


def list_bytes(node: Any, at: Costing) -> Sympy:
    """Return the bytes of the lists of a select node."""
    import sympy as sp

    width = at.resolved(node.topk) if node.topk is not None else None
    entries = sp.Integer(width.value) if isinstance(width, Const) else at.values_of(node.keys[-1])
    return sp.prod([at.values_of(k) for k in node.keys[:-1]]) * entries * INDEX_BYTES


@rule("slice", stored=False)
def _slice(node: Slice, at: Costing) -> Cost:
    return Cost()


@rule("map", stored=False)
def _map(node: Map, at: Costing) -> Cost:
    return Cost(pointwise=operations(node.fn) * at.elements(node))


def kernels(at: Costing) -> tuple[tuple[Node, Cost], ...]:
    """Return the stored values of a program with their costs, in the order they are computed.

    What a kernel computes on the way counts with it, also where another kernel computes it again.
    """

    def cost(node: Node) -> Cost:
        function, _ = _RULES[node.op]
        total = function(node, at)
        for operand in node.operands():
            if operand.op != Input.op and not stored(operand):
                total += cost(operand)
        return total

    return tuple((node, cost(node)) for node in at.program.nodes if stored(node))


def total(costs: Iterator[Cost] | tuple[Cost, ...]) -> Cost:
    """Return the sum of costs."""
    result = Cost()
    for cost in costs:
        result += cost
    return result


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A value that decoding keeps of the past.

    elements  per token and layer
    bytes     of these elements
    last      how many tokens stay in the cache; None: all
    """

    name: str
    elements: Sympy
    bytes: Sympy
    last: Sympy | None


def cache(at: Costing) -> tuple[Cached, ...]:
    """Return what decoding steps read of earlier tokens: keys, values and compressed entries.

    Projections of cached values are computed again, and what only a compressor reads is kept for
    its last windows, which do not grow.
    """
    found: dict[Node, Sympy | None] = {}
    for node in at.program.nodes:
        for value, seen in _past(node, at):
            for leaf in _sources(value, at):
                last = None if seen.grows else seen.step
                before = found.setdefault(leaf, last)
                found[leaf] = None if before is None or last is None else max_of(before, last)
    kept = []
    for leaf, last in found.items():
        elements = at.size(leaf.axes[1]) * at.size(leaf.axes[2])
        axis, name = leaf.axes[0], getattr(leaf, "name", leaf.op)
        if isinstance(axis, Entries):
            elements /= axis.stride
            pooled = leaf.x  # type: ignore[attr-defined]
            name = f"{leaf.op}({getattr(pooled, 'name', pooled.op)}) every {axis.stride}"
        kept.append(
            Cached(name=name, elements=elements, bytes=elements * at.itemsize(leaf), last=last)
        )
    return tuple(kept)


def _past(node: Any, at: Costing) -> Iterator[tuple[Node, Keys]]:
    """Yield the values on the key axis that a node reads, and which keys."""
    if node.op == "attend":
        for source in node.sources:
            seen = at.keys(source.where, node.q, source.k)
            yield from ((source.k, seen), (source.v, seen))
    elif node.op == "score":
        yield node.k, at.keys(node.where, node.q, node.k)


def _sources(node: Node, at: Costing) -> Iterator[Node]:
    for leaf, *_ in at.leaves(node):
        if leaf.op == "project":
            yield from _sources(leaf.x, at)  # type: ignore[attr-defined]
        else:
            yield leaf


def multi_head(at: Costing) -> Sympy | None:
    """Return the cached elements per token of plain multi-head attention with the same heads.

    A key and a value for each head of the result, both as wide as that head; None if the program
    returns lists only.
    """
    out = next((o.node for o in at.program.outputs if o.what != "indices"), None)
    if out is None:
        return None
    return 2 * at.size(out.axes[1]) * at.size(out.axes[-1])
