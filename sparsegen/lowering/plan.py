"""Hold the result of partitioning: tasks in order, the buffers between them, and the outputs."""

from __future__ import annotations

from dataclasses import dataclass

from sparsegen.ir.expr import Expr
from sparsegen.ir.node import Input
from sparsegen.ir.program import Program
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.tasks import Buffer, Task


@dataclass(frozen=True, kw_only=True)
class Result:
    """An output of the kernel: the buffer that holds it and how the user sees it.

    what  "o" | "lse" | "indices". Rows of space "query" are shaped like the query axis of the
    layout ([T, ...], [B, T, ...] or packed); "batch" rows gain a leading batch axis except in the
    sequence layout; "query_block" rows are offered in the sequence layout only.
    """

    buffer: Buffer
    what: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the runtime needs to run a bound program.

    inputs         pattern parameters in order, with the buffer each one is bound to
    intermediates  buffers that one task writes and a later one reads, allocated per call
    results        buffers returned
    tasks          in an order that respects reads and writes
    widths         capacity of each symbolic extent (-1) by buffer name: an expression over Stop,
                   where Stop is the largest of the call's sequences
    rows(buffer)   see `Rows`: number of rows to allocate, from batch, total_q, total_k, max_pages:
                     query total_q · key total_k · entry total // stride + batch ·
                     query_block total_q // block + 2 * batch · batch batch
    """

    program: Program
    binding: Binding
    inputs: tuple[tuple[Input, Buffer], ...]
    intermediates: tuple[Buffer, ...]
    results: tuple[Result, ...]
    tasks: tuple[Task, ...]
    widths: tuple[tuple[str, Expr], ...]
