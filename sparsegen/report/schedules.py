"""Say which schedule lowers each task, and why the others do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsegen.arch import Arch
from sparsegen.errors import UnsupportedError
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.tasks import Task
from sparsegen.report.figures import Figures
from sparsegen.report.model import Scheduled

if TYPE_CHECKING:
    from sparsegen.runtime.catalog import Overrides, Schedule
    from sparsegen.tuning.database import Found


def scheduled(
    plan: Plan,
    arch: Arch,
    asked: Overrides,
    found: Mapping[str, Found],
    figures: Figures,
) -> tuple[Scheduled, ...]:
    """Return what lowers each task of a plan.

    Args:
        asked: schedules by task name or family, or one.
        found: what is recorded, by task name; it counts where none is asked for.
        figures: measure the memory that schedules take.
    """
    from sparsegen.runtime import catalog

    given = catalog.by_task(plan.tasks, asked)
    return tuple(
        _scheduled(task, arch, given.get(task.name), found.get(task.name), figures)
        for task in plan.tasks
    )


def _scheduled(
    task: Task,
    arch: Arch,
    asked: Schedule | None,
    found: Found | None,
    figures: Figures,
) -> Scheduled:
    from sparsegen.runtime import catalog

    survey = catalog.survey(task, arch)
    override = found.schedule if asked is None and found is not None else asked
    try:
        choice = catalog.choose(task, arch, override)
    except UnsupportedError as error:
        # A schedule that was asked for by name and refuses is an error of the request.
        if override is not None:
            raise
        others = tuple((stem, str(reason)) for stem, reason in survey)
        others = others or (("", error.message),)
        return Scheduled(
            name=None, knobs={}, origin="", source="", others=others, scratch=figures.scratch(())
        )
    order = [stem for stem, _ in survey]
    others = tuple(
        (stem, reason or f"takes it too; {_preferred(stem, choice.stem, order)}")
        for stem, reason in survey
        if stem != choice.stem
    )
    return Scheduled(
        name=choice.stem,
        knobs=dataclasses.asdict(choice.knobs),
        origin="asked for" if asked is not None else "default" if found is None else "recorded",
        source=str(found) if asked is None and found is not None else "",
        others=others,
        scratch=figures.scratch(catalog.scratch(choice, task, arch)),
    )


def _preferred(stem: str, chosen: str, order: list[str]) -> str:
    if order.index(stem) < order.index(chosen):
        return f"{chosen} was asked for or measured faster"
    return f"{chosen} comes first"
