"""Give counts of keys names, so that formulas over them stay short.

2*Hq*(D + E)*(S*T - ... Max(0, ...)**2 ...)  ->  2*Hq*(D + E)*pairs_1, and what pairs_1 is
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparsegen.analysis.cost import Costing
from sparsegen.analysis.count import Keys
from sparsegen.analysis.sums import Sympy, letter, readable, value
from sparsegen.ir.expr import Expr
from sparsegen.ir.node import Node
from sparsegen.ir.program import Program

SHORT = 40
"""Characters of a count that is written out wherever it occurs."""


class NamedCounts(Costing):
    """Cost a program over names for the counts whose formulas are long.

    Args:
        program: whose values are costed.
        sizes: of all letters; the names join them, so that formulas have values.
        itemsize, default: as for `Costing`.
    """

    def __init__(self, program: Program, sizes: Mapping[str, int], **itemsizes: Any) -> None:
        super().__init__(program, sizes, **itemsizes)
        self.sizes: dict[str, int] = dict(sizes)
        self._names: dict[Sympy, str] = {}
        self._formulas: dict[Sympy, str] = {}

    def keys(self, where: Expr, q: Node, k: Node) -> Keys:
        """Return the counts of `counted`, long ones as their names."""
        found = self.counted(where, q, k)
        return replace(
            found,
            total=self._named(found.total, "pairs"),
            distinct=self._named(found.distinct, "keys"),
        )

    def counted(self, where: Expr, q: Node, k: Node) -> Keys:
        """Return the keys of `k` that the queries of `q` see, as formulas over letters."""
        return super().keys(where, q, k)

    def name(self, count: Sympy) -> str:
        """Return the name of a count; "" for one that is written out."""
        return self._names.get(count, "")

    def formula(self, expr: Sympy) -> str:
        """Return an expression as text."""
        if expr not in self._formulas:
            self._formulas[expr] = readable(expr, self.program.query, self.program.key)
        return self._formulas[expr]

    def _named(self, count: Sympy, what: str) -> Sympy:
        if count not in self._names:
            if len(self.formula(count)) <= SHORT:
                return count
            ordinal = 1 + sum(name.startswith(what) for name in self._names.values())
            self._names[count] = f"{what}_{ordinal}"
            self.sizes[self._names[count]] = int(value(count, self.sizes))
        return letter(self._names[count])
