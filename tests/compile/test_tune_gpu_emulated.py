"""A search over GPU kernels that crash, hang, lie or cannot be built, emulated on the CPU."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsegen as sg
from sparsegen import api, arch
from sparsegen.runtime import catalog
from sparsegen.tuning import database, isolated, process, records, search
from sparsegen.tuning.machine import Machine
from sparsegen.tuning.result import TaskResult
from sparsegen.tuning.space import Measured, Rejected
from sparsegen.tuning.sweep import Entry, sweep

ROOT = Path(__file__).parents[2]
FAKES = ROOT / "tests" / "gpu" / "faulty_schedules"
SIZES = {"T": 96, "S": 96, "H": 2, "c": 16, "v": 8}
MACHINE = Machine(arch=arch.get("sm_80"), device="Emulated", builders=2, compiler="emulator")
BOOT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.emulator.bench import install
install()
from sparsegen.tuning import worker
"""


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


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(isolated, "LEAST_SECONDS", 3.0)
    for role in ("builder", "cuda"):
        monkeypatch.setitem(process.BOOT, role, BOOT + "sys.exit(worker.serve())")
    monkeypatch.setattr(search, "machine_of", lambda _: MACHINE)


@pytest.fixture
def faulty() -> Iterator[None]:
    catalog.register_path(FAKES)
    yield
    catalog.unregister_path(FAKES)


@pytest.mark.usefixtures("faulty")
def test_the_search_survives_every_fault() -> None:
    result = sg.tune(
        projected, "sm_80", sizes=SIZES, dtype="bfloat16", budget=200, strategy="exhaustive",
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
    assert "SIGSEGV" in why["far"].why
    assert "written out of bounds" in why["bounds"].why
    assert "did not finish within" in why["hang"].why
    assert "output 0 is wrong at" in why["wrong"].why
    assert task.excluded["more than 16 repeats never help"] == 1

    chosen = dict(task.candidate.knobs)
    assert (chosen.get("fault", ""), chosen.get("repeats", 1)) == ("", 1)
    assert task.choice is not None
    assert task.choice.speedup > 2

    # The record says which GPU it is of, and holds sustained and burst samples with their calls.
    (choice,) = (r for r in found if r.what == "choice")
    assert (choice.key.device, choice.key.arch) == ("Emulated", "sm_80")
    assert choice.key.toolchain.endswith(", emulator")
    final = choice.outcome
    assert isinstance(final, Measured)
    assert len(final.burst) == len(final.anchor_burst) == 3
    assert len(final.calls) == len(final.samples) == len(final.anchor_calls)
    assert all(len(calls) >= 6 for calls in final.calls)

    # It counts on that GPU, and on no other.
    plan = api.request_of(projected, "sm_80", dtype="bfloat16").plan({"H": 2, "c": 16, "v": 8})
    project = next(t for t in plan.tasks if t.name == "project_1")
    for device, want in (("Emulated", result.schedules["project_1"]), ("Another", None)):
        got = database.lookup(project, arch.get("sm_80"), device=device)
        assert (None if got is None else got.schedule) == want

    # What is in quarantine repeats the failure.
    files = list((database.user_file().parent / "quarantine").glob("*.json"))
    assert len(files) == 5
    wrong = next(f for f in files if json.loads(f.read_text())["knobs"]["fault"] == "wrong")
    again = BOOT + f"from pathlib import Path\nsys.exit(worker.repeat(Path({str(wrong)!r})))"
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=True)
    assert "output 0 is wrong at" in done.stdout


def entry(queries: int, **sizes: int) -> Entry:
    letters = {"H": 2, "c": 16, "v": 8, **sizes}
    plan = api.request_of(projected, "sm_80", dtype="bfloat16").plan(letters)
    tasks = tuple(t for t in plan.tasks if t.name == "project_1")
    shape = records.Sizes(batch=1, query=queries, key=96)
    return Entry(
        name=f"{queries} queries", plan=plan, sizes=shape, distribution="uniform", tasks=tasks
    )


def test_a_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"

    def run(*found: Entry) -> dict[str, tuple[TaskResult, ...] | str]:
        told: dict[str, tuple[TaskResult, ...] | str] = {}
        tell = lambda e, results: told.__setitem__(e.name, results)  # noqa: E731
        assert sweep(found, MACHINE, path, 200, tell, serves="sm_80") == len(found)
        return told

    first = run(entry(96), entry(40))
    assert all(len(r) == 1 and r[0].choice is not None for r in first.values())
    lines = records.read(path)
    choices = [r for r in lines if r.what == "choice"]
    assert {(r.key.sizes.query, r.key.device, r.serves) for r in choices} == {
        (96, "Emulated", "sm_80"), (40, "Emulated", "sm_80"),
    }  # fmt: skip

    again = run(entry(96), entry(24), entry(40))
    for name in ("96 queries", "40 queries"):
        (result,) = again[name]
        assert isinstance(result, TaskResult)
        assert "chosen in an earlier run" in str(result)
        assert result.candidate == first[name][0].candidate
    new = records.read(path)[len(lines) :]
    assert {r.key.sizes.query for r in new} == {24}
