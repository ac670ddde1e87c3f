"""Remember what a pattern says while it is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from sparsegen.errors import PatternError, Site
from sparsegen.ir.axes import Axis, Entries, Named
from sparsegen.ir.node import Node


@dataclass
class Trace:
    """The pattern at hand: its sequence letters and which keys a query was paired with."""

    name: str
    query: str | None = None
    key: str | None = None
    pairs: dict[Node, Node] = field(default_factory=dict)

    def pair(self, q: Node, k: Node, site: Site | None) -> None:
        """Note that `q` attends `k`; all pairs of a pattern share their sequence letters."""
        query, key = _letter(q, "query", site), _letter(k, "key", site)
        for role, was, now in (("query", self.query, query), ("key", self.key, key)):
            if was is not None and was != now:
                raise PatternError(
                    f"this pattern's {role} axis is [{was}], but here it is [{now}]",
                    at=site,
                    hint=f"a pattern has one {role} sequence; declare both with one letter",
                )
        self.query, self.key = query, key
        self.pairs.setdefault(q, k)


_CURRENT: ContextVar[Trace | None] = ContextVar("sparsegen_trace", default=None)


def current(verb: str) -> Trace:
    """Return the trace at hand; refuse a verb outside of a pattern."""
    trace = _CURRENT.get()
    if trace is None:
        raise PatternError(
            f"{verb} has no meaning outside of a pattern",
            at=Site.caller(),
            hint="call it in a function decorated with @sg.pattern",
        )
    return trace


def active() -> bool:
    """Tell whether a pattern is being traced."""
    return _CURRENT.get() is not None


@contextmanager
def tracing(name: str) -> Iterator[Trace]:
    """Trace a pattern in this context."""
    trace = Trace(name)
    token = _CURRENT.set(trace)
    try:
        yield trace
    finally:
        _CURRENT.reset(token)


def _letter(node: Node, role: str, site: Site | None) -> str:
    axis: Axis = node.axes[0]
    base = axis.parent if isinstance(axis, Entries) else axis
    if not isinstance(base, Named):
        raise PatternError(
            f"the first axis of the {role} is [{axis}], but a sequence axis is a letter",
            at=site,
            hint='declare it as in sg.Tensor["T Hq D"]',
        )
    return base.name
