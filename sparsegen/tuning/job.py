"""Say what is tuned in plain data, so that another process can do a part of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsegen import arch
from sparsegen.arch import Arch
from sparsegen.codegen import tvm as adapter
from sparsegen.ir.program import Program
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.plan import Plan
from sparsegen.runtime import catalog
from sparsegen.tuning import cases
from sparsegen.tuning.cases import Case
from sparsegen.tuning.records import Sizes
from sparsegen.tuning.space import Value
from sparsegen.tuning.subject import Subject

SEEDS = (0, 1)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One task of a bound program, the shape it is tuned for and the machine.

    program, binding  as JSON
    folders           of schedules beside the shipped ones
    """

    program: str
    binding: str
    task: str
    arch: str
    threads: int
    sizes: Sizes
    distribution: str
    folders: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """Read what `to_json` returned."""
        fields = {**data, "sizes": Sizes(**data["sizes"]), "folders": tuple(data["folders"])}
        return cls(**fields)

    @cached_property
    def plan(self) -> Plan:
        """Return the plan the task belongs to."""
        data = json.loads(self.binding)
        pairs = {k: tuple(tuple(x) for x in data[k]) for k in ("sizes", "dtypes")}
        return partition(Program.from_json(self.program), Binding(**(data | pairs)))

    @cached_property
    def subject(self) -> Subject:
        """Return the task within its plan."""
        (task,) = (t for t in self.plan.tasks if t.name == self.task)
        return Subject(self.plan, task)

    @cached_property
    def machine(self) -> Arch:
        """Return the architecture, with the threads that are used."""
        return dataclasses.replace(arch.get(self.arch), cores=self.threads)

    def build(self, schedule: str, knobs: Mapping[str, Value], out: Path) -> Path:
        """Build the task with a schedule's knobs into the library `out`."""
        for folder in self.folders:
            catalog.register_path(folder)
        task = self.subject.task
        chosen = catalog.choose(task, self.machine, catalog.Schedule(schedule, **knobs))
        return adapter.build(
            chosen.module.apply(task, chosen.knobs, self.machine), self.machine, out
        )

    def cases(self) -> Sequence[Case]:
        """Return the calls to check; the last one has the tuned shape."""
        small = [cases.small(self.subject, seed) for seed in SEEDS]
        return [*small, cases.timed(self.subject, self.sizes, self.distribution)]
