"""Hold the values of a pattern: frozen nodes with known axes and a remembered origin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from sparsegen.errors import Site
from sparsegen.ir.axes import Axis
from sparsegen.ir.expr import Expr, Member, Table
from sparsegen.ir.expr import walk as walk_expr

NODES: dict[str, type[Node]] = {}


@dataclass(frozen=True, kw_only=True)
class Node:
    """A value of a pattern. `axes` says its geometry, `site` where the user wrote it."""

    op: ClassVar[str] = ""
    axes: tuple[Axis, ...]
    site: Site | None = field(default=None, compare=False, repr=False)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        NODES[cls.op] = cls

    @property
    def label(self) -> str:
        """Return the word printed where another value mentions this one."""
        return self.op

    @property
    def title(self) -> str:
        """Return what messages call this value."""
        return f"the result of {self.op}()"

    def operands(self) -> tuple[Node, ...]:
        """Return the nodes this one reads, in order of its fields, those inside expressions too."""
        found: dict[Node, None] = {}
        for f in fields(self):
            if f.name not in {"axes", "site"}:
                for node in _nodes_in(getattr(self, f.name)):
                    found.setdefault(node)
        return tuple(found)


def _nodes_in(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _nodes_in(item)
    elif isinstance(value, Expr):
        for part in walk_expr(value):
            if isinstance(part, Table):
                yield part.tensor
            elif isinstance(part, Member):
                yield part.selection
    elif hasattr(value, "__dataclass_fields__"):
        for f in fields(value):
            yield from _nodes_in(getattr(value, f.name))


@dataclass(frozen=True, kw_only=True)
class Input(Node):
    """A parameter of the pattern. `kind` "int" marks tables of ids; others are floating point."""

    op: ClassVar[str] = "input"
    name: str
    kind: Literal["float", "int"] = "float"

    @property
    def label(self) -> str:
        """Return the name of the parameter."""
        return self.name

    @property
    def title(self) -> str:
        """Return what messages call this value."""
        return f"the input {self.name!r}"


@dataclass(frozen=True, kw_only=True)
class Slice(Node):
    """Elements [start, stop) of the last axis; a view, never a copy."""

    op: ClassVar[str] = "slice"
    x: Node
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Map(Node):
    """A pointwise function of a value, `fn` over Symbol("x"); applied while the value is loaded."""

    op: ClassVar[str] = "map"
    x: Node
    fn: Expr


@dataclass(frozen=True, kw_only=True)
class Output:
    """What the pattern returns: a node and which of its results ("o", "lse" or "indices")."""

    node: Node
    what: Literal["o", "lse", "indices"]


def walk(outputs: tuple[Output, ...]) -> tuple[Node, ...]:
    """Return every node once, operands before users."""
    order: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in order:
            for operand in node.operands():
                visit(operand)
            order.setdefault(node)

    for output in outputs:
        visit(output.node)
    return tuple(order)
