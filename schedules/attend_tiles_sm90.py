"""Attention over ranges of keys, or over blocks that neighbouring tokens share, on Hopper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import gcd
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.gpu import convert, tma
from sparsegen.codegen.gpu.attend_cut import dtype_of
from sparsegen.codegen.gpu.launch import kernel
from sparsegen.codegen.gpu.membership import members_of, spread
from sparsegen.codegen.gpu.tiled import TiledKernel
from sparsegen.codegen.gpu.tiled_cut import (
    Cut,
    clauses_of,
    key_list,
    rows_of,
    scratch_of,
    shared_bytes,
    stage_elements,
)
from sparsegen.codegen.gpu.wgmma import TILE
from sparsegen.errors import CompileError
from sparsegen.ir.expr import Expr, Member, Table, walk
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import AttendTask, Buffer

FAMILY = "attend"
REQUIRES = frozenset({"wgmma", "tma", "mbarrier", "setmaxnreg"})
PRIORITY = 5

# Candidates: `queries`, `resident` and `ahead`.
_MANNERS = ((1, 0, True), (1, 0, False), (1, 1, False), (2, 0, True), (2, 0, False), (2, 1, False))
_MANY = 32  # tokens of a warp group
# Registers of a thread that computes and of one that feeds, by the warp groups of a block.
_REGISTERS = {1: (240, 24), 2: (240, 24), 3: (160, 32)}


@dataclass(frozen=True)
class Knobs:
    """How the work is cut.

    groups    warp groups that compute, 64 (token, head) rows each
    keys      keys of a chunk: 16, 32, 64 or 128, a part of a listed block or several blocks
    stages    chunks in shared memory
    queries   items whose queries are in shared memory: 1, or 2 to load those of the next ahead
    resident  panels of 64 columns of the queries that stay in registers, and take no shared memory
    ahead     scores of the next chunk are computed beside the sums of this one
    patience  sums are left as they are until a maximum grows by more powers of two
    joint     keys and values of a chunk arrive, and are given back, at once
    tail      keys of the last chunk of a range, where no more are left: 16 or 32; 0: as of others
    """

    groups: int = 2
    keys: int = 128
    stages: int = 2
    queries: int = 1
    resident: int = 0
    ahead: bool = True
    patience: int = 6
    joint: bool = False
    tail: int = 0


def accepts(task: AttendTask, arch: Arch) -> str | None:
    """Return None, or why this schedule does not take the task."""
    task = spread(task)
    dtype = dtype_of(task)
    if dtype is None:
        return "tensor cores multiply 16-bit numbers, and every input is float32"
    if task.q.rows.space != "query":
        return "queries are no tokens"
    if task.o.dtype not in (dtype, "float32"):
        return f"the output is {task.o.dtype}, and products are {dtype}"
    for operand in (task.q, *(x for s in task.sources for x in (s.k, s.v))):
        reason = convert.refused(operand, dtype)
        if reason is not None:
            return reason
    if any(p.buffer.shape[-2] != task.q.heads for p in task.q.parts):
        return "some elements of the queries are shared by all heads"
    if task.q.dim > 256 or task.sources[0].v.dim > 256:
        return f"{task.q.dim} and {task.sources[0].v.dim} elements: registers hold at most 256"
    reason = _lists(task)
    if reason is not None:
        return reason
    found = _first(task, arch)
    return found if isinstance(found, str) else None


def default(task: AttendTask, arch: Arch) -> Knobs:
    """Return the largest cut that fits."""
    found = _first(spread(task), arch)
    assert isinstance(found, Knobs)
    return found


def space(task: AttendTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first, task = default(task, arch), spread(task)
    listed = key_list(task) is not None
    yield first
    for groups in (2, 3):
        for keys in sorted({first.keys, 64, 128}):
            for stages in (2, 3, 4, 5, 6):
                for queries, resident, ahead in _MANNERS:
                    for joint in (False, True):
                        knobs = Knobs(groups, keys, stages, queries, resident, ahead, joint=joint)
                        for each in (knobs, replace(knobs, tail=16)):
                            if each != first and not (each.tail and listed):
                                reason = _excluded(task, each, arch)
                                yield each if reason is None else Rejected(asdict(each), reason)


def scratch(task: AttendTask, knobs: Knobs, arch: Arch) -> tuple[tuple[Buffer, Expr], ...]:
    """Return the counters, what is to be repaired, the united lists, and copies of operands."""
    task = spread(task)
    return scratch_of(task, _cut(task, knobs, arch))


def apply(task: AttendTask, knobs: Knobs, arch: Arch) -> Any:
    """Return the module of the kernel.

    Raises:
        CompileError: the knobs break an inequality.
    """
    asked, task = task, spread(task)
    reason = _excluded(task, knobs, arch)
    if reason is not None:
        raise CompileError(f"{task.name}: {reason}", at=task.site, hint="take knobs from space()")
    cut = _cut(task, knobs, arch)
    buffers = tuple(b for b, _ in scratch_of(task, cut))
    with kernel(task, buffers) as (builder, arguments):
        TiledKernel(asked, cut, arguments, arch.shared_bytes).emit()
    return builder.get()


def _lists(task: AttendTask) -> str | None:
    """Return None, or why lists of the task are not taken."""
    drivers = [c.keys for _, c in clauses_of(task) if c.keys is not None]
    if len(drivers) > 1:
        return "several lists drive the iteration"
    for keys in drivers:
        if keys.slash or keys.shift or not _keys(keys.granule):
            return f"{keys.granule} keys of a listed block are no multiple of 16, nor 8"
    for _, clause in clauses_of(task):
        asked = {e for e in walk(clause.residual) if isinstance(e, Member)}
        if not asked <= set(members_of(task)):
            return "keys of one list are looked up in another one"
    return None


def _keys(granule: int) -> int:
    """Return the keys of a chunk, of one listed block or several; 0 if none cuts blocks evenly."""
    if granule in (8, 16, 32):
        return 64
    return next((keys for keys in (64, 32, 16) if granule % keys == 0), 0)


def _first(task: AttendTask, arch: Arch) -> Knobs | str:
    """Return the first cut that fits, or why none does."""
    found, reason = key_list(task), "no cut"
    # What score mods, and the masks of several clauses, need takes the registers of queries.
    spare = task.mod is None and len(clauses_of(task)) == 1
    small = Knobs(groups=3, keys=64, resident=int(spare), ahead=False)
    if found is not None:
        # Skipped chunks would empty a pipeline of scores and sums again and again.
        keys = _keys(found[1].granule)
        # Nor should a group that leaves a chunk out wait for it twice.
        small = replace(small, joint=True)
        wanted = [replace(small, keys=keys, stages=n) for n in (6, 5, 4, 3, 2)]
        if found[1].granule % 128 == 0:
            # Neighbours that share larger blocks leave fewer chunks out, many of them hardly any:
            # then products may hide what the masks of several clauses take.
            ahead = rows_of(task)[1] >= _MANY and not spare
            wanted.insert(0, Knobs(groups=2, keys=128, stages=2, queries=2, ahead=ahead))
        wanted += [replace(small, keys=keys, stages=n, resident=0) for n in (6, 5, 4, 3, 2)]
        wanted += [replace(small, keys=keys, stages=n, resident=0, groups=2) for n in (4, 3, 2)]
    else:
        wanted = [
            replace(small, stages=stages, queries=queries, resident=resident)
            for resident in sorted({small.resident, 0}, reverse=True)
            for queries in (2, 1)
            for stages in (5, 4)
        ]
        residuals = (c.residual for _, c in clauses_of(task))
        if any(isinstance(e, Table | Member) for r in residuals for e in walk(r)):
            # Predicates read tables and maps through L1, to which shared memory leaves room.
            wanted.insert(0, replace(small, stages=2))
    wanted += [Knobs(keys=keys, stages=n) for keys in (128, 64) for n in (4, 3, 2)]
    for knobs in wanted:
        excluded = _excluded(task, knobs, arch)
        if excluded is None:
            return knobs
        reason = excluded
    return reason


def _cut(task: AttendTask, knobs: Knobs, arch: Arch) -> Cut:
    heads, tokens = rows_of(task)
    compute, copy = _REGISTERS[knobs.groups]
    block, box = _pieces(task, knobs.keys)
    # The thread that feeds keeps more hulls, or each lane a box and who sees it.
    several, listed = len(clauses_of(task)) > 1, block < knobs.keys and not knobs.resident
    if knobs.groups == 3 and (several or listed):
        compute, copy = compute - 8, copy + 24
    elif knobs.groups < 3 and box < knobs.keys:
        compute, copy = compute - 8, copy + 16
    return Cut(
        heads, tokens, knobs.groups, knobs.keys, block, box, knobs.stages, knobs.queries,
        knobs.resident, knobs.ahead, knobs.patience, knobs.joint, knobs.tail, compute, copy,
        arch.cores or 1,
    )  # fmt: skip


def _pieces(task: AttendTask, keys: int) -> tuple[int, int]:
    """Return the keys of a chunk that are of one listed block, and those that also share a page."""
    found = key_list(task)
    block = keys if found is None else gcd(keys, found[1].granule)
    return block, gcd(block, *_pages(task))


def _pages(task: AttendTask) -> set[int]:
    """Return the keys of pages."""
    operands = (x for s in task.sources for x in (s.k, s.v))
    return {p.buffer.rows.page for x in operands for p in x.parts if p.buffer.rows.paged}


def _excluded(task: AttendTask, knobs: Knobs, arch: Arch) -> str | None:
    if knobs.groups not in _REGISTERS or knobs.keys not in (16, 32, 64, 128) or knobs.stages < 2:
        return f"{knobs.groups} warp groups, {knobs.keys} keys and {knobs.stages} stages"
    found = key_list(task)
    block, box = _pieces(task, knobs.keys)
    if found is not None and block not in (knobs.keys, found[1].granule):
        return f"blocks of {found[1].granule} keys are no multiple of {knobs.keys}, nor a part"
    if box < tma.REPEAT:
        pages = sorted(_pages(task))
        return f"pages of {pages} keys and chunks of {knobs.keys} are no multiples of {tma.REPEAT}"
    cut = _cut(task, knobs, arch)
    if knobs.tail and (knobs.ahead or knobs.tail not in (16, 32) or knobs.tail >= knobs.keys):
        return f"{knobs.tail} keys of a last chunk: 16 or 32, where no scores are computed ahead"
    used = shared_bytes(task, cut)
    if used > arch.shared_bytes:
        return f"{used} bytes of shared memory, {arch.name} has {arch.shared_bytes}"
    if cut.groups * cut.resident * TILE > stage_elements(task, cut):
        return f"the queries of {cut.groups} warp groups that stay are larger than a chunk"
    if knobs.resident and knobs.keys == task.sources[0].v.dim:
        # Seen in the machine code of ptxas 13.0: queries and weights share registers.
        return f"with values of {knobs.keys} elements the assembler loses resident queries"
    live = task.sources[0].v.dim // 2 + knobs.keys // 2 + knobs.keys // 4 + 16 * knobs.resident
    if cut.parts > 1:
        live += 2 * cut.parts + 2  # where blocks are, and who sees them
    if live > cut.compute - 24:
        return f"{live} registers of sums, scores and weights, a thread has {cut.compute}"
    return None
