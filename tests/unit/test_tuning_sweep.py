import json
from dataclasses import replace

import pytest

from sparsegen import patterns
from sparsegen.errors import BindingError
from sparsegen.tuning import sweep
from sparsegen.tuning.records import Key, Origin, Record, Sizes, task_hash
from sparsegen.tuning.space import Candidate, Measured
from sparsegen.tuning.sweep import database, entries, fitting


def test_first_shapes_come_first_then_others_then_distributions_then_small_kernels() -> None:
    found = entries(["moba", "causal"], "bfloat16", ["clustered", "uniform"])
    names = [(e.name, e.plan.binding.layout, e.distribution) for e in found]
    assert names[:3] == [
        ("moba/8k", "sequence", "clustered"), ("causal/llama-3-8b", "sequence", "clustered"),
        ("moba/32k", "sequence", "clustered"),
    ]  # fmt: skip
    assert ("causal/llama-3-8b-decode", "paged", "clustered") in names
    gathering = [e for e in found if e.distribution == "uniform"]
    assert {e.name.partition("/")[0] for e in gathering} == {"moba"}
    assert {t.name for e in gathering for t in e.tasks} == {"attend_1"}
    families = [[t.family for t in e.tasks] for e in found]
    assert families[0] == ["select", "attend"]
    assert families[-3:] == [["compress"]] * 3, "one for each shape of moba"


def test_no_task_is_tuned_twice_at_one_size() -> None:
    found = entries(patterns.names(), "bfloat16", ["uniform", "local"])
    keys = [
        (task_hash(t), e.sizes, e.distribution if t.lists else "none")
        for e in found
        for t in e.tasks
    ]
    assert len(set(keys)) == len(keys)
    assert {e.name.partition("/")[0] for e in found} == set(patterns.names())


def test_what_is_too_large_is_halved_and_says_so() -> None:
    large, _ = (e for e in entries(["moba"], "bfloat16", ["uniform"]) if e.name == "moba/1m")
    assert large.sizes == Sizes(batch=1, query=4096, key=1 << 18)
    assert "the shape has B=1 queries=4096 keys=1048576" in str(large)
    sizes = Sizes(batch=8, query=64, key=64)
    plan = large.plan
    whole = sweep._bytes(sweep.Subject(plan, plan.tasks[-1]), sizes)
    assert fitting(plan, sizes, whole) == sizes
    assert fitting(plan, sizes, whole - 1) == replace(sizes, batch=4)
    assert fitting(plan, sizes, whole // 16) == Sizes(batch=1, query=32, key=32)


def test_what_ships_are_the_last_choices_without_single_calls() -> None:
    key = Key(
        task="ab", sizes=Sizes(batch=1, query=1, key=64), distribution="none", arch="sm_90",
        threads=132, toolchain="t", device="NVIDIA H200",
    )  # fmt: skip
    origin = Origin(program="causal", program_hash="", binding={}, task="attend_1")
    measured = Measured((1.0,), (2.0,), (0.9,), (1.9,), ((1.0, 1.1),), ((2.0, 2.1),))

    def record(n: int, what: str, **changes: object) -> Record:
        return Record(
            what=what, key=replace(key, **changes), origin=origin, outcome=measured,
            candidate=Candidate.of("attend_mma", {"warps": n}), time=str(n), serves="sm_90",
        )  # fmt: skip

    known = [
        record(1, "candidate"), record(2, "choice"), record(3, "choice", toolchain="newer"),
        record(4, "choice", device="NVIDIA H100"),
    ]  # fmt: skip
    kept = database(known)
    assert [dict(r.candidate.knobs)["warps"] for r in kept] == [3, 4]
    assert all(r.outcome == replace(measured, calls=(), anchor_calls=()) for r in kept)
    assert [Record.from_json(json.loads(r.to_json())) for r in [*known, *kept]] == [
        *known, *kept,
    ]  # fmt: skip


def test_a_name_that_is_no_pattern_is_refused() -> None:
    with pytest.raises(BindingError, match="dsaa"):
        entries(["dsaa"], "bfloat16", ["uniform"])
