import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparsegen.errors import TuningError
from sparsegen.tuning import records
from sparsegen.tuning.records import Key, Origin, Record, Sizes, Writer
from sparsegen.tuning.space import Candidate, Measured, Rejected

KEY = Key(
    task="ab12", sizes=Sizes(batch=1, query=64, key=8192), distribution="uniform",
    arch="x86_64_v4", threads=2, toolchain="t1",
)  # fmt: skip
ORIGIN = Origin(program="dsa", program_hash="77", binding={"dtype": "float32"}, task="attend_1")


def candidate(n: int) -> Candidate:
    return Candidate.of("attend_cpu", {"block": n, "packed": n % 2 == 0, "order": "hd"})


def record(n: int, what: str = "candidate", **kw) -> Record:
    outcome = kw.pop("outcome", Measured((10.0, 11.0, 10.5), (20.0, 21.0, 20.5)))
    return Record(
        what=what, key=kw.pop("key", KEY), origin=ORIGIN, candidate=candidate(n), outcome=outcome,
        **kw,
    )  # fmt: skip


def write(path: Path, *items: Record) -> None:
    with Writer(path) as writer:
        for item in items:
            writer.write(item)


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.jsonl"
    wrong = Rejected("check", "o is wrong")
    items = [
        record(1, time="2026-01-01T00:00:00+00:00"),
        record(2, time="2026-01-02T00:00:00+00:00", outcome=wrong),
    ]
    write(path, *items)
    assert records.read(path) == items
    assert json.loads(path.read_text().splitlines()[0])["samples"] == [10.0, 11.0, 10.5]


def test_a_knob_keeps_its_type(tmp_path: Path) -> None:
    write(tmp_path / "r", record(2))
    (back,) = records.read(tmp_path / "r")
    assert [type(v) for _, v in back.candidate.knobs] == [int, bool, str]


@pytest.mark.parametrize("cut", [1, 5, 80])
def test_a_kill_while_writing_costs_that_line_only(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    write(path, record(1), record(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = 2 if cut == 1 else 1
    assert len(records.read(path)) == kept
    write(path, record(3))
    assert [r.candidate for r in records.read(path)] == [
        candidate(n) for n in (1, 2, 3) if n == 3 or n <= kept
    ]


def test_a_damaged_line_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, record(1), record(2))
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first[:40] + "\n" + second)
    with pytest.raises(TuningError, match=r"r\.jsonl:1: not a record"):
        records.read(path)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, record(1))
    path.write_text(path.read_text().replace('"schema":1', '"schema":99'))
    with pytest.raises(TuningError, match="schema 99, this sparsegen reads 1"):
        records.read(path)


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, record(1))
    path.write_text(path.read_text().replace('"threads":2', '"threads":2,"moon":1'))
    with pytest.raises(TuningError, match="moon"):
        records.read(path)


def test_resume_sees_only_the_same_key(tmp_path: Path) -> None:
    other = Key(**{**KEY.__dict__, "toolchain": "t2"})
    path = tmp_path / "r.jsonl"
    write(path, record(1), record(2, key=other), record(3, what="choice"))
    assert list(records.seen(records.read(path), KEY)) == [candidate(1)]


def test_merging_keeps_each_line_once_oldest_first(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    old, new = (record(n, time=f"2026-01-0{n}T00:00:00+00:00") for n in (1, 2))
    write(a, new)
    write(b, old, new)
    assert list(records.merge([a, b])) == [old, new]


def test_two_writers_may_append_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ThreadPoolExecutor(2) as pool:
        for start in (0, 100):
            pool.submit(write, path, *(record(start + n) for n in range(20)))
    assert len(records.read(path)) == 40


def test_buckets_and_distance() -> None:
    near, far = Sizes(batch=1, query=60, key=8000), Sizes(batch=1, query=64, key=65536)
    assert near.bucket == KEY.sizes.bucket
    assert near.distance(KEY.sizes) < 0.2 < 2.9 < far.distance(KEY.sizes)
