"""Weigh the parts of a merge, for one row (query, head)."""

from __future__ import annotations

from collections.abc import Callable

from sparsegen.codegen.cpu.rows import Arguments
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.vec import load_f32
from sparsegen.codegen.tvm import Memory, T, Value, const, load
from sparsegen.lowering.tasks import MergeTask

Function = Callable[[Value], Value]


def weights(
    task: MergeTask, arguments: Arguments, row: Value, *, exp: Function, log: Function
) -> tuple[list[Memory], Memory | None]:
    """Return a cell with the weight of each part, and where parts have an lse, a cell with theirs.

    Args:
        row: int64.
        exp, log: of float32 scalars, as the target computes them.
    """
    if task.gates is None:
        return _shares(task, arguments, row, exp, log)
    gates, parts = arguments[task.gates], len(task.parts)
    found = (load_f32(gates.flat, task.gates.dtype, row * parts + p) for p in range(parts))
    return [cell("float32", gate) for gate in found], None


def _shares(
    task: MergeTask, arguments: Arguments, row: Value, exp: Function, log: Function
) -> tuple[list[Memory], Memory]:
    """Weigh by exp(lse_p - lse), 0 for parts that see nothing."""
    hidden, zero = const(float("-inf"), "float32"), const(0.0, "float32")
    top, total, result = cell("float32", hidden), cell("float32", zero), cell("float32", hidden)
    lses = [T.bind(load(arguments[b].flat, row)) for b in task.lses]
    for lse in lses:
        with T.If(lse > get(top)), T.Then():
            put(top, lse)
    shares = [cell("float32", zero) for _ in lses]
    for lse, share in zip(lses, shares, strict=True):
        with T.If(lse > hidden), T.Then():
            put(share, exp(lse - get(top)))
            put(total, get(total) + get(share))
    with T.If(get(total) > zero), T.Then():
        for share in shares:
            put(share, get(share) / get(total))
        put(result, get(top) + log(get(total)))
    return shares, result
