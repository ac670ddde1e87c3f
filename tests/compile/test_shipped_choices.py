"""What ships as tuned: every choice is still one that its schedule takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sparsegen import arch, patterns
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.runtime import catalog
from sparsegen.tuning import records
from sparsegen.tuning.database import shipped_files
from sparsegen.tuning.records import Record, task_hash


def test_some_choices_ship() -> None:
    assert shipped_files()


@pytest.mark.parametrize("path", shipped_files(), ids=lambda path: path.stem)
def test_choices_still_fit(path: Path) -> None:
    programs = {
        program.hash: program
        for name in patterns.names()
        for config in patterns.configs(name)
        for program in [patterns.load(name).trace(**config.hyper)]
    }
    for record in records.read(path):
        origin = record.origin
        plan = partition(programs[origin.program_hash], binding_of(origin.binding))
        task = next(t for t in plan.tasks if t.name == origin.task)
        assert task_hash(task) == record.key.task
        catalog.choose(task, arch.get(record.key.arch), schedule_of(record))


def binding_of(data: Mapping[str, Any]) -> Binding:
    pairs = {n: tuple(map(tuple, data[n])) for n in ("sizes", "dtypes")}
    return Binding(**{**data, **pairs})


def schedule_of(record: Record) -> catalog.Schedule:
    return catalog.Schedule(record.candidate.schedule, **dict(record.candidate.knobs))
