"""Say which ranges of keys integer tables narrow, and what must be known of the tables for it.

Comparisons of positions become bounds of ranges before a kernel exists. What a table says, the
document of a query or where its keys start, is known when the kernel runs: from the least and the
greatest entry at the queries of a tile and at 64 keys follows whether some of these pairs may be
visible, and whether all must be.
"""

from __future__ import annotations

from sparsegen.analysis.extremes import Ends, truth
from sparsegen.ir.axes import Named
from sparsegen.ir.expr import TRUE, Expr, Pos, Symbol, Table, walk
from sparsegen.lowering.tasks import AttendTask, Clause, KeySource

KEYS = 64  # that are asked of at once


def narrowed(task: AttendTask) -> list[tuple[int, KeySource, Clause]]:
    """Return the ranges that tables narrow, with the number of each among all clauses."""
    clauses = [(s, c) for s in task.sources for c in s.clauses]
    return [(n, s, c) for n, (s, c) in enumerate(clauses) if narrows(s, c)]


def narrows(source: KeySource, clause: Clause) -> bool:
    """Tell whether tables narrow a range."""
    if clause.keys is not None or source.k.rows.space != "key":
        return False
    return bool(tables_of([clause])) and seen(clause)[0] != TRUE


def seen(clause: Clause) -> tuple[Expr, Expr]:
    """Return whether a tile may see some of 64 keys, and must see all, over the names of ends."""
    return truth(clause.residual, ends_of)


def tables_of(clauses: list[Clause]) -> list[Table]:
    """Return the tables that are read at the position of a query or of a key."""
    found = [e for c in clauses for e in walk(c.residual) if isinstance(e, Table)]
    return [e for e in dict.fromkeys(found) if ends_of(e) is not None]


def at_keys(tables: list[Table]) -> list[Table]:
    """Return those that are read at keys."""
    return [t for t in tables if isinstance(t.index[0], Pos) and t.index[0].role == "key"]


def ends_of(expr: Expr) -> Ends | None:
    """Name the ends of what has some at a tile and 64 keys."""
    match expr:
        case Pos("query", Named()):
            return Ends(Symbol("i_min"), Symbol("i_max"))
        case Pos("key", Named()):
            return Ends(Symbol("j_min"), Symbol("j_max"))
        case Table(tensor=tensor, index=(Pos(role, Named()),)) if tensor.kind == "int":
            return Ends(*(Symbol(f"{end} {tensor.name} of {role}") for end in ("least", "most")))
    return None


def names_of(table: Table) -> tuple[str, str]:
    """Return the names of the least and the greatest entry of a table."""
    ends = ends_of(table)
    assert ends is not None
    assert isinstance(ends.lo, Symbol)
    assert isinstance(ends.hi, Symbol)
    return ends.lo.name, ends.hi.name
