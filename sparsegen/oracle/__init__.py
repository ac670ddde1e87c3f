"""Run a program in numpy float64, following the numeric contract to the letter.

Nothing here is shared with lowering. Scores exist for one chunk of queries at a time, so lengths in
the thousands fit in memory; every sequence of a batch is evaluated by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sparsegen.ir.program import Program
from sparsegen.oracle.batch import Batch, join
from sparsegen.oracle.run import Run
from sparsegen.primitives._evaluate import Array


class Traced(Protocol):
    """Something that was traced into a program: a pattern."""

    @property
    def program(self) -> Program:
        """Return the program."""


def reference(
    pattern: Program | Traced,
    inputs: Mapping[str, Any],
    *,
    q_offset: int | Sequence[int] | Array | None = None,
    cu_seqlens_q: Sequence[int] | Array | None = None,
    cu_seqlens_k: Sequence[int] | Array | None = None,
    page_table: Array | None = None,
    seqlens_k: Sequence[int] | Array | None = None,
    scale: float | None = None,
) -> Any:
    """Return what the pattern computes, in float64 (indices in int32).

    The layout follows from the arguments: `page_table` makes it paged, `cu_seqlens_q` ragged, one
    axis more than declared dense; otherwise the inputs are one sequence as declared.

    Args:
        pattern: a pattern (with its default hyperparameters) or a program.
        inputs: an array of any real dtype for each input, by name.
        q_offset: position of the first query in key coordinates, one or one per sequence; the
            default places the queries at the end of the keys.
        cu_seqlens_q, cu_seqlens_k: [batch + 1] first row of each sequence.
        page_table: [batch, pages] physical page of each logical one; key inputs are
            [pages, page, ...].
        seqlens_k: [batch] keys of each sequence, for the paged layout.
        scale: softmax scale where the pattern states none (default: query extent ** -0.5).

    Raises:
        InputError: names, ranks or extents do not fit the pattern.
    """
    program = pattern if isinstance(pattern, Program) else pattern.program
    batch = Batch.of(program, inputs, cu_seqlens_q, cu_seqlens_k, page_table, seqlens_k)
    offsets: list[int | None] = [None] * batch.size
    if q_offset is not None:
        offsets = [int(x) for x in np.broadcast_to(np.asarray(q_offset), batch.size)]
    runs = [Run(program, batch.arrays(b), offsets[b], scale) for b in range(batch.size)]
    results = [join(batch.layout, o, [run.result(o) for run in runs]) for o in program.outputs]
    return results[0] if program.single else tuple(results)
