"""See a task as part of its pattern: where its buffers come from, what the oracle makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsegen.ir.axes import Entries, extent
from sparsegen.ir.expr import Const, Expr, Pos, Stop, Symbol, walk
from sparsegen.ir.node import Node
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.resolve import sizes_of
from sparsegen.lowering.tasks import Buffer, SelectTask, Task
from sparsegen.oracle.run import Run
from sparsegen.patterns import random_inputs
from sparsegen.primitives import Attend, Compress, Merge, Project, Select
from sparsegen.primitives.select import Selection, follows_query
from sparsegen.tuning.packing import Array, Sequences, rounded, shape_of

DISTINCT = 4194301
"""Numbers drawn for a large tensor; a prime, so that no two of its rows are the same."""
_TASKS = (Project, Compress, Select, Attend, Merge)
_EXACT_OPS = frozenset({"relu", "abs", "min", "max", "neg", "add", "sub", "mul", "where"})


@dataclass(frozen=True)
class Span:
    """Query rows [start, stop) of sequence `b`, and its offset and lengths."""

    b: int
    start: int
    stop: int
    offset: int
    keys: int


class Subject:
    """A task of a plan together with the oracle's view of it."""

    def __init__(self, plan: Plan, task: Task) -> None:
        self.plan, self.task, self.program = plan, task, plan.program
        nodes = [n for n in self.program.nodes if isinstance(n, _TASKS)]
        assert [n.op for n in nodes] == [t.family for t in plan.tasks], "one task for each node"
        self.made: dict[str, tuple[Node, str]] = {}
        """Buffers that tasks write: the node, and which of its results."""
        for node, owner in zip(nodes, plan.tasks, strict=True):
            for buffer in owner.writes:
                what = "indices" if isinstance(node, Select) else "o"
                self.made[buffer.name] = (
                    node,
                    ("lse" if buffer == getattr(owner, "lse", None) else what),
                )
        self.sizes = sizes_of(self.program, dict(plan.binding.sizes))
        self.widths = dict(plan.widths)

    @property
    def shared(self) -> bool:
        """Tell whether queries and keys are one axis."""
        return self.program.query == self.program.key

    def is_input(self, buffer: Buffer) -> bool:
        """Tell whether the caller hands a buffer in."""
        return buffer.name not in self.made

    def rounds(self) -> bool:
        """Tell whether what is attended to comes in float32 from tasks of a plan for 16 bits."""
        if self.task.family != "attend":
            return False
        made = (b.dtype for b in self.task.reads if not self.is_input(b))
        return self.plan.binding.dtype != "float32" and "float32" in made

    # --- drawing --------------------------------------------------------------------------------

    def large(self, sequences: Sequences, seed: int) -> list[dict[str, Array]]:
        """Draw the inputs that the task reads as float32, of few distinct numbers; others are 0."""
        buffers = {node.name: buffer for node, buffer in self.plan.inputs}
        read = {buffer.name for buffer in self.task.reads}
        made: list[dict[str, Array]] = []
        for b in range(len(sequences)):
            lengths = self._letters(b, sequences)
            drawn = random_inputs(
                self.program, {**self.sizes, **lengths}, seed + 1000 * b, distinct=DISTINCT,
                only=read,
            )  # fmt: skip
            weights = made[0] if made else {}
            known = {n: x for n, x in weights.items() if buffers[n].rows.space == "none"}
            for name, x in drawn.items():
                if name not in read:
                    known[name] = np.broadcast_to(np.zeros(()), x.shape)
                elif name not in known:
                    known[name] = x if x.dtype == np.int32 else tiled(x, buffers[name].dtype)
            made.append(known)
        return made

    def inputs(self, sequences: Sequences, seed: int, *, grid: bool) -> list[dict[str, Array]]:
        """Draw the inputs of every sequence, rounded to their dtypes; weights are the same for all.

        `grid` draws multiples of 1/4, whose sums and products are exact in float32.
        """
        buffers = {node.name: buffer for node, buffer in self.plan.inputs}
        rng = np.random.default_rng(seed)
        made: list[dict[str, Array]] = []
        for b in range(len(sequences)):
            lengths = self._letters(b, sequences)
            drawn = {**random_inputs(self.program, {**self.sizes, **lengths}, seed + 1000 * b)}
            for name, x in drawn.items():
                if buffers[name].rows.space == "none" and made:
                    drawn[name] = made[0][name]
                elif grid and x.dtype != np.int32:
                    drawn[name] = (rng.integers(-8, 9, x.shape) / 4).astype(np.float32)
            made.append({n: rounded(x, buffers[n].dtype) for n, x in drawn.items()})
        return made

    def _letters(self, b: int, sequences: Sequences) -> dict[str, int]:
        return {self.program.key: sequences.keys[b], self.program.query: sequences.queries[b]}

    def is_exact(self) -> bool:
        """Tell whether scores over a grid are exact, so that ties are ties in the kernel too."""
        task = self.task
        if not isinstance(task, SelectTask) or task.norm or task.top_p is not None:
            return False
        ops = {getattr(e, "op", "") for x in (task.mod, task.act) if x is not None for e in walk(x)}
        return (
            ops <= _EXACT_OPS | {""}
            and all(s.how in ("sum", "max") and not s.norm for s in task.stages)
            and all(self.is_input(b) for b in task.reads)
            and math.frexp(task.scale)[0] == 0.5
        )

    def reach(self) -> int:
        """Return a number of keys beyond most widths, windows and budgets of the pattern."""
        axes = [a for node in self.program.nodes for a in node.axes]
        numbers = [1, *(a.width for a in axes if isinstance(a, Entries))]
        numbers += [int(e.value) for e in self._expressions() if isinstance(e, Const)]
        return min(2600, max(150, max(n for n in numbers if n <= 4096) * 5 // 4 + 37))

    def knows_end(self) -> bool:
        """Tell whether some expression mentions where the queries end."""
        return any(isinstance(e, Stop) and e.role == "query" for e in self._expressions())

    def _expressions(self) -> Iterator[Expr]:
        for node in self.program.nodes:
            found = [getattr(node, name, None) for name in ("where", "topk", "force", "mod", "act")]
            for expr in (*found, *(s.where for s in getattr(node, "sources", ()))):
                if expr is not None:
                    yield from walk(expr)

    def align(self) -> int:
        """Return what query offsets must be a multiple of, for compressed and blocked queries."""
        found = [1]
        for buffer in (b for t in self.plan.tasks for b in (*t.reads, *t.writes)):
            rows = buffer.rows
            if rows.space == "query_block":
                found.append(rows.block)
            elif rows.space == "entry" and rows.role == "query" and rows.entries is not None:
                found.append(rows.entries.stride)
        return math.lcm(*found)

    # --- shapes ---------------------------------------------------------------------------------

    def count(self, buffer: Buffer, b: int, sequences: Sequences) -> int:
        """Return how many rows a sequence has in a buffer."""
        rows, lengths = buffer.rows, {"query": sequences.queries[b], "key": sequences.keys[b]}
        match rows.space:
            case "query" | "key":
                return lengths[rows.space]
            case "entry":
                assert rows.entries is not None
                return rows.entries.count(lengths[rows.role])
            case "query_block":
                first = sequences.offsets[b]
                if lengths["query"] == 0:
                    return 0
                return (first + lengths["query"] - 1) // rows.block - first // rows.block + 1
            case _:
                return 1

    def width(self, buffer: Buffer, sequences: Sequences) -> int:
        """Return the last extent of a buffer, also where it is known at call time only."""
        if not buffer.shape or buffer.shape[-1] != -1:
            return buffer.shape[-1] if buffer.shape else 0
        ends = [self.lengths(b, sequences) for b in range(len(sequences))]
        return max(int(run.env(self.widths[buffer.name])) for run in ends)

    def scratch(self, buffer: Buffer, capacity: Expr, sequences: Sequences) -> tuple[int, ...]:
        """Return the shape of memory that a schedule takes; `capacity` is its extent -1."""
        ends = [self.lengths(b, sequences) for b in range(len(sequences))]
        return shape_of(buffer, sequences, max(int(run.env(capacity)) for run in ends))

    def lengths(self, b: int, sequences: Sequences) -> Run:
        """Return an oracle for expressions over lengths and positions; its tensors are zeros."""
        sizes = {**self.sizes, **self._letters(b, sequences)}
        zeros = {
            n.name: np.broadcast_to(np.zeros(()), tuple(extent(a, sizes) for a in n.axes))
            for n in self.program.inputs
        }
        return Run(self.program, zeros, sequences.offsets[b], self.plan.binding.scale)

    # --- values ---------------------------------------------------------------------------------

    def oracle(self, arrays: Mapping[str, Array], offset: int) -> Run:
        """Return the oracle for one sequence."""
        return Run(self.program, dict(arrays), offset, self.plan.binding.scale)

    def value(self, run: Run, buffer: Buffer) -> Array:
        """Return what a buffer holds for one sequence, [rows, ...]."""
        if self.is_input(buffer):
            return run.arrays[buffer.name]
        node, what = self.made[buffer.name]
        if what == "indices":
            found = run.selection(node).indices
            return found[None] if buffer.rows.space == "batch" else found
        value = run.value(node)
        return run.lses[node] if what == "lse" else value

    def part(self, made: Mapping[str, Array], span: Span) -> Run:
        """Return the oracle for some query rows, with the values of other tasks given."""
        arrays = {n.name: self._cut(b, made[b.name], span) for n, b in self.plan.inputs}
        run = self.oracle(arrays, span.offset + span.start)
        for buffer in self.task.reads:
            if self.is_input(buffer):
                continue
            node, what = self.made[buffer.name]
            value = self._cut(buffer, made[buffer.name], span)
            if what == "lse":
                run.lses[node] = value
            elif what == "o":
                run.values[node] = value
            else:
                assert isinstance(node, Select)
                run.selections[node] = self._selection(node, value, run)
        return run

    def _cut(self, buffer: Buffer, value: Array, span: Span) -> Array:
        rows = buffer.rows
        start, stop = span.start, span.stop
        if rows.space == "entry" and rows.role == "query" and rows.entries is not None:
            start, stop = start // rows.entries.stride, -(-stop // rows.entries.stride)
        elif rows.space == "query_block":
            base = span.offset // rows.block
            start = (span.offset + start) // rows.block - base
            stop = (span.offset + stop - 1) // rows.block - base + 1
        elif rows.space != "query":
            return _exact(value)
        return _exact(value[start:stop])

    def _selection(self, node: Select, indices: Array, run: Run) -> Selection:
        rows = next((n for n, key in enumerate(node.keys[:-1]) if follows_query(key)), None)
        order = tuple(range(len(node.keys) - 1))
        first = [0] * len(order)
        if rows is None:
            indices = indices[0]
        else:
            order = (rows, *(n for n in order if n != rows))
            key = node.keys[rows]
            position = next(e for e in walk(key) if isinstance(e, Pos))
            start = run.positions("query", position.axis)[:1]
            first[0] = int(run.env.bind({position: start})(key)[0])
        return Selection(indices, tuple(first), order, int(run.env(self.maker(node).last)))

    def maker(self, node: Node) -> SelectTask:
        """Return the task that makes a selection."""
        for task in self.plan.tasks:
            if isinstance(task, SelectTask) and self.made[task.out.name][0] == node:
                return task
        raise AssertionError("a selection has a task")

    # --- eligible keys --------------------------------------------------------------------------

    def eligible(self, select: SelectTask, b: int, sequences: Sequences) -> tuple[Array, ...]:
        """Return for each list of a sequence: first key, end of keys, and how many are selected.

        Where scores decide how many (top-p, thresholds), an eighth is taken.
        """
        run = self.lengths(b, sequences)
        first, end = sequences.offsets[b], sequences.offsets[b] + sequences.queries[b]
        rows, count = select.out.rows, self.count(select.out, b, sequences)
        block = rows.block if rows.space == "query_block" else 1
        i = np.minimum((first // block + np.arange(count) + 1) * block - 1, end - 1)
        if rows.space == "batch":
            i = np.array([end - 1])
        low, high = self._keys(select, run, *self._span(select, run, i), i)
        many = np.minimum(high - low, (high - low) // 8 + 1)
        if select.topk is not None:
            queries = _positions(select.keys, "query", i)
            budget = np.broadcast_to(run.env.bind(queries)(select.topk), i.shape)
            open_ended = select.top_p is not None or select.threshold is not None
            many = np.minimum(many, budget) if open_ended else budget
        return low, high, many

    def _span(self, select: SelectTask, run: Run, i: Array) -> tuple[Array, Array]:
        """Return the positions [low, high) of scores that queries at `i` may see."""
        at = run.env.bind({Symbol("i_min"): i, Symbol("i_max"): i})
        low, high = np.full(i.shape, np.iinfo(np.int64).max), np.zeros(i.shape, np.int64)
        for clause in select.clauses:
            least = np.max([np.broadcast_to(at(e), i.shape) for e in clause.hull.lo], axis=0)
            most = np.min([np.broadcast_to(at(e), i.shape) for e in clause.hull.hi], axis=0)
            low = np.where(least < most, np.minimum(low, least), low)
            high = np.where(least < most, np.maximum(high, most), high)
        return np.where(low < high, low, 0), np.where(low < high, high, 0)

    def _keys(
        self, select: SelectTask, run: Run, low: Array, high: Array, i: Array
    ) -> tuple[Array, Array]:
        """Return the values [first, end) that the selected key takes over those positions."""
        key, capacity = select.keys[-1], int(run.env(select.last))
        axes = [e.axis for e in walk(key) if isinstance(e, Pos) and e.role == "key"]
        if not axes:  # blocks of overlapping entries; each ends where the next but one begins
            share = high / max(1, int(np.max(high)))
            return np.zeros_like(low), np.ceil(share * capacity).astype(np.int64)
        queries = _positions([key], "query", i)
        ends = [run.env.bind({**queries, Pos("key", axes[0]): x})(key) for x in (low, high - 1)]
        first, last = np.minimum(*ends), np.maximum(*ends)
        some = low < high
        return (
            np.where(some, np.maximum(first, 0), 0),
            np.where(some, np.minimum(last + 1, capacity), 0),
        )


def tiled(values: Array, dtype: str) -> Array:
    """Return `values`, which repeat after DISTINCT numbers, rounded to a dtype, as float32."""
    rounded_once = rounded(values.reshape(-1)[:DISTINCT], dtype).astype(np.float32)
    return np.resize(rounded_once, values.shape)


def _exact(values: Array) -> Array:
    return values.astype(np.float64) if values.dtype == np.float32 else values


def _positions(keys: Sequence[Expr], role: str, at: Array) -> dict[Expr, Array]:
    return {e: at for k in keys for e in walk(k) if isinstance(e, Pos) and e.role == role}
