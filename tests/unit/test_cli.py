import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsegen import cli
from sparsegen.cli import _pattern
from sparsegen.errors import BindingError
from sparsegen.tuning.records import Key, Origin, Record, Sizes, Writer
from sparsegen.tuning.space import Candidate, Measured, Rejected


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as leave:
        code = int(leave.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_every_verb_has_help_and_its_usage_works(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for verb, module in cli.VERBS.items():
        assert verb in out
        assert module.HELP[0].islower()
        assert run(capsys, verb, "--help")[0] == 0


@pytest.mark.parametrize("arguments", [["list"], ["list", "archs"], ["list", "tuned"]])
def test_only_the_verb_at_hand_is_imported(arguments: list[str]) -> None:
    code = (
        f"import sys; from sparsegen.cli import main; main({arguments}); "
        "found = {'sparsegen.cli.tune', 'tvm', 'torch', 'sympy'} & set(sys.modules); "
        "sys.exit(repr(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "sparsegen", "list", "patterns"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dsa" in done.stdout


def test_list_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", "--json")
    listed = json.loads(out)
    assert code == 0
    rows = {kind: {row["name"]: row for row in rows} for kind, rows in listed.items()}
    assert rows["schedules"]["attend_cpu"]["family"] == "attend"
    assert rows["schedules"]["attend_cpu"]["requires"] == ["cpu"]
    assert rows["patterns"]["dsa"]["about"].startswith("Select tokens")
    assert set(rows["verbs"]) == set(cli.VERBS)
    assert all(
        row["about"].endswith((".", ").")) for kind in rows.values() for row in kind.values()
    )


def test_a_wrong_word_is_an_error_with_a_fix(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, what, fix in (
        (["lst"], "error: unknown verb 'lst'", "fix: did you mean 'list'?"),
        (["list", "--jso1"], "error: ", "fix: `sparsegen --help` shows the usage"),
        (["tune", "das", "--sizes", "T=1"], "unknown pattern 'das'", "did you mean 'dsa'?"),
        (["tune", "dsa", "--sizes", "T=x"], "'T=x' is not LETTER=NUMBER", "tune --help"),
        (["tune", "dsa", "--budget", "soon"], "'soon' is not a time", "tune --help"),
        (["tune", "dsa", "--config", "glm-4"], "dsa has no shape 'glm-4'", "did you mean 'glm-5'?"),
        (["tune", "none.py:x"], "no file 'none.py'", "FILE.py:NAME"),
        (["records", "show", "/nowhere/r.jsonl"], "no records in", "sparsegen tune"),
    ):
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, "")
        assert what in err
        assert fix in err
        assert "Traceback" not in err


def test_a_traceback_is_there_for_the_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEGEN_TRACEBACK", "1")
    with pytest.raises(BindingError, match="unknown verb"):
        cli.main(["lst"])


def test_a_fault_of_ours_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.VERBS["list"], "run", lambda args: 1 // 0)
    code, _, err = run(capsys, "list")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "SPARSEGEN_TRACEBACK=1" in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys; from sparsegen.cli import main; sys.exit(main(['list', '--json']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_doctor_checks_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--json")
    findings = {f["what"]: f for f in json.loads(out)}
    assert code == (0 if all(f["ok"] for f in findings.values()) else 1)
    assert findings["apache-tvm"]["ok"]
    assert "cores" in findings["target"]["found"]
    assert all(f["ok"] or f["fix"] for f in findings.values())


def test_doctor_names_the_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "BAD C++ compiler" in out
    assert "fix: install g++ or clang++" in out


def test_doctor_knows_the_pins() -> None:
    from sparsegen.codegen import tvm

    assert cli.VERBS["doctor"]._PINNED == tvm.PINS


def test_values_are_read_for_what_they_are(tmp_path: Path) -> None:
    assert _pattern.sizes("T=64, S=8192") == {"T": 64, "S": 8192}
    read = [_pattern.setting(f"x={v}")[1] for v in ("3", "0.5", "true", "None", "mean")]
    assert read == [3, 0.5, True, None, "mean"]
    assert [_pattern.seconds(t) for t in ("90", "60s", "1.5m", "1h")] == [90, 60, 90, 3600]
    assert _pattern.config("dsa", "glm-5")[0]["Hq"] == 64


def test_a_pattern_may_be_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import sparsegen as sg\n\n\n@sg.pattern\n"
        'def near(q: sg.Tensor["T H D"], k: sg.Tensor["S H D"], v: sg.Tensor["S H D"]):\n'
        "    i, j = sg.index(q, k)\n    return sg.attend(q, k, v, where=(j <= i) & (i - j < 8))\n"
    )
    assert _pattern.pattern(f"{file}:near").name == "near"
    with pytest.raises(BindingError, match="did you mean 'near'"):
        _pattern.pattern(f"{file}:neat")


KEY = Key(
    task="ab12", sizes=Sizes(batch=1, query=64, key=8192), distribution="uniform",
    arch="x86_64_v4", threads=2, toolchain="t1",
)  # fmt: skip
ORIGIN = Origin(program="dsa", program_hash="77", binding={"dtype": "float32"}, task="attend_1")


def write(path: Path, block: int, micros: float) -> Path:
    candidate = Candidate.of("attend_cpu", {"block": block})
    fast = Measured((micros,) * 3, (100.0,) * 3)
    with Writer(path) as writer:
        for what, outcome in (
            ("candidate", fast),
            ("candidate", Rejected("check", "o is wrong")),
            ("choice", fast),
        ):
            writer.write(
                Record(what=what, key=KEY, origin=ORIGIN, candidate=candidate, outcome=outcome)
            )
    return path


def test_records_are_shown_merged_and_compared(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    a, b = write(tmp_path / "a", 16, 50.0), write(tmp_path / "b", 32, 40.0)
    _, out, _ = run(capsys, "records", "show", str(a))
    assert "dsa.attend_1 float32 B=1 queries=64 keys=8192 uniform x86_64_v4x2" in out
    assert "50 us, 2.00x the default  sg.Schedule('attend_cpu', block=16)" in out
    assert "1 choices, 2 candidates, 1 rejected at stage 'check'" in out
    _, out, _ = run(capsys, "records", "show", str(a), "--json")
    assert json.loads(out)["rejected"] == {"check": 1}
    _, out, _ = run(capsys, "records", "diff", str(a), str(b))
    assert "- 50 us, 2.00x the default" in out
    assert "+ 40 us, 2.50x the default" in out
    into = tmp_path / "all"
    assert run(capsys, "records", "merge", str(into), str(a), str(b))[1].startswith("6 records")
    assert "exists" in run(capsys, "records", "merge", str(into), str(a))[2]
    one = tmp_path / "one"
    run(capsys, "records", "merge", "--choices", str(one), str(a), str(b))
    assert len(one.read_text().splitlines()) == 1
