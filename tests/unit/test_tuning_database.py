from dataclasses import replace
from pathlib import Path

import pytest

from sparsegen import arch, patterns
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.runtime.catalog import Schedule
from sparsegen.tuning import database
from sparsegen.tuning.candidates import toolchain
from sparsegen.tuning.records import Key, Origin, Record, Sizes, Writer, task_hash
from sparsegen.tuning.space import Candidate, Measured

BINDING = Binding(sizes=(("D", 8), ("E", 8), ("Hk", 1), ("Hq", 2)))
PLAN = partition(patterns.load("causal").program, BINDING)
(TASK,) = PLAN.tasks
ARCH = replace(arch.get("x86_64_v3"), cores=2)
KEY = Key(
    task=task_hash(TASK), sizes=Sizes(batch=1, query=64, key=8192), distribution="none",
    arch=ARCH.name, threads=2, toolchain=toolchain(["attend_cpu"]),
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEGEN_CACHE_DIR", str(tmp_path))


def record(
    tokens: int, what: str = "choice", micros: float = 1.0, serves: str = "",
    candidate: Candidate | None = None, **changes: object,
) -> None:  # fmt: skip
    fast = Measured((micros,), (2.0,))
    with Writer(database.user_file()) as writer:
        writer.write(
            Record(
                what=what,
                key=replace(KEY, **changes),
                origin=Origin(program="causal", program_hash="", binding={}, task="attend_1"),
                candidate=candidate or Candidate.of("attend_cpu", {"tokens": tokens}),
                outcome=fast,
                serves=serves,
            )
        )


def tokens(**sizes: int) -> int | None:
    found = database.lookup(TASK, ARCH, sizes)
    assert found is None or isinstance(found.schedule.knobs["tokens"], int)
    return None if found is None else found.schedule.knobs["tokens"]


def test_nothing_recorded_means_nothing_found() -> None:
    assert tokens() is None
    record(4, what="candidate")
    assert tokens() is None


def test_the_exact_size_comes_first_then_the_nearest() -> None:
    for n, keys in ((2, 1024), (4, 8192), (8, 65536)):
        record(n, sizes=Sizes(batch=1, query=64, key=keys))
    assert [tokens(query=64, key=k) for k in (1000, 8192, 20000, 1 << 20)] == [2, 4, 4, 8]
    assert tokens(key=1024) == 2
    assert tokens() == 8, "without sizes, the largest that was tuned"


def test_the_newest_of_equals_counts() -> None:
    record(2)
    record(4)
    assert tokens(query=64, key=8192) == 4


def test_where_the_default_was_kept_it_is_used_as_it_is_now() -> None:
    record(2, sizes=Sizes(batch=1, query=64, key=65536))
    record(4, micros=2.0)
    assert tokens(query=64, key=8192) is None
    assert tokens(query=64, key=65536) == 2


def test_other_tasks_and_processors_do_not_count() -> None:
    record(2, task="0" * 16)
    record(2, arch="znver4")
    assert tokens() is None


def test_real_traces_are_preferred_to_drawn_indices() -> None:
    record(2, distribution="uniform")
    record(4, distribution="trace:abc")
    record(8, distribution="clustered")
    assert tokens() == 4


def test_a_record_of_older_sources_counts_if_its_knobs_still_exist() -> None:
    record(2, toolchain="tvm 0.1, 000")
    assert tokens() == 2
    with Writer(database.user_file()) as writer:
        stale = Candidate.of("attend_cpu", {"no_such_knob": 3})
        origin = Origin(program="causal", program_hash="", binding={}, task="attend_1")
        key = replace(KEY, toolchain="tvm 0.1, 001")
        outcome = Measured((1.0,), (2.0,))
        writer.write(
            Record(what="choice", key=key, origin=origin, candidate=stale, outcome=outcome)
        )
    assert tokens() == 2


def test_compile_uses_what_is_recorded() -> None:
    record(2)
    (found,) = database.recorded(PLAN, ARCH).values()
    assert found.schedule == Schedule("attend_cpu", tokens=2)
    assert str(found) == "measured on x86_64_v3 with 2 threads at 1 x 64 queries, 8192 keys"


def test_compile_takes_lengths_for_what_the_kernel_will_meet() -> None:
    record(2, sizes=Sizes(batch=1, query=1, key=1024))
    record(4, sizes=Sizes(batch=1, query=4096, key=4096))
    for given, want in (({}, 4), ({"T": 1}, 2), ({"T": 1000, "S": 3000}, 4), ({"S": 700}, 2)):
        (found,) = database.recorded(PLAN, ARCH, {"Hq": 2, **given}).values()
        assert found.schedule.knobs["tokens"] == want


def test_a_gpu_uses_its_own_records_first_and_others_that_say_so() -> None:
    gpu = arch.get("sm_90")
    (task,) = partition(patterns.load("causal").program, replace(BINDING, dtype="bfloat16")).tasks
    key = {
        "task": task_hash(task), "arch": "sm_90", "threads": 132,
        "toolchain": toolchain(["attend_mma"]) + ", nvcc 13.0",
    }  # fmt: skip

    def warps(device: str, **sizes: int) -> object:
        found = database.lookup(task, gpu, sizes, device=device)
        return None if found is None else (found.schedule.knobs["warps"], found.record.key.device)

    def add(warps: int, device: str, serves: str, keys: int) -> None:
        record(
            1, candidate=Candidate.of("attend_mma", {"warps": warps, "keys": 64}), serves=serves,
            device=device, sizes=Sizes(batch=1, query=64, key=keys), **key,
        )  # fmt: skip

    add(1, "NVIDIA H200", "", 8192)
    assert warps("NVIDIA H200") == (1, "NVIDIA H200")
    assert warps("NVIDIA H100") is None, "nothing says that it serves others"
    assert warps("") is None
    add(2, "NVIDIA H200", "sm_90", 65536)
    assert warps("NVIDIA H100", key=8192) == warps("", key=8192) == (2, "NVIDIA H200")
    assert warps("NVIDIA H200", key=8192) == (1, "NVIDIA H200"), "the nearest size of its own"
    add(4, "NVIDIA H100", "", 128)
    assert warps("NVIDIA H100", key=65536) == (4, "NVIDIA H100"), "its own, however far"
    assert database.lookup(task, arch.get("sm_80"), device="NVIDIA H200") is None


def test_what_is_shipped_can_be_read() -> None:
    for path in database.shipped_files():
        assert database._read(path), f"{path} holds no choice"
