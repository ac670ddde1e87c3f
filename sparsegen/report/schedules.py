"""Say which schedule lowers each task, and why the others do not."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from sparsegen.arch import Arch
from sparsegen.errors import UnsupportedError
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.tasks import Task
from sparsegen.report.figures import Figures
from sparsegen.report.model import Scheduled

if TYPE_CHECKING:
    from sparsegen.runtime.catalog import Overrides, Schedule


def scheduled(
    plan: Plan,
    arch: Arch,
    overrides: Overrides,
    origin: Literal["recorded", "asked for"],
    figures: Figures,
) -> tuple[Scheduled, ...]:
    """Return what lowers each task of a plan.

    Args:
        overrides: schedules by task name or family, or one.
        origin: where the overrides come from.
        figures: measure the memory that schedules take.
    """
    from sparsegen.runtime import catalog

    given = catalog.by_task(plan.tasks, overrides)
    return tuple(
        _scheduled(task, arch, given.get(task.name), origin, figures) for task in plan.tasks
    )


def _scheduled(
    task: Task,
    arch: Arch,
    override: Schedule | None,
    origin: Literal["recorded", "asked for"],
    figures: Figures,
) -> Scheduled:
    from sparsegen.runtime import catalog

    survey = catalog.survey(task, arch)
    try:
        choice = catalog.choose(task, arch, override)
    except UnsupportedError as error:
        # A schedule that was asked for by name and refuses is an error of the request.
        if override is not None:
            raise
        others = tuple((stem, str(reason)) for stem, reason in survey)
        others = others or (("", error.message),)
        return Scheduled(name=None, knobs={}, origin="", others=others, scratch=figures.scratch(()))
    order = [stem for stem, _ in survey]
    others = tuple(
        (stem, reason or f"takes it too; {_preferred(stem, choice.stem, order)}")
        for stem, reason in survey
        if stem != choice.stem
    )
    return Scheduled(
        name=choice.stem,
        knobs=dataclasses.asdict(choice.knobs),
        origin="default" if override is None else origin,
        others=others,
        scratch=figures.scratch(catalog.scratch(choice, task, arch)),
    )


def _preferred(stem: str, chosen: str, order: list[str]) -> str:
    if order.index(stem) < order.index(chosen):
        return f"{chosen} was asked for or measured faster"
    return f"{chosen} comes first"
