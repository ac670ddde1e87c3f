"""Searches on a GPU: faults of kernels end a worker and no more, and choices are found again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sparsegen as sg
from sparsegen import api
from sparsegen.tuning import database, records
from tests import faults

pytestmark = pytest.mark.gpu

SIZES = {"T": 2048, "S": 2048, "H": 8, "c": 64, "v": 64}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEGEN_CACHE_DIR", str(tmp_path / "cache"))


@faults.registered()
def test_the_search_survives_every_fault() -> None:
    crash = "illegal memory access"
    faults.survive("cuda", SIZES, crash)
    files = faults.quarantined()
    for fault in (faults.CRASH, "wrong"):
        done = subprocess.run(
            [sys.executable, "-m", "sparsegen.tuning.worker", str(files[fault])],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (faults.FAULTS[fault][1] or crash) in done.stdout


def test_a_choice_is_recorded_and_used() -> None:
    sizes = {"T": 512, "S": 512, "Hq": 8, "Hk": 2, "D": 64, "E": 64}
    result = sg.tune("causal", "cuda", sizes=sizes, dtype="bfloat16", budget=120)
    (task,) = result.tasks
    faults.choice_of(records.read(database.user_file()))
    kernel = sg.compile("causal", "cuda", sizes=sizes, dtype="bfloat16")
    (used,) = kernel.schedules.values()
    assert used.name == task.candidate.schedule
    if task.choice is not None and task.choice.candidate != task.choice.default:
        assert dict(used.knobs).items() >= dict(task.candidate.knobs).items()
    plan = api.request_of("causal", "cuda", dtype="bfloat16").plan(
        {k: v for k, v in sizes.items() if k not in "TS"}
    )
    arch = api.arch_of("cuda")
    assert database.lookup(plan.tasks[0], arch, device="another GPU") is None
