"""Find the choice that was recorded for a task: the user's own first, then what is shipped.

The choice of another size is better than none, so the nearest bucket of the same task counts when
the exact one is missing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

from sparsegen.arch import Arch
from sparsegen.errors import BindingError, UnsupportedError
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.tasks import Task
from sparsegen.runtime import cache, catalog
from sparsegen.tuning import records
from sparsegen.tuning.candidates import toolchain
from sparsegen.tuning.records import Record, Sizes, task_hash
from sparsegen.tuning.space import Measured

log = logging.getLogger("sparsegen")

# What a kernel will meet is unknown here; a recorded trace comes closest to it.
_PREFERENCE = ("trace", "clustered", "local", "uniform", "none")


def user_file() -> Path:
    """Return the file that tuning appends to unless it is told otherwise."""
    return cache.root() / "tuning.jsonl"


def shipped_files() -> tuple[Path, ...]:
    """Return the files that come with sparsegen."""
    folder = Path(str(files("sparsegen.tuning"))) / "db"
    return tuple(sorted(folder.glob("*.jsonl")))


def lookup(
    task: Task, binding: Binding, arch: Arch, sizes: Mapping[str, int] | None = None
) -> catalog.Schedule | None:
    """Return the schedule that tuning chose for a task; None for the default, or without a record.

    Args:
        task, binding: what is compiled; the binding counts as far as the task depends on it.
        arch: records of other architectures do not count.
        sizes: "batch", "query" and "key" as far as known; without them the largest tuned size
            counts.

    Raises:
        TuningError: a file of records cannot be read.
    """
    key = task_hash(task)
    for record in sorted(_choices(key, arch), key=lambda r: _rank(r, arch, sizes or {})):
        if _kept_default(record):
            return None
        schedule = catalog.Schedule(record.candidate.schedule, **dict(record.candidate.knobs))
        if _still_fits(record, task, arch, schedule):
            return schedule
    return None


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


def _rank(record: Record, arch: Arch, sizes: Mapping[str, int]) -> tuple[float, ...]:
    key = record.key
    kind = key.distribution.partition(":")[0]
    return (
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
    if record.key.toolchain == toolchain([schedule.name]):
        return True
    try:
        catalog.choose(task, arch, schedule)
    except (BindingError, UnsupportedError) as error:
        log.info("a tuning record for %s no longer fits: %s", task.name, error.message)
        return False
    return True
