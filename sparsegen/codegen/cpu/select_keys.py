"""List the keys that one query token sees, clause by clause."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparsegen.codegen.cpu.lists import TokenLists
from sparsegen.codegen.cpu.rows import Arguments
from sparsegen.codegen.cpu.select_task import Item
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    const,
    maximum,
    minimum,
    store,
)
from sparsegen.ir.expr import (
    TRUE,
)
from sparsegen.lowering.tasks import Clause, SelectTask


@dataclass(frozen=True)
class Visible:
    """The keys of a select task that a token may score."""

    task: SelectTask
    arguments: Arguments

    def positions(self, item: Item, i: Value, env: Env, positions: Memory) -> Value:
        """List the visible keys of a token, each once; return their number (int32)."""
        count = cell("int32", const(0, "int32"))
        for clause in self.task.clauses:
            bounds = replace(env, symbols={"i_min": i, "i_max": i})
            lo = const(0, "int32")
            for e in clause.hull.lo:
                lo = maximum(lo, emit(e, bounds))
            hi = item.sequence.count(self.task.k.rows)
            for e in clause.hull.hi:
                hi = minimum(hi, emit(e, bounds))
            lo, hi = T.bind(get(cell("int32", lo))), T.bind(get(cell("int32", hi)))
            if clause.keys is None:
                self._range(clause, env, lo, hi, positions, count)
            else:
                self._driven(clause, item, i, env, lo, hi, positions, count)
        return T.bind(get(count))

    def _range(
        self, clause: Clause, env: Env, lo: Value, hi: Value, positions: Memory, count: Memory
    ) -> None:
        with T.serial(maximum(hi - lo, const(0, "int32"))) as n:
            j = T.bind(lo + n)
            self._append(clause, env, j, positions, count)

    def _driven(
        self, clause: Clause, item: Item, i: Value, env: Env, lo: Value, hi: Value,
        positions: Memory, count: Memory,
    ) -> None:  # fmt: skip
        keys = clause.keys
        assert keys is not None
        found = TokenLists.find(
            keys.member, dict(self.task.lists)[keys.member], self.arguments, item.sequence, env,
            i, 1, const(1, "int32"),
        )  # fmt: skip
        with T.serial(found.width) as slot:
            x = T.bind(found.item(const(0, "int32"), slot))
            with T.If(x >= 0), T.Then():
                start = i - x if keys.slash else x * keys.granule - keys.shift
                first = T.bind(maximum(start, lo))
                stop = T.bind(minimum(start + (1 if keys.slash else keys.granule), hi))
                with T.serial(maximum(stop - first, const(0, "int32"))) as n:
                    self._append(clause, env, T.bind(first + n), positions, count)

    def _append(self, clause: Clause, env: Env, j: Value, positions: Memory, count: Memory) -> None:
        def append() -> None:
            store(positions, j, get(count))
            put(count, get(count) + 1)

        if clause.residual == TRUE:
            append()
            return
        with T.If(emit(clause.residual, replace(env, key=j))), T.Then():
            append()
