"""Whole searches over a schedule whose candidates crash, hang, lie or cannot be built."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsegen as sg
from sparsegen import api, arch
from sparsegen.runtime import catalog
from sparsegen.tuning import database, isolated, records
from sparsegen.tuning.space import Rejected
from tests.faults import projected

FAKES = Path(__file__).parent / "fake_schedules"
SIZES = {"T": 256, "S": 256, "H": 2, "c": 32, "v": 16}


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("SPARSEGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(isolated, "LEAST_SECONDS", 2.0)
    catalog.register_path(FAKES)
    yield
    catalog.unregister_path(FAKES)


def knobs(record: records.Record) -> tuple[object, ...]:
    return (record.candidate.schedule, *dict(record.candidate.knobs).values())


def test_the_right_winner_whatever_the_others_do() -> None:
    result = sg.tune(projected, sizes=SIZES, budget=120, strategy="exhaustive", tasks=["project_1"])
    (task,) = result.tasks
    fakes = [r for r in records.read(database.user_file()) if r.candidate.schedule[-4:] == "fake"]
    stages = {
        dict(r.candidate.knobs)["fault"]: r.outcome.stage
        for r in fakes
        if isinstance(r.outcome, Rejected)
    }
    assert stages == {
        "build": "build", "crash": "check", "hang": "check", "wrong": "check", "bounds": "check",
    }  # fmt: skip
    why = {dict(r.candidate.knobs)["fault"]: r.outcome for r in fakes}
    assert "cannot be built" in why["build"].why
    assert "SIGSEGV" in why["crash"].why
    assert "did not finish within" in why["hang"].why
    assert "output 0 is wrong at" in why["wrong"].why
    assert "written out of bounds" in why["bounds"].why
    assert task.excluded["more than 8 repeats never help"] == 1

    # The shipped kernel takes part too; whichever wins, slow and faulty ones do not.
    chosen = dict(task.candidate.knobs)
    assert chosen.get("fault", "") == ""
    assert chosen.get("repeats", 1) == 1
    assert task.choice is not None
    assert task.choice.speedup > 2
    assert str(result).splitlines()[-1] == f"schedule={result.schedules['project_1']!r}"

    # Compiling finds the choice, for near sizes too, and for this architecture only.
    request = api.request_of(projected)
    plan = request.plan({k: v for k, v in SIZES.items() if k not in "TS"})
    project = next(t for t in plan.tasks if t.name == "project_1")
    for sizes in (None, {"query": 256, "key": 256}, {"key": 4096}):
        found = database.lookup(project, arch.host(), sizes)
        assert found is not None
        assert found.schedule == result.schedules["project_1"]
    assert database.lookup(project, arch.get("generic")) is None

    # Quarantined candidates come with what repeats the failure.
    files = list((database.user_file().parent / "quarantine").glob("*.json"))
    assert len(files) == 5
    wrong = next(f for f in files if json.loads(f.read_text())["knobs"]["fault"] == "wrong")
    done = subprocess.run(
        [sys.executable, "-m", "sparsegen.tuning.worker", str(wrong)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "output 0 is wrong at" in done.stdout


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from test_tune_search import FAKES, SIZES, projected
import sparsegen as sg
from sparsegen.runtime import catalog
catalog.register_path(FAKES)
sg.tune(
    projected, sizes=SIZES, budget=120, strategy="exhaustive", tasks=["project_1"], records={file!r}
)
"""


def test_a_search_killed_half_way_goes_on_where_it_was(tmp_path: Path) -> None:
    file, mark = tmp_path / "r.jsonl", uuid.uuid4().hex
    script = SCRIPT.format(here=str(Path(__file__).parent), file=str(file))
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "MARK": mark})
    until = time.monotonic() + 100
    while (len(file.read_bytes().splitlines()) if file.exists() else 0) < 3:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 10
    while workers(mark):
        assert time.monotonic() < until, "workers die with the search"
        time.sleep(0.05)
    with file.open("ab") as tail:
        tail.write(b'{"schema":1,"what":"cand')
    before = {knobs(r) for r in records.read(file)}

    result = sg.tune(
        projected, sizes=SIZES, budget=120, strategy="exhaustive", tasks=["project_1"],
        records=file,
    )  # fmt: skip
    lines = [knobs(r) for r in records.read(file) if r.what == "candidate"]
    again = {k for k in before if lines.count(k) > 1}
    assert again <= {("project_fake", 8, "")}, "only the default, beside which the others are timed"
    assert dict(result.tasks[0].candidate.knobs).get("repeats", 1) == 1


def workers(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # it ended while we looked
    return found


def test_no_time_at_all_keeps_the_default() -> None:
    result = sg.tune(projected, sizes=SIZES, budget=0.01, tasks=["project_1"])
    (task,) = result.tasks
    assert task.candidate.schedule == "project_fake"
    assert dict(task.candidate.knobs)["repeats"] == 8
    assert "default kept" in str(result)


def test_what_cannot_be_tuned_is_refused() -> None:
    for change, what in (
        ({"budget": 0}, "budget=0"),
        ({"tasks": ["project_9"]}, "no task 'project_9'"),
        ({"strategy": "exhaustion"}, "unknown strategy"),
        ({"target": "aarch64_neon"}, "aarch64_neon is for aarch64"),
        ({"sizes": {k: v for k, v in SIZES.items() if k != "S"}}, "needs the length of S"),
    ):
        with pytest.raises(sg.BindingError, match=what):
            sg.tune(projected, **{"sizes": SIZES, **change})
    with pytest.raises(sg.TuningError, match="unknown index distribution 'unifrom'"):
        sg.tune(projected, sizes=SIZES, distribution="unifrom")
