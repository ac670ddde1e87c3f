"""Kernels of a GPU that crash, hang, lie or cannot be built, and what a search must say of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sparsegen as sg
from sparsegen.runtime import catalog
from sparsegen.tuning import database, records
from sparsegen.tuning.space import Measured, Rejected

SCHEDULES = Path(__file__).parent / "gpu" / "faulty_schedules"
CRASH = "far"  # what kills the process is told by the device
# By fault: the stage that finds it, and what the record says.
FAULTS = {
    "build": ("build", "this candidate cannot be built"),
    CRASH: ("check", ""),
    "bounds": ("check", "written out of bounds"),
    "hang": ("check", "did not finish within"),
    "wrong": ("check", "output 0 is wrong at"),
}


@sg.pattern
def projected(
    q: sg.Tensor["T H c"],
    k: sg.Tensor["S H c"],
    v: sg.Tensor["S H c"],
    w: sg.Tensor["H c v"],
):
    """Attend, then project."""
    i, j = sg.index(q, k)
    return sg.project(sg.attend(q, k, v, where=j <= i), w)


@contextmanager
def registered() -> Iterator[None]:
    """Offer the schedules to searches."""
    catalog.register_path(SCHEDULES)
    try:
        yield
    finally:
        catalog.unregister_path(SCHEDULES)


def survive(target: str, sizes: dict[str, int], crash: str) -> tuple[Any, list[Any]]:
    """Search over all of them; return the result and the records, once these are as they must be.

    Args:
        target, sizes: of the search.
        crash: what the record says of the one that kills its process.
    """
    result = sg.tune(
        projected, target, sizes=sizes, dtype="bfloat16", budget=200, strategy="exhaustive",
        tasks=["project_1"],
    )  # fmt: skip
    (task,) = result.tasks
    found = records.read(database.user_file())
    fakes = [r for r in found if r.what == "candidate" and r.candidate.schedule[-6:] == "faulty"]
    why = {dict(r.candidate.knobs)["fault"]: r.outcome for r in fakes}
    rejected = {fault: r for fault, r in why.items() if isinstance(r, Rejected)}
    assert rejected.keys() == FAULTS.keys()
    for fault, (stage, said) in FAULTS.items():
        assert rejected[fault].stage == stage, fault
        assert (said or crash) in rejected[fault].why, fault
    assert task.excluded["more than 16 repeats never help"] == 1
    chosen = dict(task.candidate.knobs)
    assert (chosen.get("fault", ""), chosen.get("repeats", 1)) == ("", 1)
    assert task.choice is not None
    assert task.choice.speedup > 2
    return result, found


def quarantined() -> dict[str, Path]:
    """Return the file by which each fault can be repeated."""
    files = (database.user_file().parent / "quarantine").glob("*.json")
    found = {json.loads(f.read_text())["knobs"]["fault"]: f for f in files}
    assert found.keys() == FAULTS.keys()
    return found


def choice_of(found: list[Any]) -> Any:
    """Return the only choice among records, with its sustained and burst samples and calls."""
    (choice,) = (r for r in found if r.what == "choice")
    final = choice.outcome
    assert isinstance(final, Measured)
    assert len(final.burst) == len(final.anchor_burst) == 3
    assert len(final.calls) == len(final.samples) == len(final.anchor_calls)
    assert all(len(calls) >= 6 for calls in final.calls)
    return choice
