"""Wrap nodes in the lazy values a pattern computes with."""

from __future__ import annotations

from types import EllipsisType
from typing import Any, NoReturn

from sparsegen.dsl.index import Index, as_expr, is_tensor
from sparsegen.dsl.trace import current
from sparsegen.errors import PatternError, Site
from sparsegen.ir import expr as ir
from sparsegen.ir.axes import Axis, Concat, Entries, Fixed, Named
from sparsegen.ir.expr import Const, Expr, Pos, Size
from sparsegen.ir.node import Input, Map, Node, Slice


class Value:
    """A lazy value: an input, or what a verb returns. Nothing is computed while tracing."""

    __slots__ = ("node",)
    __array_ufunc__ = None

    def __init__(self, node: Node) -> None:
        self.node = node

    def __repr__(self) -> str:
        return f"<{self.node.label}: [{' '.join(map(str, self.node.axes))}]>"

    def __bool__(self) -> NoReturn:
        raise PatternError(
            f"{self} has no truth value while the pattern is traced",
            at=Site.caller(),
            hint="choose with a hyperparameter, or with predicates in where=",
        )

    @property
    def group(self) -> Index:
        """Return how many query heads share a key head; the pair comes from sg.index(q, k)."""
        k = current(".group").pairs.get(self.node)
        if k is None:
            raise PatternError(
                f"{self} is not paired with keys yet, so its head group is unknown",
                at=Site.caller(),
                hint="call sg.index(q, k) before q.group",
            )
        return Index(ir.apply("floordiv", size_of(self.node.axes[1]), size_of(k.axes[1])))

    def __getitem__(self, key: Any) -> Any:
        site = Site.caller()
        parts = key if isinstance(key, tuple) else (key,)
        if any(isinstance(p, slice | EllipsisType) for p in parts):
            return Value(_slice(self.node, parts, site))
        if not isinstance(self.node, Input):
            raise PatternError(
                f"{self} is computed, and only inputs can be read as tables", at=site,
                hint="slice its last axis with x[..., a:b], or use it in a verb",
            )  # fmt: skip
        if len(parts) != len(self.node.axes):
            raise PatternError(
                f"the table {self.node.name!r} is [{' '.join(map(str, self.node.axes))}], "
                f"but is read with {len(parts)} {'index' if len(parts) == 1 else 'indices'}",
                at=site,
                hint=f"give {len(self.node.axes)}, one for each axis",
            )
        index = tuple(as_expr(p, "the index of a table") for p in parts)
        for expr in index:
            if ir.kind(expr) != "int":
                raise PatternError(
                    f"the table {self.node.name!r} is indexed by {ir.show(expr)}, "
                    f"which is a {ir.kind(expr)}",
                    at=site,
                    hint="index tables by positions, heads and integers",
                )
        return Index(ir.Table(self.node, index))

    def map(self, fn: Expr) -> Value:
        """Apply a pointwise function of Symbol("x") while the value is loaded."""
        return Value(Map(x=self.node, fn=fn, axes=self.node.axes, site=Site.caller()))

    def __neg__(self) -> Value:
        return self.map(ir.apply("neg", ir.Symbol("x")))

    def __mul__(self, other: Any) -> Value:
        if isinstance(other, bool) or not isinstance(other, int | float):
            raise PatternError(
                f"{self} can be multiplied by a number, not by {other!r}",
                at=Site.caller(),
                hint="use sg.project for weights and sg.merge(gates=) for gates",
            )
        return self.map(ir.apply("mul", ir.Symbol("x"), Const(float(other))))

    __rmul__ = __mul__

    def _arithmetic(self, other: Any) -> NoReturn:
        raise PatternError(
            f"{self} is a tensor; values have no +, -, / or comparisons",
            at=Site.caller(),
            hint="the verbs are project, cat, compress, score, reduce, select, attend, merge",
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __truediv__ = __matmul__ = _arithmetic
    __lt__ = __le__ = __gt__ = __ge__ = _arithmetic

    def __getattr__(self, name: str) -> NoReturn:
        known = [n for n in dir(type(self)) if not n.startswith("_") and n != "node"]
        raise PatternError(
            f"{self} has no .{name}", at=Site.caller(), hint=f"it has .{', .'.join(known)}"
        )


class Compressed(Value):
    """Entries of compressed positions: a value that knows which positions each entry covers."""

    __slots__ = ()

    @property
    def _axis(self) -> Entries:
        axis = self.node.axes[0]
        assert isinstance(axis, Entries)
        return axis

    @property
    def start(self) -> Index:
        """Return the first position that entry e covers."""
        e = Pos("key", self._axis)
        return Index(ir.apply("mul", e, Const(self._axis.stride)))

    @property
    def end(self) -> Index:
        """Return the last position that entry e covers (inclusive)."""
        return Index(ir.apply("add", self.start.expr, Const(self._axis.width - 1)))

    def blocks(self, width: int) -> Index:
        """Return the key "blocks of `width` positions that entry e overlaps"."""
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise PatternError(
                f"blocks({width!r}) needs a positive integer",
                at=Site.caller(),
                hint="pass the number of positions of a block, as in kc.blocks(64)",
            )
        return Index(ir.BlockOf(self._axis, width))


class Attention(Value):
    """What attend and merge return: the output, and `.lse`."""

    __slots__ = ()

    @property
    def lse(self) -> Lse:
        """Return the log-sum-exp of each row, natural log, without the sink."""
        if getattr(self.node, "gates", None) is not None:
            raise PatternError(
                "a gated merge has no lse",
                at=Site.caller(),
                hint="merge without gates, or return the .lse of its parts",
            )
        return Lse(self.node)


class Lse(Value):
    """The lse of an attention; it can be returned."""

    __slots__ = ()


class Scores(Value):
    """A virtual tensor of scores or of their reduction: never stored, only selected from."""

    __slots__ = ()


class Selection(Value):
    """A set of keys: index it by key expressions to ask for membership, or return `.indices`."""

    __slots__ = ()

    @property
    def indices(self) -> Indices:
        """Return the indices as an int32 tensor: ascending, padded with -1 on the right."""
        return Indices(self.node)

    def __getitem__(self, key: Any) -> Index:
        from sparsegen.analysis.keys import member_key

        site = Site.caller()
        parts = key if isinstance(key, tuple) else (key,)
        keys = tuple(as_expr(p, "the key of a selection") for p in parts)
        return Index(member_key(self.node, keys, site))


class Indices(Value):
    """The indices of a selection; they can be returned."""

    __slots__ = ()


def size_of(axis: Axis) -> Expr:
    """Return the extent of a non-sequence axis as an expression."""
    match axis:
        case Fixed(size):
            return Const(size)
        case Named(name):
            return Size(name)
        case Concat(parts):
            total = size_of(parts[0])
            for part in parts[1:]:
                total = ir.apply("add", total, size_of(part))
            return total
        case Entries():
            raise AssertionError("entries are counted per sequence")


def node_of(value: Any, what: str) -> Node:
    """Return the node of a value; name what a user passed instead."""
    if isinstance(value, Lse | Indices):
        raise PatternError(
            f"{type(value).__name__.lower()} can be returned, but not used as {what}",
            at=Site.caller(),
            hint="compute on it after the kernel, or select by sel[keys] inside where=",
        )
    if isinstance(value, Value):
        if isinstance(value.node, Input) and value.node.kind == "int":
            raise PatternError(
                f"{what} is {value.node.title}, a table of ids",
                at=Site.caller(),
                hint=f"read it in a predicate, as in {value.node.name}[j], or declare it as floats",
            )
        return value.node
    if is_tensor(value):
        raise PatternError(
            f"{what} is a captured tensor of shape {tuple(value.shape)}",
            at=Site.caller(),
            hint="make it a parameter of the pattern, annotated with sg.Tensor[...]",
        )
    raise PatternError(
        f"{what} is {value!r}, not a value of the pattern",
        at=Site.caller(),
        hint="pass an input of the pattern, or what a verb returned",
    )


def _slice(node: Node, parts: tuple[Any, ...], site: Site) -> Slice:
    last = parts[-1]
    leading = parts[:-1]
    plain = all(p is Ellipsis or p == slice(None) for p in leading)
    if not plain or not isinstance(last, slice) or last.step not in (None, 1) or not leading:
        raise PatternError(
            "a value can be sliced along its last axis only", at=site, hint="write x[..., a:b]"
        )
    axis = node.axes[-1]
    size = axis.size if isinstance(axis, Fixed) else None
    start = 0 if last.start is None else last.start
    stop = size if last.stop is None else last.stop
    for bound in (start, stop):
        if not isinstance(bound, int) or isinstance(bound, bool) or bound < 0:
            raise PatternError(
                f"the slice {_shown(last)} of axis [{axis}] needs non-negative integer bounds",
                at=site,
                hint="give both ends, as numbers or hyperparameters",
            )
    assert isinstance(start, int)
    assert isinstance(stop, int)
    if stop <= start or (size is not None and stop > size):
        raise PatternError(
            f"the slice {_shown(last)} of axis [{axis}] is empty or out of range",
            at=site,
            hint="use 0 <= a < b <= size in x[..., a:b]",
        )
    return Slice(
        x=node, start=start, stop=stop, axes=(*node.axes[:-1], Fixed(stop - start)), site=site
    )


def _shown(part: slice) -> str:
    return f"[{'' if part.start is None else part.start}:{'' if part.stop is None else part.stop}]"
