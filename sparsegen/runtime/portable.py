"""Build a plan for several processors: GPUs whose source is the same share one library."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.render import render
from sparsegen.lowering.plan import Plan
from sparsegen.runtime import cache, catalog
from sparsegen.runtime.build import (
    Built,
    build,
    compile_cuda,
    digest,
    notes_of,
    read,
    refuse_without_jit,
    source_of,
    toolchain,
)
from sparsegen.runtime.catalog import Choice, Overrides, Schedule
from sparsegen.runtime.kernel import Kernel

log = logging.getLogger("sparsegen")


@dataclass(frozen=True)
class Library:
    """A library, the architectures it is for, and their schedules by task."""

    archs: tuple[Arch, ...]
    built: Built
    schedules: Mapping[str, Mapping[str, Schedule]]


def of_kernel(kernel: Kernel) -> Library:
    """Return the library of a kernel as it was compiled."""
    return Library((kernel.arch,), kernel.built, {kernel.arch.name: kernel.schedules})


def build_for(plan: Plan, wanted: Sequence[tuple[Arch, Overrides]]) -> tuple[Library, ...]:
    """Return the libraries of a plan for architectures of one kind, from the cache or compiled.

    A library for GPUs has machine code for each of them, and PTX of the newest unless it uses
    instructions of one GPU alone.

    Raises:
        UnsupportedError: no schedule takes one of the tasks on one of them.
        BindingError, CompileError, CacheError: see `build`.
    """
    if wanted[0][0].kind == "cpu":
        built = [(arch, build(plan, arch, overrides)) for arch, overrides in wanted]
        return tuple(Library((a,), b, {a.name: dict(b.schedules)}) for a, b in built)
    groups: dict[Any, list[tuple[Arch, tuple[Choice, ...]]]] = {}
    for arch, overrides in wanted:
        choices = catalog.choose_all(plan.tasks, arch, overrides)
        notes = notes_of(plan, arch, choices)
        # What runs is the source; what is allocated for it, the host computes.
        key = source_of(plan, arch, choices), json.dumps(notes["scratch"], sort_keys=True)
        groups.setdefault(key, []).append((arch, choices))
    return tuple(_library(plan, source, group) for (source, _), group in groups.items())


def _library(plan: Plan, source: str, group: Sequence[tuple[Arch, tuple[Choice, ...]]]) -> Library:
    from sparsegen.codegen.gpu.build import Support, codes_of

    archs = tuple(arch for arch, _ in group)
    codes = codes_of(archs, source, portable=True)
    parts = [source, render(Support()), toolchain(), codes]
    key = digest(json.dumps(parts, sort_keys=True).encode())

    def compile_into(path: Path) -> Mapping[str, Any]:
        arch, choices = group[0]
        refuse_without_jit(plan, arch)
        start = time.perf_counter()
        log.info("compiling %s for %s", plan.program.name, ", ".join(codes))
        made = compile_cuda(source, archs, path, portable=True)
        log.info("compiled %s in %.2f s", plan.program.name, time.perf_counter() - start)
        return notes_of(plan, arch, choices) | made

    built = read(key, *cache.get_or_build(key, compile_into))
    names = [task.name for task in plan.tasks]
    schedules = {
        arch.name: {n: c.schedule for n, c in zip(names, choices, strict=True)}
        for arch, choices in group
    }
    return Library(archs, built, schedules)
