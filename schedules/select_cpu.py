"""Exact selection on a CPU: queries and heads in SIMD lanes, keys broadcast from memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.attention import Blocking
from sparsegen.codegen.cpu.select import SelectKernel
from sparsegen.codegen.cpu.select_task import Facts
from sparsegen.codegen.cpu.tile import Tile
from sparsegen.codegen.cpu.vec import float_lanes
from sparsegen.codegen.tvm import I, IRBuilder, T
from sparsegen.errors import CompileError
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import SelectTask

FAMILY = "select"
REQUIRES = frozenset({"cpu"})
PRIORITY = 0

# Keys of a register tile: divisors of a chunk, which is a whole number of vectors too.
KEYS = (12, 8, 6, 4, 3, 2, 1)


@dataclass(frozen=True)
class Knobs:
    """How scores are tiled.

    tokens  queries of a tile
    heads   query heads of a tile: a divisor of those that share keys, lists and groups
    keys    keys of a register tile; divides `chunk`
    chunk   keys scored at a time; a multiple of 16
    """

    tokens: int = 1
    heads: int = 1
    keys: int = 6
    chunk: int = 96


def accepts(task: SelectTask, arch: Arch) -> str | None:
    """Return None, or why this schedule does not take the task."""
    return Facts(task).refusal()


def default(task: SelectTask, arch: Arch) -> Knobs:
    """Return tiles that fill the lanes, and as many keys as registers hold beside them."""
    vectors = 4 if arch.vector_registers >= 32 else 2
    tile = Facts(task).default_tile(float_lanes(arch), vectors)
    return Knobs(tokens=tile.tokens, heads=tile.heads, keys=_keys(tile, arch))


def space(task: SelectTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first, facts = default(task, arch), Facts(task)
    yield first
    seen = {first}
    for vectors in (1, 2, 4):
        tile = facts.default_tile(float_lanes(arch), vectors)
        for keys in KEYS[:-1]:
            for chunk in (48, 96, 192):
                knobs = replace(first, tokens=tile.tokens, heads=tile.heads, keys=keys, chunk=chunk)
                if knobs not in seen:
                    seen.add(knobs)
                    reason = _excluded(task, knobs, arch)
                    yield knobs if reason is None else Rejected(asdict(knobs), reason)


def apply(task: SelectTask, knobs: Knobs, arch: Arch) -> Any:
    """Return the module of the kernel.

    Raises:
        CompileError: the knobs break an inequality.
    """
    reason = _excluded(task, knobs, arch)
    if reason is not None:
        raise CompileError(f"{task.name}: {reason}", at=task.site, hint="take knobs from space()")
    tile = Facts(task).tile(knobs.tokens, knobs.heads, float_lanes(arch))
    blocking = Blocking(knobs.chunk, knobs.keys, dims=1)
    with IRBuilder() as builder, I.ir_module(), T.prim_func(s_tir=True):
        SelectKernel(task, tile, blocking, arch).emit()
    return builder.get()


def _keys(tile: Tile, arch: Arch) -> int:
    """Return the most keys whose accumulators fit beside a query and a key."""
    room = arch.vector_registers - tile.vectors - 1
    return next(n for n in KEYS if n * tile.vectors <= max(room, tile.vectors))


def _excluded(task: SelectTask, knobs: Knobs, arch: Arch) -> str | None:
    facts, width = Facts(task), float_lanes(arch)
    if min(knobs.tokens, knobs.heads, knobs.keys, knobs.chunk) < 1:
        return "every knob is at least 1"
    if facts.shareable % knobs.heads:
        return f"{knobs.heads} heads do not divide the {facts.shareable} that share keys and lists"
    if knobs.tokens != facts.fitting(knobs.tokens):
        return f"{knobs.tokens} tokens neither divide groups of {facts.inner} queries nor hold them"
    if knobs.tokens > 32 and (facts.looked_up or facts.token_lists):
        return f"{knobs.tokens} tokens, but there are 32 bits to say which of them see a key"
    if knobs.chunk % knobs.keys or knobs.chunk % width:
        return f"chunk {knobs.chunk} is no multiple of keys {knobs.keys} and of {width} lanes"
    vectors = facts.tile(knobs.tokens, knobs.heads, width).vectors
    used = knobs.keys * vectors + vectors + 1
    if knobs.keys > 1 and used > arch.vector_registers:
        return f"{used} vectors in use, {arch.vector_registers} registers"
    return None
