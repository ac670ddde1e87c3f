"""Searches on a GPU: faults of kernels end a worker and no more, and choices are found again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsegen as sg
from sparsegen import api
from sparsegen.runtime import catalog
from sparsegen.tuning import database, records
from sparsegen.tuning.space import Measured, Rejected
from tests.compile.test_tune_gpu_emulated import FAKES, projected

pytestmark = pytest.mark.gpu

SIZES = {"T": 2048, "S": 2048, "H": 8, "c": 64, "v": 64}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEGEN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def faulty() -> Iterator[None]:
    catalog.register_path(FAKES)
    yield
    catalog.unregister_path(FAKES)


@pytest.mark.usefixtures("faulty")
def test_the_search_survives_every_fault() -> None:
    result = sg.tune(
        projected, "cuda", sizes=SIZES, dtype="bfloat16", budget=200, strategy="exhaustive",
        tasks=["project_1"],
    )  # fmt: skip
    (task,) = result.tasks
    found = records.read(database.user_file())
    fakes = [r for r in found if r.what == "candidate" and r.candidate.schedule[-6:] == "faulty"]
    why = {dict(r.candidate.knobs)["fault"]: r.outcome for r in fakes}
    stages = {k: r.stage for k, r in why.items() if isinstance(r, Rejected)}
    assert stages == {
        "build": "build", "far": "check", "bounds": "check", "hang": "check", "wrong": "check",
    }  # fmt: skip
    assert "illegal memory access" in why["far"].why
    assert "written out of bounds" in why["bounds"].why
    assert "did not finish within" in why["hang"].why
    assert "output 0 is wrong at" in why["wrong"].why
    chosen = dict(task.candidate.knobs)
    assert (chosen.get("fault", ""), chosen.get("repeats", 1)) == ("", 1)
    assert task.choice is not None
    assert task.choice.speedup > 2

    files = (database.user_file().parent / "quarantine").glob("*.json")
    for file in files:
        fault = json.loads(file.read_text())["knobs"]["fault"]
        if fault in ("far", "wrong"):
            done = subprocess.run(
                [sys.executable, "-m", "sparsegen.tuning.worker", str(file)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            want = {"far": "illegal memory access", "wrong": "output 0 is wrong at"}[fault]
            assert want in done.stdout


def test_a_choice_is_recorded_and_used() -> None:
    sizes = {"T": 512, "S": 512, "Hq": 8, "Hk": 2, "D": 64, "E": 64}
    result = sg.tune("causal", "cuda", sizes=sizes, dtype="bfloat16", budget=120)
    (task,) = result.tasks
    (choice,) = (r for r in records.read(database.user_file()) if r.what == "choice")
    final = choice.outcome
    assert isinstance(final, Measured)
    assert len(final.burst) == 3
    assert all(len(calls) >= 6 for calls in final.calls)
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
