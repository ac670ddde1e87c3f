"""Say what expressions mean at a tile of a GPU kernel: scalars of one thread."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sparsegen.codegen.cpu.lists import TokenLists
from sparsegen.codegen.cpu.rows import Arguments, Sequence
from sparsegen.codegen.cpu.view import View
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.gpu.launch import FUNCTIONS
from sparsegen.codegen.tvm import T, Value, cast, const, dtype_of
from sparsegen.ir.expr import Expr, Member
from sparsegen.lowering.tasks import Task


class ThreadView(View):
    """The leaves of expressions at the tile of a block."""

    def __init__(
        self, task: Task, arguments: Arguments, sequence: Sequence, i_min: Value, present: Value
    ) -> None:
        one: Any = SimpleNamespace(tile=SimpleNamespace(tokens=1))
        super().__init__(
            arguments, dict(task.tables), dict(task.lists), sequence, one,
            head=const(0, "int32"), i_min=i_min, present=present, hidden=0.0,
        )  # fmt: skip

    def _env(self, **leaves: Value) -> Env:
        return Env(symbols=self.symbols, table=self._table, functions=FUNCTIONS, **leaves)

    def at(self, query: Value, head: Value, key: Value) -> Env:
        """Return the leaves at one pair of a query head and a key."""
        symbols = dict(self.symbols)

        def member(e: Member, keys: tuple[Value, ...]) -> Value:
            return self.list_of(e, query, head).holds(T.bind(keys[-1]))

        return Env(
            symbols=symbols, table=self._table, functions=FUNCTIONS, member=member,
            query=query, head=head, key=key,
        )  # fmt: skip

    def value(
        self, expr: Expr, query: Value, head: Value, key: Value,
        found: dict[Expr, Value] | None = None, **symbols: Value,
    ) -> Value:  # fmt: skip
        """Return an expression at one pair.

        Args:
            found: parts of it whose values are known.
            symbols: what it may mention beside.
        """
        closed = self._closed(expr, found or {})
        self.symbols.update(symbols)
        return T.bind(emit(closed, self.at(query, head, key)))

    def number(self, expr: Expr, query: Value, head: Value, key: Value, score: Value) -> Value:
        """Return an expression of a score as float32."""
        found = self.value(expr, query, head, key, s=score)
        return found if dtype_of(found) == "float32" else T.bind(cast(found, "float32"))

    def list_of(self, member: Member, query: Value, head: Value) -> TokenLists:
        """Return the list that a query head reads."""
        return TokenLists.find(
            member, self.lists[member], self.arguments, self.sequence, self._env(head=head),
            query, 1, const(1, "int32"),
        )  # fmt: skip
