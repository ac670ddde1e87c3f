"""Split the inputs of every layout into sequences, and join their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sparsegen.errors import InputError, did_you_mean
from sparsegen.ir.axes import Named
from sparsegen.ir.expr import Pos
from sparsegen.ir.node import Input, Output
from sparsegen.ir.program import Program
from sparsegen.primitives._evaluate import Array
from sparsegen.primitives.select import Select, follows_query

Layout = Literal["sequence", "dense", "ragged", "paged"]


@dataclass(frozen=True)
class Batch:
    """The inputs, and where each sequence lies in them."""

    program: Program
    layout: Layout
    inputs: dict[str, Array]
    starts: dict[str, list[int]]  # letter of a sequence axis -> first rows, and the end
    page_table: Array | None = None

    @classmethod
    def of(
        cls,
        program: Program,
        inputs: Mapping[str, Any],
        cu_q: Any,
        cu_k: Any,
        page_table: Any,
        seqlens_k: Any,
    ) -> Batch:
        """Find the layout and the sequences; see `reference` for the arguments."""
        declared = {n.name: n for n in program.inputs}
        for name in declared.keys() ^ inputs.keys():
            known = name in declared
            raise InputError(
                f"{program.name} {'needs' if known else 'has no'} input {name!r}",
                hint=None if known else did_you_mean(name, declared),
            )
        arrays = {
            name: np.asarray(inputs[name]).astype(np.int64 if n.kind == "int" else np.float64)
            for name, n in declared.items()
        }
        query, key = program.query, program.key
        if page_table is not None:
            if cu_q is None or seqlens_k is None:
                raise InputError("the paged layout needs cu_seqlens_q and seqlens_k")
            cu_k = np.concatenate([[0], np.cumsum(seqlens_k)])
            starts = {key: [int(x) for x in cu_k], query: [int(x) for x in cu_q]}
            return cls(program, "paged", arrays, starts, np.asarray(page_table))
        if cu_q is not None:
            if cu_k is None and query != key:
                raise InputError("the ragged layout needs cu_seqlens_k beside cu_seqlens_q")
            starts = {query: [int(x) for x in cu_q]}
            if query != key:
                starts[key] = [int(x) for x in cu_k]
            return cls(program, "ragged", arrays, starts)
        first = next(n for n in program.inputs if _letter(n) in (query, key))
        dense = arrays[first.name].ndim == len(first.axes) + 1
        count = len(arrays[first.name]) if dense else 1
        return cls(program, "dense" if dense else "sequence", arrays, {query: [0] * (count + 1)})

    @property
    def size(self) -> int:
        """Return the number of sequences."""
        return len(self.starts[self.program.query]) - 1

    def arrays(self, b: int) -> dict[str, Array]:
        """Return the inputs of one sequence, shaped as declared."""
        return {n.name: self._cut(n, self.inputs[n.name], b) for n in self.program.inputs}

    def _cut(self, node: Input, x: Array, b: int) -> Array:
        letter = _letter(node)
        if letter not in (self.program.query, self.program.key) or self.layout == "sequence":
            return x
        if self.layout == "dense":
            own: Array = x[b]
            return own
        start, stop = self.starts[letter][b : b + 2]
        if self.layout == "paged" and letter == self.program.key:
            assert self.page_table is not None
            j = np.arange(stop - start)
            page = x.shape[1]
            found: Array = x[self.page_table[b][j // page], j % page]
            return found
        return x[start:stop]


def _letter(node: Input) -> str | None:
    first = node.axes[0]
    return first.name if isinstance(first, Named) else None


def join(layout: Layout, output: Output, results: list[Array]) -> Array:
    """Put the results of the sequences together as the layout does."""
    if layout == "sequence":
        return results[0]
    if output.what == "indices":
        width = max(r.shape[-1] for r in results)
        results = [
            np.pad(r, [(0, 0)] * (r.ndim - 1) + [(0, width - r.shape[-1])], constant_values=-1)
            for r in results
        ]
        assert isinstance(output.node, Select)
        moving = [k for k in output.node.keys[:-1] if follows_query(k)]
        if moving and not isinstance(moving[0], Pos):
            raise InputError(
                "a selection for blocks of queries is returned in the sequence layout only",
                at=output.node.site,
                hint="pass one sequence at a time",
            )
        if not moving:
            return np.stack(results)
    return np.stack(results) if layout == "dense" else np.concatenate(results)
