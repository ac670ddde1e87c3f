"""List the candidates of a task: what its schedules offer, and what their inequalities exclude."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sparsegen.codegen
from sparsegen.arch import Arch
from sparsegen.codegen import tvm as adapter
from sparsegen.errors import UnsupportedError
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import Task
from sparsegen.runtime import catalog
from sparsegen.tuning.space import Candidate, Space


def space_of(task: Task, arch: Arch) -> Space:
    """Return every candidate of every schedule that takes a task.

    The first is the one that is used when nothing is tuned.

    Raises:
        UnsupportedError: no schedule takes the task.
    """
    first = catalog.choose(task, arch)
    choices = [first]
    for stem in catalog.files():
        if stem != first.stem and stem not in dict(first.declined):
            choices += _others(task, arch, stem)
    found: dict[Candidate, None] = {_candidate(first.stem, first.knobs): None}
    excluded: list[tuple[Candidate, str]] = []
    for choice in choices:
        for knobs in choice.module.space(task, arch):
            if isinstance(knobs, Rejected):
                excluded.append((_candidate(choice.stem, knobs.knobs), knobs.reason))
            else:
                found[_candidate(choice.stem, knobs)] = None
    return Space(tuple(found), tuple(excluded))


def _others(task: Task, arch: Arch, stem: str) -> list[catalog.Choice]:
    if catalog.family(stem) != task.family:
        return []
    try:
        return [catalog.choose(task, arch, catalog.Schedule(stem))]
    except UnsupportedError:
        return []


def _candidate(stem: str, knobs: Any) -> Candidate:
    return Candidate.of(stem, knobs if isinstance(knobs, Mapping) else dataclasses.asdict(knobs))


def folders() -> tuple[str, ...]:
    """Return the folders of schedules beside the shipped ones."""
    own = {Path(p).resolve() for p in __import__("sparsegen.schedules").schedules.__path__}
    return tuple(sorted({str(p.parent) for p in catalog.files().values()} - {str(p) for p in own}))


def toolchain(candidates: Iterable[Candidate]) -> str:
    """Return the version of TVM and a hash of the sources that generate these candidates."""
    digest = hashlib.sha256()
    (codegen,) = sparsegen.codegen.__path__
    files = catalog.files()
    for path in [
        *sorted(Path(codegen).rglob("*.py")),
        *(files[stem] for stem in sorted({c.schedule for c in candidates})),
    ]:
        digest.update(path.read_bytes())
    return f"tvm {adapter.PINS['apache-tvm']}, {digest.hexdigest()[:12]}"
