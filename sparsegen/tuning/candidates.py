"""List the candidates of a task: what its schedules offer, and what their inequalities exclude."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from sparsegen.arch import Arch
from sparsegen.errors import BindingError, UnsupportedError
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
    try:
        return [catalog.choose(task, arch, catalog.Schedule(stem))]
    except (BindingError, UnsupportedError):  # of another family, or it does not take the task
        return []


def _candidate(stem: str, knobs: Any) -> Candidate:
    return Candidate.of(stem, knobs if isinstance(knobs, Mapping) else dataclasses.asdict(knobs))


def folders() -> tuple[str, ...]:
    """Return the folders of schedules beside the shipped ones."""
    shipped = Path(str(files("sparsegen.schedules")))
    return tuple(sorted({str(p.parent) for p in catalog.files().values() if p.parent != shipped}))


def toolchain(schedules: Iterable[str]) -> str:
    """Return the version of TVM and a hash of the sources that generate code for `schedules`.

    Nothing is imported for it.
    """
    digest = hashlib.sha256()
    known = catalog.files()
    sources = sorted(Path(str(files("sparsegen.codegen"))).rglob("*.py"))
    for path in [*sources, *(known[stem] for stem in sorted(set(schedules)) if stem in known)]:
        digest.update(path.read_bytes())
    return f"tvm {version('apache-tvm')}, {digest.hexdigest()[:12]}"
