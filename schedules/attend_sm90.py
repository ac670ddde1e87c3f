"""Attention with one key head whose values are part of its keys, with wgmma, for Hopper.

Every token walks its own keys, those of ranges and of lists, so all heads share what is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.attend import shared_heads
from sparsegen.codegen.gpu.attend_cut import dtype_of
from sparsegen.codegen.gpu.boxes import boxed
from sparsegen.codegen.gpu.convert import convert, converted
from sparsegen.codegen.gpu.few import MOST, FewKernel, ring_of
from sparsegen.codegen.gpu.gather import readable
from sparsegen.codegen.gpu.launch import kernel
from sparsegen.codegen.gpu.listed import Cut, ListedKernel, shared_bytes
from sparsegen.codegen.gpu.slots import sure
from sparsegen.codegen.gpu.tiles import inside
from sparsegen.errors import CompileError
from sparsegen.ir.expr import Const, Expr, Head, Member, walk
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import AttendTask, Buffer, Part

FAMILY = "attend"
REQUIRES = frozenset({"wgmma", "cp_async", "mbarrier", "setmaxnreg"})
PRIORITY = 10

# Registers of a block at its start, 168 a thread: three groups of warps share them.
_REGISTERS = 504


@dataclass(frozen=True)
class Knobs:
    """How registers are shared, and how keys are copied.

    compute  registers of a thread of the two groups that multiply
    copy     registers of a thread of the group that gathers
    boxes    64 neighbouring keys are copied as boxes by the tensor memory accelerator
    """

    compute: int = 208
    copy: int = 88
    boxes: bool = False


def accepts(task: AttendTask, arch: Arch) -> str | None:
    """Return None, or why this schedule does not take the task."""
    dtype = dtype_of(task)
    if dtype is None:
        return "tensor cores multiply 16-bit numbers, and every input is float32"
    for clause in (c for s in task.sources for c in s.clauses):
        if not sure(clause) and any(isinstance(e, Head | Member) for e in walk(clause.residual)):
            return "keys are hidden from some heads, or looked up in a selection one by one"
    if task.mod is not None or task.scale <= 0:
        return "scores are modified, or their scale is not positive"
    if task.sources[0].k.heads != 1 or shared_heads(task) != task.q.heads:
        return "the query heads do not share one key head and its lists"
    if task.q.rows.space != "query":
        return "queries are not tokens"
    if any(inside(s.v, s.k) != 0 for s in task.sources):
        return "values are no prefix of the keys"
    dim = task.sources[0].v.dim
    for operand in (task.q, *(s.k for s in task.sources)):
        for part in operand.parts:
            if part.fn is not None or part.buffer.dtype not in {dtype, "float32"}:
                return "operands need a conversion on their way into shared memory"
            if part.size % 64:
                return "parts of queries and keys are no multiples of 64 elements"
            if operand is task.q and (part.start % 8 or part.buffer.shape[-1] % 8):
                return "parts of queries do not begin at multiples of 8 elements"
            if part.buffer.rows.paged and not readable(part, dtype):
                return "keys in pages need a conversion"
    if task.o.dtype not in (dtype, "float32"):
        return f"outputs are {task.o.dtype}, inputs {dtype}"
    if dim % 128 or dim > 512:
        return f"values of {dim} elements: it takes multiples of 128 up to 512"
    if task.q.heads <= MOST:
        return None if ring_of(task, arch).slots else "a chunk of keys does not fit shared memory"
    if shared_bytes(task) > arch.shared_bytes:
        return f"{shared_bytes(task)} bytes of shared memory, {arch.name} has {arch.shared_bytes}"
    return None


def default(task: AttendTask, arch: Arch) -> Knobs:
    """Return the split that keeps accumulators of 64 x 256 in registers, and boxes if they fit."""
    return Knobs(boxes=task.q.heads > MOST and boxed(task))


def space(task: AttendTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first = default(task, arch)
    others = (Knobs(216, 72), Knobs(224, 56), Knobs(216, 96))
    for knobs in (first, replace(first, boxes=not first.boxes), *others):
        reason = _excluded(task, knobs)
        yield knobs if reason is None else Rejected(asdict(knobs), reason)


def apply(task: AttendTask, knobs: Knobs, arch: Arch) -> Any:
    """Return the module of the kernel.

    Raises:
        CompileError: the knobs break an inequality.
    """
    reason = _excluded(task, knobs)
    if reason is not None:
        raise CompileError(f"{task.name}: {reason}", at=task.site, hint="take knobs from space()")
    dtype = dtype_of(task)
    assert dtype is not None
    cut = Cut(arch.cores or 1, knobs.compute, knobs.copy, knobs.boxes)
    found, copies = _copied(task)
    with kernel(task, tuple(copies.values())) as (builder, arguments):
        convert(arguments, copies, cut.blocks)
        if task.q.heads <= MOST:
            FewKernel(found, cut, ring_of(task, arch), dtype, arguments).emit()
        else:
            ListedKernel(found, cut, dtype, arguments).emit()
    return builder.get()


def scratch(task: AttendTask, knobs: Knobs, arch: Arch) -> tuple[tuple[Buffer, Expr], ...]:
    """Return the memory of copies of keys that are converted."""
    return tuple((buffer, Const(0)) for buffer in _copied(task)[1].values())


def _copied(task: AttendTask) -> tuple[AttendTask, dict[Part, Buffer]]:
    """Return the task over keys that can be gathered from where they lie, and the copies."""
    dtype = dtype_of(task)
    assert dtype is not None
    return converted(task, dtype, readable, "k")


def _excluded(task: AttendTask, knobs: Knobs) -> str | None:
    used = 2 * knobs.compute + knobs.copy
    if knobs.compute % 8 or knobs.copy % 8:
        return f"{knobs.compute} and {knobs.copy} registers: multiples of 8 are handed out"
    if used > _REGISTERS:
        return f"{used} registers of the three groups, a block has {_REGISTERS}"
    if knobs.boxes and (task.q.heads <= MOST or not boxed(task)):
        return "boxes of 64 keys: few heads, keys of no single range, or pages of no 64 keys"
    return None
