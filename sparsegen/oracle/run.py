"""Evaluate a program over one sequence, a chunk of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparsegen.errors import InputError
from sparsegen.ir.axes import Axis, Concat, Entries, Fixed, Named, extent
from sparsegen.ir.expr import Expr, Head, Member, Pos, Role, Symbol
from sparsegen.ir.node import Input, Map, Node, Output, Slice
from sparsegen.ir.program import Program
from sparsegen.primitives._evaluate import Array, Env
from sparsegen.primitives._space import Space
from sparsegen.primitives.attend import Attend
from sparsegen.primitives.attend import reference as attend
from sparsegen.primitives.cat import Cat
from sparsegen.primitives.cat import reference as cat
from sparsegen.primitives.compress import Compress
from sparsegen.primitives.compress import reference as compress
from sparsegen.primitives.merge import Merge
from sparsegen.primitives.merge import reference as merge
from sparsegen.primitives.project import Project
from sparsegen.primitives.project import reference as project
from sparsegen.primitives.reduce import Partial, Reduce, coordinates
from sparsegen.primitives.score import Score
from sparsegen.primitives.score import reference as score
from sparsegen.primitives.select import Select, Selection
from sparsegen.primitives.select import reference as select

# Scores held at a time: 32 MiB, and a few arrays of that size.
_CHUNK = 1 << 22


class Run:
    """One sequence: its inputs, positions and the values computed so far."""

    def __init__(
        self, program: Program, arrays: dict[str, Array], q_offset: int | None, scale: float | None
    ) -> None:
        self.program = program
        self.arrays = arrays
        self.sizes = _sizes(program, arrays)
        self.scale = scale
        keys, queries = (self.sizes.get(x, 0) for x in (program.key, program.query))
        self.q_offset = keys - queries if q_offset is None else q_offset
        self.env = Env(self.sizes, self.stop, self.table, self.member)
        self.values: dict[Node, Array] = {}
        self.lses: dict[Node, Array] = {}
        self.selections: dict[Node, Selection] = {}

    def result(self, output: Output) -> Array:
        """Return one output of the program."""
        if output.what == "indices":
            return self.selection(output.node).indices
        value = self.value(output.node)
        return self.lses[output.node] if output.what == "lse" else value

    # --- leaves of expressions ------------------------------------------------------------------

    def positions(self, role: Role, axis: Axis) -> Array:
        """Return the values of `Pos(role, axis)`, in order."""
        first = 0
        if role == "query":
            first = self.q_offset
            if isinstance(axis, Entries):
                if first % axis.stride:
                    raise InputError(
                        f"queries that start at position {first} do not start a block of "
                        f"{axis.stride} compressed queries",
                        hint=f"pass a q_offset that is a multiple of {axis.stride}",
                    )
                first //= axis.stride
        return np.arange(first, first + extent(axis, self.sizes))

    def stop(self, role: Role, axis: Axis) -> int:
        """Return the exclusive end of `Pos(role, axis)`."""
        if role == "query" and not isinstance(axis, Entries):
            return self.q_offset + extent(axis, self.sizes)
        return extent(axis, self.sizes)

    def table(self, tensor: Input, index: tuple[Array, ...]) -> Array:
        """Read an input at absolute positions, clamped to its edges."""
        x = self.arrays[tensor.name]
        places = []
        for n, (axis, at) in enumerate(zip(tensor.axes, index, strict=True)):
            if axis == Named(self.program.query) and self.program.query != self.program.key:
                at = at - self.q_offset
            places.append(np.clip(at, 0, x.shape[n] - 1))
        if x.size == 0:
            return np.zeros(np.broadcast_shapes(*(p.shape for p in places)), x.dtype)
        found: Array = x[tuple(places)]
        return found

    def member(self, member: Member, keys: tuple[Array, ...]) -> Array:
        """Tell which keys are in the selection."""
        return self.selection(member.selection).contains(keys)

    def pairs(self, q: Node, k: Node, rows: slice) -> dict[Expr, Array]:
        """Return head, query and key positions, broadcasting to [heads queries keys]."""
        heads = extent(q.axes[1], self.sizes)
        return {
            Head(q.axes[1]): np.arange(heads)[:, None, None],
            Pos("query", q.axes[0]): self.positions("query", q.axes[0])[rows][None, :, None],
            Pos("key", k.axes[0]): self.positions("key", k.axes[0])[None, None, :],
        }

    # --- tensors --------------------------------------------------------------------------------

    def value(self, node: Node) -> Array:
        """Return a tensor [rows heads dim] (inputs: as declared)."""
        if node not in self.values:
            self.values[node] = self._value(node)
        return self.values[node]

    def optional(self, node: Node | None) -> Array | None:
        """Return the tensor of an operand that may be missing."""
        return None if node is None else self.value(node)

    def _value(self, node: Node) -> Array:
        match node:
            case Input(name=name):
                return self.arrays[name]
            case Slice(x=x, start=start, stop=stop):
                return self.value(x)[..., start:stop]
            case Map(x=x, fn=fn):
                return self.env.bind({Symbol("x"): self.value(x)})(fn)
            case Project(x=x, w=w):
                return project(node, self.value(x), self.value(w))
            case Cat(parts=parts):
                return cat([self.value(p) for p in parts])
            case Compress(x=x, previous=previous):
                return compress(
                    node,
                    self.value(x),
                    weight=self.optional(node.weight),
                    gate=self.optional(node.gate),
                    bias=self.optional(node.bias),
                    previous=previous and (self.value(previous[0]), self.value(previous[1])),
                )
            case Attend():
                o, self.lses[node] = self._attend(node)
                return o
            case Merge(parts=parts, gates=gates):
                outs = [self.value(p) for p in parts]
                lses = [] if gates is not None else [self.lses[p] for p in parts]
                o, lse = merge(outs, lses, self.optional(gates))
                if lse is not None:
                    self.lses[node] = lse
                return o
        raise AssertionError(f"{node.op} is not a tensor")

    def _attend(self, node: Attend) -> tuple[Array, Array]:
        q = self.value(node.q)
        operands = [(self.value(s.k), self.value(s.v)) for s in node.sources]
        sink = self.optional(node.sink)
        parts = []
        for rows in _chunks(len(q), q.shape[1] * sum(len(k) for k, _ in operands)):
            sources = [
                (k, v, self.env.bind(self.pairs(node.q, s.k, rows)))
                for s, (k, v) in zip(node.sources, operands, strict=True)
            ]
            scale = self._scale(node.scale, q)
            parts.append(attend(node, q[rows], sources, scale=scale, sink=sink))
        return np.concatenate([o for o, _ in parts]), np.concatenate([lse for _, lse in parts])

    def _scale(self, stated: float | None, q: Array) -> float:
        if stated is not None:
            return stated
        return self.scale if self.scale is not None else float(q.shape[-1]) ** -0.5

    # --- scores and selections ------------------------------------------------------------------

    def selection(self, node: Node) -> Selection:
        """Return the lists of a select node."""
        assert isinstance(node, Select)
        if node not in self.selections:
            spaces = self.spaces(node.x)
            coords = self._coords(node.x)
            self.selections[node] = select(node, spaces, coords, self.env)
        return self.selections[node]

    def _coords(self, node: Score | Reduce) -> tuple[Array, ...]:
        """Return the integers that each key takes in this sequence."""
        if isinstance(node, Score):
            heads = np.arange(extent(node.q.axes[1], self.sizes))
            i = self.positions("query", node.q.axes[0])
            return heads, i, self.positions("key", node.k.axes[0])
        return coordinates(node, node.x.keys, self._coords(node.x), self.env)

    def spaces(self, node: Score | Reduce) -> Iterator[Space]:
        """Yield the scores, chunk after chunk of queries while a key is the query itself."""
        if isinstance(node, Score):
            yield from self._scores(node)
            return
        coords = self._coords(node)
        own = next((n for n, k in enumerate(node.keys) if _is_query(k)), None)
        if own is not None:
            source = node.x.keys.index(node.keys[own])
            for space in self.spaces(node.x):
                local = (*coords[:own], space.coords[source], *coords[own + 1 :])
                partial = Partial.empty(node, local).add(node, space, local, self.env)
                yield partial.finish(node, local)
            return
        partial = Partial.empty(node, coords)
        for space in self.spaces(node.x):
            partial = partial.add(node, space, coords, self.env)
        yield partial.finish(node, coords)

    def _scores(self, node: Score) -> Iterator[Space]:
        q, k, weights = self.value(node.q), self.value(node.k), self.optional(node.weights)
        heads, i, j = self._coords(node)
        for rows in _chunks(len(q), q.shape[1] * len(k)):
            values = score(
                node,
                q[rows],
                k,
                scale=self._scale(node.scale, q),
                weights=None if weights is None else weights[rows],
                env=self.env.bind(self.pairs(node.q, node.k, rows)),
            )
            yield Space(node.keys, (heads, i[rows], j), values)


def _is_query(key: Expr) -> bool:
    return isinstance(key, Pos) and key.role == "query"


def _chunks(rows: int, cost: int) -> Iterator[slice]:
    """Yield slices over rows of `cost` scores each; one empty slice when there are none."""
    step = max(1, _CHUNK // max(cost, 1))
    for start in range(0, max(rows, 1), step):
        yield slice(start, min(start + step, rows))


def _sizes(program: Program, arrays: dict[str, Array]) -> dict[str, int]:
    """Return the extent of every letter, checking the arrays against the declarations."""
    # A letter with the name of a hyperparameter takes its value; sequences are as long as they are.
    letters = program.letters - {program.query, program.key}
    sizes = {n: v for n, v in program.hyper if n in letters and isinstance(v, int)}
    for node in program.inputs:
        shape = arrays[node.name].shape
        if len(shape) != len(node.axes):
            raise InputError(
                f"{node.name!r} has shape {shape}, but is declared "
                f"[{' '.join(map(str, node.axes))}]",
                at=node.site,
            )
        for axis, size in zip(node.axes, shape, strict=True):
            assert not isinstance(axis, Entries | Concat)
            want = axis.size if isinstance(axis, Fixed) else sizes.setdefault(axis.name, size)
            if want != size:
                raise InputError(
                    f"{node.name!r} has {size} elements along [{axis}], expected {want}",
                    at=node.site,
                )
    return sizes
