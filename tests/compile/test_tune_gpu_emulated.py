"""A search over GPU kernels that crash, hang, lie or cannot be built, emulated on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from sparsegen import api, arch
from sparsegen.tuning import database, isolated, process, records, search
from sparsegen.tuning.machine import Machine
from sparsegen.tuning.result import TaskResult
from sparsegen.tuning.sweep import Entry, sweep
from tests import faults
from tests.faults import projected

ROOT = Path(__file__).parents[2]
SIZES = {"T": 96, "S": 96, "H": 2, "c": 16, "v": 8}
MACHINE = Machine(arch=arch.get("sm_80"), device="Emulated", builders=2, compiler="emulator")
BOOT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.emulator.bench import install
install()
from sparsegen.tuning import worker
"""


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(isolated, "LEAST_SECONDS", 3.0)
    for role in ("builder", "cuda"):
        monkeypatch.setitem(process.BOOT, role, BOOT + "sys.exit(worker.serve())")
    monkeypatch.setattr(search, "machine_of", lambda _: MACHINE)


@faults.registered()
def test_the_search_survives_every_fault() -> None:
    result, found = faults.survive("sm_80", SIZES, crash="SIGSEGV")

    # The record says which GPU it is of.
    choice = faults.choice_of(found)
    assert (choice.key.device, choice.key.arch) == ("Emulated", "sm_80")
    assert choice.key.toolchain.endswith(", emulator")

    # It counts on that GPU, and on no other.
    plan = api.request_of(projected, "sm_80", dtype="bfloat16").plan({"H": 2, "c": 16, "v": 8})
    project = next(t for t in plan.tasks if t.name == "project_1")
    for device, want in (("Emulated", result.schedules["project_1"]), ("Another", None)):
        got = database.lookup(project, arch.get("sm_80"), device=device)
        assert (None if got is None else got.schedule) == want

    # What is in quarantine repeats the failure.
    wrong = faults.quarantined()["wrong"]
    again = BOOT + f"from pathlib import Path\nsys.exit(worker.repeat(Path({str(wrong)!r})))"
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=True)
    assert faults.FAULTS["wrong"][1] in done.stdout


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
