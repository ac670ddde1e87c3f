"""Partition a bound program into tasks: which nodes share a kernel, which values become buffers.

attend(cat(project(q), r), cat(c, k), slice(c))  ->  project; attend over parts read in place
select(reduce(score(q, k)))                      ->  one select task; scores are never stored
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from sparsegen.analysis.domain import clauses
from sparsegen.errors import BindingError, UnsupportedError
from sparsegen.ir.axes import Entries, Named, extent
from sparsegen.ir.expr import Const, Expr, Member, Symbol, Table, rebuild, walk
from sparsegen.ir.node import Input, Map, Node, Slice
from sparsegen.ir.program import Program
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.plan import Plan, Result
from sparsegen.lowering.resolve import base_letter, resolved, sizes_of
from sparsegen.lowering.selection import capacity, group_extents, list_rows
from sparsegen.lowering.tasks import (
    AttendTask,
    Buffer,
    CompressTask,
    KeySource,
    Lists,
    MergeTask,
    Operand,
    Part,
    ProjectTask,
    Rows,
    SelectTask,
    Stage,
    Task,
)
from sparsegen.primitives import Attend, Cat, Compress, Merge, Project, Reduce, Score, Select

Role = Literal["query", "key"]


def partition(program: Program, binding: Binding, *, intermediate: str = "float32") -> Plan:
    """Return the tasks of a bound program, in order.

    Args:
        intermediate: dtype of the values between tasks.

    Raises:
        BindingError: sizes are missing or do not fit.
        UnsupportedError: a value would have to be stored that never is.
    """
    return _Partitioner(program, binding, intermediate).plan()


class _Partitioner:
    def __init__(self, program: Program, binding: Binding, intermediate: str) -> None:
        self.program = program
        self.binding = binding
        self.sizes = sizes_of(program, dict(binding.sizes))
        self.intermediate = intermediate
        self.returned = {(o.node, o.what) for o in program.outputs}
        self.tasks: list[Task] = []
        self.made: dict[tuple[Node, str], Buffer] = {}
        self.widths: dict[str, Expr] = {}
        self.counts: dict[str, int] = {}
        paged = binding.layout == "paged"
        if paged and binding.page_size < 1:
            raise BindingError("the paged layout needs a page size", hint="pass page_size=64")
        if paged and program.query == program.key:
            raise BindingError(
                f"{program.name} has queries and keys on one axis [{program.key}], "
                "which cannot be paged",
                hint="give the keys a letter of their own",
            )
        self.key_rows = Rows(space="key", paged=paged, page=binding.page_size)

    def plan(self) -> Plan:
        """Lower every node that becomes a kernel, operands first."""
        for node in self.program.nodes:
            lower = {
                Project: self._project,
                Compress: self._compress,
                Select: self._select,
                Attend: self._attend,
                Merge: self._merge,
            }.get(type(node))
            if lower is not None:
                lower(node)  # type: ignore[operator]
        results = tuple(
            Result(buffer=self.made[o.node, o.what], what=o.what) for o in self.program.outputs
        )
        inputs = tuple((n, self._input(n, None)) for n in self.program.inputs)
        outside = {b.name for _, b in inputs} | {r.buffer.name for r in results}
        between = {b.name: b for t in self.tasks for b in t.writes if b.name not in outside}
        return Plan(
            program=self.program,
            binding=self.binding,
            inputs=inputs,
            intermediates=tuple(between.values()),
            results=results,
            tasks=tuple(self.tasks),
            widths=tuple(self.widths.items()),
        )

    # --- values ---------------------------------------------------------------------------------

    def _role(self, node: Node) -> Role:
        return "query" if base_letter(node.axes[0]) == self.program.query else "key"

    def _rows(self, node: Node, role: Role) -> Rows:
        axis = node.axes[0]
        if isinstance(axis, Entries):
            return Rows(space="entry", entries=axis, role=role)
        if axis == Named(self.program.query) and role == "query":
            return Rows(space="query")
        return self.key_rows if isinstance(node, Input) else Rows(space="key")

    def _input(self, node: Input, role: Role | None) -> Buffer:
        first = base_letter(node.axes[0])
        dtype = "int32" if node.kind == "int" else self.binding.dtype_of(node.name)
        if first not in (self.program.query, self.program.key):
            shape = tuple(extent(a, self.sizes) for a in node.axes)
            return Buffer(name=node.name, dtype=dtype, shape=shape)
        shape = tuple(extent(a, self.sizes) for a in node.axes[1:])
        rows = self._rows(node, role or self._role(node))
        return Buffer(name=node.name, dtype=dtype, shape=shape, rows=rows)

    def _buffer(self, node: Node, role: Role | None = None) -> Buffer:
        if isinstance(node, Input):
            return self._input(node, role)
        if (node, "o") not in self.made:
            raise UnsupportedError(
                f"the result of {node.op}() would have to be stored here, but it is never",
                at=node.site,
                hint="use it directly as a query, key or value of attend() or score()",
            )
        return self.made[node, "o"]

    def _operand(self, node: Node, role: Role) -> Operand:
        parts = tuple(self._parts(node, role))
        return Operand(
            parts=parts, heads=extent(node.axes[1], self.sizes), rows=self._rows(_leaf(node), role)
        )

    def _parts(self, node: Node, role: Role) -> Iterable[Part]:
        match node:
            case Cat(parts=nodes):
                for n in nodes:
                    yield from self._parts(n, role)
            case Map(x=x, fn=fn):
                for part in self._parts(x, role):
                    inner = part.fn
                    whole = fn if inner is None else _compose(fn, inner)
                    yield Part(buffer=part.buffer, start=part.start, size=part.size, fn=whole)
            case Slice(x=x, start=start, stop=stop):
                at = 0
                for part in self._parts(x, role):
                    lo, hi = max(start, at), min(stop, at + part.size)
                    if lo < hi:
                        first = part.start + lo - at
                        yield Part(buffer=part.buffer, start=first, size=hi - lo, fn=part.fn)
                    at += part.size
            case _:
                size = extent(node.axes[-1], self.sizes)
                yield Part(buffer=self._buffer(node, role), start=0, size=size)

    def _name(self, family: str) -> str:
        self.counts[family] = self.counts.get(family, 0) + 1
        return f"{family}_{self.counts[family]}"

    def _new(self, node: Node, what: str, name: str, shape: tuple[int, ...], rows: Rows) -> Buffer:
        out = (node, what) in self.returned
        dtype = self.binding.dtype if out and what == "o" else self.intermediate
        if what in ("lse", "indices"):
            dtype = "float32" if what == "lse" else "int32"
        buffer = Buffer(name=name, dtype=dtype, shape=shape, rows=rows)
        self.made[node, what] = buffer
        return buffer

    def _add(
        self, cls: type[Task], node: Node, name: str, exprs: Iterable[Expr], **kw: object
    ) -> None:
        """Append a task; its reads are every buffer it mentions, each once, in order of mention."""
        tables, lists = self._mentions(exprs)
        task = cls(
            name=name, family=cls.__name__.removesuffix("Task").lower(), reads=(), writes=(),
            tables=tables, lists=lists, paged=self.binding.layout == "paged", site=node.site, **kw,
        )  # fmt: skip
        writes = _unique(
            _buffers(getattr(task, f)) for f in ("out", "o", "lse") if hasattr(task, f)
        )
        outs = {b.name for b in writes}
        reads = _unique(
            _buffers(getattr(task, f))
            for f in task.__dataclass_fields__
            if f not in ("reads", "writes", "site")
        )
        object.__setattr__(task, "writes", writes)
        object.__setattr__(task, "reads", tuple(b for b in reads if b.name not in outs))
        self.tasks.append(task)

    # --- expressions ----------------------------------------------------------------------------

    def _mentions(
        self, exprs: Iterable[Expr]
    ) -> tuple[tuple[tuple[str, Buffer], ...], tuple[tuple[Expr, Lists], ...]]:
        tables: dict[str, Buffer] = {}
        lists: dict[Expr, Lists] = {}
        for expr in exprs:
            for leaf in walk(expr):
                if isinstance(leaf, Table):
                    tables[leaf.tensor.name] = self._input(leaf.tensor, None)
                elif isinstance(leaf, Member):
                    lists[leaf] = self._lists(leaf.selection)
        return tuple(tables.items()), tuple(lists.items())

    def _lists(self, node: Node) -> Lists:
        assert isinstance(node, Select)
        keys = tuple(resolved(k, self.sizes) for k in node.keys[:-1])
        groups = group_extents(keys, self.sizes, node)
        return Lists(buffer=self.made[node, "indices"], keys=keys, groups=groups)

    def _scale(self, scale: float | None, q: Node) -> float:
        if scale is not None:
            return scale
        if self.binding.scale is not None:
            return self.binding.scale
        return 1.0 / math.sqrt(extent(q.axes[-1], self.sizes))

    def _optional(self, expr: Expr | None) -> Expr | None:
        return None if expr is None else resolved(expr, self.sizes)

    # --- verbs ----------------------------------------------------------------------------------

    def _project(self, node: Project) -> None:
        name = self._name("project")
        role = self._role(node)
        heads, dim = (extent(a, self.sizes) for a in node.axes[1:])
        rows = self._rows(node, role)
        out = self._new(node, "o", f"{name}_out", (heads, dim), rows)
        self._add(
            ProjectTask, node, name, (), x=self._operand(node.x, role), w=self._buffer(node.w),
            transposed=node.transposed, out=out,
        )  # fmt: skip

    def _compress(self, node: Compress) -> None:
        name = self._name("compress")
        role = self._role(node)
        heads, dim = (extent(a, self.sizes) for a in node.axes[1:])
        rows = Rows(space="entry", entries=node.entries, role=role)
        out = self._new(node, "o", f"{name}_out", (heads, dim), rows)
        previous = node.previous
        self._add(
            CompressTask, node, name, (), x=self._operand(node.x, role), how=node.how,
            entries=node.entries, role=role,
            weight=None if node.weight is None else self._buffer(node.weight),
            gate=None if node.gate is None else self._operand(node.gate, role),
            bias=None if node.bias is None else self._buffer(node.bias),
            previous=None if previous is None else (
                self._operand(previous[0], role), self._operand(previous[1], role)
            ),
            out=out,
        )  # fmt: skip

    def _select(self, node: Select) -> None:
        name = self._name("select")
        stages: list[Stage] = []
        x: Score | Reduce = node.x
        while isinstance(x, Reduce):
            keys = tuple(resolved(k, self.sizes) for k in x.keys)
            stages.insert(0, Stage(how=x.how, keys=keys, norm=x.norm is not None))
            x = x.x
        where = resolved(x.where, self.sizes)
        mod, act = self._optional(x.mod), self._optional(x.act)
        topk, force = self._optional(node.topk), self._optional(node.force)
        keys = tuple(resolved(k, self.sizes) for k in node.keys)
        last = capacity(keys[-1], node)
        width = topk.value if isinstance(topk, Const) else -1
        groups = group_extents(keys[:-1], self.sizes, node)
        rows = list_rows(keys[:-1], node)
        out = self._new(node, "indices", f"{name}_indices", (*groups, int(width)), rows)
        if width == -1:
            self.widths[out.name] = last
        self._add(
            SelectTask, node, name, [e for e in (where, mod, act, topk, force) if e is not None],
            q=self._operand(x.q, "query"), k=self._operand(x.k, "key"),
            scale=self._scale(x.scale, x.q), mod=mod, act=act,
            weights=None if x.weights is None else self._buffer(x.weights, "query"),
            where=where, clauses=clauses(where, query=x.q.axes[0], key=x.k.axes[0]),
            norm=x.norm is not None, stages=tuple(stages),
            keys=keys, groups=groups, last=last, topk=topk, top_p=node.top_p,
            threshold=node.threshold, force=force, out=out,
        )  # fmt: skip

    def _attend(self, node: Attend) -> None:
        name = self._name("attend")
        sources, exprs = [], []
        for source in node.sources:
            where = resolved(source.where, self.sizes)
            exprs.append(where)
            sources.append(
                KeySource(
                    k=self._operand(source.k, "key"), v=self._operand(source.v, "key"),
                    where=where,
                    clauses=clauses(where, query=node.q.axes[0], key=source.k.axes[0]),
                )
            )  # fmt: skip
        mod = self._optional(node.mod)
        if mod is not None:
            exprs.append(mod)
        heads, dim = (extent(a, self.sizes) for a in node.axes[1:])
        rows = self._rows(_leaf(node.q), "query")
        if rows.space != "query":
            raise UnsupportedError(
                "attend() takes queries of the query axis, not compressed ones", at=node.site
            )
        o = self._new(node, "o", f"{name}_o", (heads, dim), rows)
        merged = any(
            isinstance(n, Merge) and n.gates is None and node in n.parts for n in self.program.nodes
        )
        lse = None
        if merged or (node, "lse") in self.returned:
            lse = self._new(node, "lse", f"{name}_lse", (heads,), rows)
        self._add(
            AttendTask, node, name, exprs, q=self._operand(node.q, "query"),
            sources=tuple(sources), scale=self._scale(node.scale, node.q), mod=mod,
            sink=None if node.sink is None else self._buffer(node.sink), o=o, lse=lse,
        )  # fmt: skip

    def _merge(self, node: Merge) -> None:
        name = self._name("merge")
        heads, dim = (extent(a, self.sizes) for a in node.axes[1:])
        rows = Rows(space="query")
        o = self._new(node, "o", f"{name}_o", (heads, dim), rows)
        lse = None
        if (node, "lse") in self.returned:
            lse = self._new(node, "lse", f"{name}_lse", (heads,), rows)
        self._add(
            MergeTask, node, name, (), parts=tuple(self._buffer(p) for p in node.parts),
            lses=() if node.gates is not None else tuple(self.made[p, "lse"] for p in node.parts),
            gates=None if node.gates is None else self._buffer(node.gates, "query"), o=o, lse=lse,
        )  # fmt: skip


def _leaf(node: Node) -> Node:
    """Return the value whose rows a view reads."""
    while isinstance(node, Cat | Slice | Map):
        node = node.parts[0] if isinstance(node, Cat) else node.x
    return node


def _compose(outer: Expr, inner: Expr) -> Expr:
    return rebuild(outer, lambda e: inner if e == Symbol("x") else None)


def _buffers(value: object) -> list[Buffer]:
    """Return the buffers in a field of a task, in order of mention."""
    if isinstance(value, Buffer):
        return [value]
    if isinstance(value, tuple):
        return [b for item in value for b in _buffers(item)]
    if isinstance(value, Operand | Part | KeySource | Lists):
        return [b for f in value.__dataclass_fields__ for b in _buffers(getattr(value, f))]
    return []


def _unique(groups: Iterable[list[Buffer]]) -> tuple[Buffer, ...]:
    found: dict[str, Buffer] = {}
    for group in groups:
        for buffer in group:
            found.setdefault(buffer.name, buffer)
    return tuple(found.values())
