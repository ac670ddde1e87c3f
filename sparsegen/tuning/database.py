"""Find the choice that was recorded for a task: the user's own first, then what is shipped.

The choice of another size is better than none, so the nearest bucket of the same task counts when
the exact one is missing. The choice of another GPU counts where its record says that it serves the
whole architecture, and only where this GPU has none of its own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsegen.arch import Arch
from sparsegen.errors import BindingError, UnsupportedError
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.tasks import Task
from sparsegen.runtime import cache, catalog
from sparsegen.tuning import records
from sparsegen.tuning.candidates import toolchain
from sparsegen.tuning.records import Record, Sizes, task_hash
from sparsegen.tuning.space import Measured
from sparsegen.tuning.summary import shipped_files

__all__ = ["Found", "lookup", "recorded", "shipped_files", "user_file"]

log = logging.getLogger("sparsegen")

# What a kernel will meet is unknown here; a recorded trace comes closest to it.
_PREFERENCE = ("trace", "clustered", "local", "uniform", "none")


def user_file() -> Path:
    """Return the file that tuning appends to unless it is told otherwise."""
    return cache.root() / "tuning.jsonl"


@dataclass(frozen=True)
class Found:
    """A schedule that tuning chose, and the record that says so."""

    schedule: catalog.Schedule
    record: Record

    def __str__(self) -> str:
        """Return where the choice was measured, and at which size."""
        key, sizes = self.record.key, self.record.key.sizes
        where = key.device or f"{key.arch} with {key.threads} threads"
        indices = "" if key.distribution == "none" else f", {key.distribution} indices"
        return (
            f"measured on {where} at {sizes.batch} x {sizes.query} queries, "
            f"{sizes.key} keys{indices}"
        )


def recorded(plan: Plan, arch: Arch, sizes: Mapping[str, int] | None = None) -> dict[str, Found]:
    """Return what tuning chose for the tasks of a plan, as far as it is recorded.

    Args:
        sizes: lengths of the sequence axes and of "B" count as what the kernel will meet most;
            others are in the plan already.
    """
    program, given = plan.program, sizes or {}
    letters = {"query": program.query, "key": program.key, "batch": "B"}
    if "B" in program.letters:
        del letters["batch"]
    expected = {role: given[x] for role, x in letters.items() if x in given}
    found = {task.name: lookup(task, arch, expected) for task in plan.tasks}
    return {name: choice for name, choice in found.items() if choice is not None}


def lookup(
    task: Task,
    arch: Arch,
    sizes: Mapping[str, int] | None = None,
    *,
    device: str | None = None,
) -> Found | None:
    """Return the schedule that tuning chose for a task; None for the default, or without a record.

    Args:
        task: what is compiled.
        arch: records of other architectures do not count.
        sizes: "batch", "query" and "key" as far as known; without them the largest tuned size
            counts.
        device: name of the GPU (default: the one of this machine, if it is of that architecture).

    Raises:
        TuningError: a file of records cannot be read.
    """
    found = list(_choices(task_hash(task), arch))
    if not found:
        return None
    if device is None:
        device = _device_here(arch)
    usable = [r for r in found if r.key.device == device or r.serves == arch.name]
    for record in sorted(usable, key=lambda r: _rank(r, arch, device, sizes or {})):
        if _kept_default(record):
            return None
        schedule = catalog.Schedule(record.candidate.schedule, **dict(record.candidate.knobs))
        if _still_fits(record, task, arch, schedule):
            return Found(schedule, record)
    return None


def _device_here(arch: Arch) -> str:
    if arch.kind == "cpu":
        return ""
    # It imports torch, which takes a second, and most tasks have no record.
    from sparsegen.runtime.gpu import device_of

    return device_of(arch) or ""


def _choices(key: str, arch: Arch) -> Iterator[Record]:
    # The newest of each file first: sorting is stable.
    for path in (user_file(), *shipped_files()):
        for record in reversed(_read(path).get(key, ())):
            if record.key.arch == arch.name:
                yield record


def _read(path: Path) -> Mapping[str, tuple[Record, ...]]:
    try:
        state = path.stat()
    except FileNotFoundError:
        return {}
    return _parsed(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=16)
def _parsed(path: Path, changed: int, size: int) -> Mapping[str, tuple[Record, ...]]:
    found: dict[str, tuple[Record, ...]] = {}
    for record in records.read(path):
        if record.what == "choice":
            found[record.key.task] = (*found.get(record.key.task, ()), record)
    return found


def _rank(record: Record, arch: Arch, device: str, sizes: Mapping[str, int]) -> tuple[float, ...]:
    key = record.key
    kind = key.distribution.partition(":")[0]
    return (
        key.device != device,
        _distance(key.sizes, sizes),
        key.threads != arch.cores,
        _PREFERENCE.index(kind) if kind in _PREFERENCE else len(_PREFERENCE),
    )


def _distance(tuned: Sizes, sizes: Mapping[str, int]) -> float:
    if not sizes:
        return -float(tuned.batch * tuned.query * tuned.key)
    wanted = Sizes(
        batch=sizes.get("batch", tuned.batch),
        query=sizes.get("query", tuned.query),
        key=sizes.get("key", tuned.key),
    )
    pairs = zip(wanted.bucket, tuned.bucket, strict=True)
    return float(sum(abs(a - b) for a, b in pairs))


def _kept_default(record: Record) -> bool:
    """Tell whether nothing beat the default, which may be another one by now."""
    outcome = record.outcome
    return isinstance(outcome, Measured) and outcome.samples == outcome.anchor


def _still_fits(record: Record, task: Task, arch: Arch, schedule: catalog.Schedule) -> bool:
    """Tell whether a schedule still has the recorded knobs; ask it only if its source changed."""
    if record.key.toolchain.partition(", nvcc")[0] == toolchain([schedule.name]):
        return True
    try:
        catalog.choose(task, arch, schedule)
    except (BindingError, UnsupportedError) as error:
        log.info("a tuning record for %s no longer fits: %s", task.name, error.message)
        return False
    return True
