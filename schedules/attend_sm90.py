"""Attention over keys that neighbouring tokens do not share, with wgmma, for Hopper.

Every token walks its own keys, those of ranges and of lists, which heads share: all of them where
one key head has its values in its keys; any where lists name keys that lie apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.attend import shared_heads, token_lists
from sparsegen.codegen.gpu import cluster
from sparsegen.codegen.gpu.attend_cut import dtype_of
from sparsegen.codegen.gpu.boxes import boxed
from sparsegen.codegen.gpu.convert import convert, converted
from sparsegen.codegen.gpu.few import FewKernel, few, narrow, ring_of
from sparsegen.codegen.gpu.gather import readable
from sparsegen.codegen.gpu.launch import kernel
from sparsegen.codegen.gpu.listed import ListedKernel, shared_bytes
from sparsegen.codegen.gpu.listed_compute import ROWS
from sparsegen.codegen.gpu.listed_cut import Columns, Cut, Heads
from sparsegen.codegen.gpu.slots import sure
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
    cluster  two blocks, with heads of one token, copy boxes for each other
    """

    compute: int = 208
    copy: int = 88
    boxes: bool = False
    cluster: bool = False


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
    if task.q.rows.space != "query":
        return "queries are not tokens"
    if not _apart(task):
        if shared_heads(task) != task.q.heads:
            return "the query heads do not share one key head and its lists, of blocks or ranges"
        if Columns.of(task).apart:
            return "values are no prefix of the keys, of blocks or ranges"
    reason = _operands(task, dtype)
    if reason is not None:
        return reason
    if task.o.dtype not in (dtype, "float32"):
        return f"outputs are {task.o.dtype}, inputs {dtype}"
    dim = task.sources[0].v.dim
    step = 64 if _apart(task) else 128
    if dim % step or dim > 512:
        return f"values of {dim} elements: it takes multiples of {step} up to 512"
    if _ringed(task):
        return None if ring_of(task, arch).slots else "a chunk of keys does not fit shared memory"
    if shared_bytes(task) > arch.shared_bytes:
        return f"{shared_bytes(task)} bytes of shared memory, {arch.name} has {arch.shared_bytes}"
    return None


def default(task: AttendTask, arch: Arch) -> Knobs:
    """Return the split that keeps accumulators of 64 x 256 in registers, and boxes if they fit.

    Those of narrow values take fewer.
    """
    return Knobs(200, 104) if narrow(task) else Knobs(boxes=not few(task) and boxed(task))


def space(task: AttendTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first = default(task, arch)
    found = [first, replace(first, boxes=not first.boxes), replace(first, boxes=True, cluster=True)]
    found += [replace(first, compute=a, copy=b) for a, b in ((216, 72), (224, 56), (216, 96))]
    for knobs in found:
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
    blocks = arch.cores or 1
    if knobs.cluster:
        blocks += blocks % cluster.SIZE
    cut = Cut(blocks, knobs.compute, knobs.copy, knobs.boxes, knobs.cluster)
    (found, copies), columns = _copied(task), Columns.of(task)
    with kernel(task, tuple(copies.values())) as (builder, arguments):
        convert(arguments, copies, cut.blocks)
        if _ringed(task):
            FewKernel(found, columns, cut, ring_of(task, arch), dtype, arguments).emit()
        else:
            ListedKernel(found, columns, cut, dtype, arguments).emit()
    return builder.get()


def scratch(task: AttendTask, knobs: Knobs, arch: Arch) -> tuple[tuple[Buffer, Expr], ...]:
    """Return the memory of copies of keys that are converted."""
    return tuple((buffer, Const(0)) for buffer in _copied(task)[1].values())


def _copied(task: AttendTask) -> tuple[AttendTask, dict[Part, Buffer]]:
    """Return the task over keys and values that can be gathered from memory, and the copies."""
    dtype = dtype_of(task)
    assert dtype is not None
    return converted(task, dtype, readable, "kv" if Columns.of(task).apart else "k")


def _ringed(task: AttendTask) -> bool:
    """Tell whether each group computes whole chunks, which come by a ring."""
    return few(task) or narrow(task)


def _apart(task: AttendTask) -> bool:
    """Tell whether tokens have lists of their own whose keys lie apart: they share no tiles."""
    found = [c.keys for s in task.sources for c in s.clauses if c.keys is not None]
    scattered = len(found) > 1 or any(k.granule % 16 or k.shift or k.slash for k in found)
    return scattered and token_lists(task)


def _operands(task: AttendTask, dtype: str) -> str | None:
    """Return None, or why operands are not taken."""
    values = [s.v for s in task.sources] if Columns.of(task).apart else []
    for operand in (task.q, *(s.k for s in task.sources), *values):
        for part in operand.parts:
            if part.fn is not None or part.buffer.dtype not in {dtype, "float32"}:
                return "operands need a conversion on their way into shared memory"
            if part.size % 64:
                return "parts of queries and keys are no multiples of 64 elements"
            if operand is task.q:
                if part.start % 8 or part.buffer.shape[-1] % 8:
                    return "parts of queries do not begin at multiples of 8 elements"
            elif part.buffer.rows.paged and not readable(part, dtype):
                return "keys in pages need a conversion"
    for source in task.sources:
        parts = (*source.k.parts, *(source.v.parts if values else ()))
        if any(p.buffer.rows != source.k.rows for p in parts):
            return "parts of keys and values are found in different ways, some in pages"
    return None


def _excluded(task: AttendTask, knobs: Knobs) -> str | None:
    used = 2 * knobs.compute + knobs.copy
    if knobs.compute % 8 or knobs.copy % 8:
        return f"{knobs.compute} and {knobs.copy} registers: multiples of 8 are handed out"
    if used > _REGISTERS:
        return f"{used} registers of the three groups, a block has {_REGISTERS}"
    if knobs.boxes and (few(task) or not boxed(task)):
        return "boxes of 64 keys: few heads, keys of no single range, or pages of no 64 keys"
    if knobs.cluster and not (knobs.boxes and Heads.of(task, ROWS).count % cluster.SIZE == 0):
        return "blocks in clusters: no boxes to copy for each other, or an odd number of tiles"
    return None
