"""Programs become the tasks we expect; what cannot be lowered is refused with the user's line."""

from __future__ import annotations

from typing import Any

import pytest

import sparsegen as sg
from sparsegen import patterns
from sparsegen.errors import BindingError
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.printer import show_plan


def plan_of(pattern: sg.Pattern, sizes: dict[str, int], hyper: Any = None, **options: Any) -> Plan:
    program = pattern.trace(**(hyper or {}))
    known = tuple((k, v) for k, v in sizes.items() if k not in (program.query, program.key))
    return partition(program, Binding(sizes=known, **options))


@pytest.mark.parametrize("name", patterns.names())
def test_plan_text(name: str, snapshot: Any) -> None:
    config = patterns.configs(name)[0]
    snapshot(show_plan(plan_of(patterns.load(name), dict(config.sizes), config.hyper)))


@pytest.mark.parametrize("name", patterns.names())
def test_every_buffer_is_written_before_it_is_read(name: str) -> None:
    for config in patterns.configs(name, test=True):
        plan = plan_of(patterns.load(name), dict(config.sizes), config.hyper)
        known = {b.name for _, b in plan.inputs}
        for task in plan.tasks:
            assert {b.name for b in task.reads} <= known
            assert len({b.name for b in task.reads}) == len(task.reads)
            known |= {b.name for b in task.writes}
        assert {r.buffer.name for r in plan.results} <= known
        symbolic = {b.name for t in plan.tasks for b in t.writes if -1 in b.shape}
        assert symbolic == {n for n, _ in plan.widths}


def test_missing_sizes_are_named() -> None:
    with pytest.raises(BindingError, match="needs the sizes of Hi, e"):
        plan_of(patterns.load("dsa"), {"Hq": 4, "c": 576})


def test_a_size_that_contradicts_a_hyperparameter() -> None:
    with pytest.raises(
        BindingError, match="the axis l has 8 elements, but the hyperparameter l=32"
    ):
        plan_of(patterns.load("nsa"), {"Hq": 4, "Hk": 2, "D": 8, "E": 8, "l": 8})


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(BindingError, match="5 query heads are no multiple of 2 key heads"):
        plan_of(patterns.load("causal"), {"Hq": 5, "Hk": 2, "D": 8, "E": 8})


def test_a_slice_beyond_its_axis() -> None:
    with pytest.raises(BindingError, match="the slice ends at 512, but the axis has 64") as caught:
        plan_of(patterns.load("dsa"), {"Hq": 4, "c": 64, "Hi": 2, "e": 8})
    assert caught.value.at is not None
    assert caught.value.at.file.endswith("dsa.py")


def test_one_axis_for_both_cannot_be_paged() -> None:
    @sg.pattern
    def own(q: "T H D", k: "T H D", v: "T H D"):  # type: ignore
        i, j = sg.index(q, k)
        return sg.attend(q, k, v, where=j <= i)

    with pytest.raises(BindingError, match="cannot be paged"):
        plan_of(own, {"H": 2, "D": 8}, layout="paged", page_size=16)
