"""Explanations: published figures, every shipped pattern, errors, and the text as it is printed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sparsegen as sg
from sparsegen import arch, cli, patterns
from sparsegen.errors import BindingError, UnsupportedError
from sparsegen.report import Explanation
from sparsegen.report.model import Amount, Scheduled
from sparsegen.tuning.database import Found
from sparsegen.tuning.records import Key, Sizes

ZEN = dataclasses.replace(arch.get("znver4"), cores=2)


@pytest.fixture(autouse=True)
def _no_records_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEGEN_CACHE_DIR", str(tmp_path))


@pytest.fixture
def zen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Explain for one CPU, whatever machine this is."""
    monkeypatch.setattr(arch, "host", lambda: ZEN)


def explained(name: str, config: str, target: str = "cpu", **more: Any) -> Explanation:
    shape = next(c for c in patterns.configs(name) if c.name == config)
    given = {"sizes": shape.sizes, **shape.hyper, **more}
    return sg.explain(name, target, **given)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as leave:
        code = int(leave.code or 0)
    return (code, *capsys.readouterr())


ALL = [
    pytest.param(name, config, id=f"{name}-{config}")
    for name in patterns.names()
    for config in patterns.configs(name)
]


@pytest.mark.parametrize(("name", "config"), ALL)
def test_every_shipped_shape_is_explained(name: str, config: patterns.Config) -> None:
    found = sg.explain(name, sizes=config.sizes, **config.hyper)
    printed = str(found)
    assert all(len(line) <= 130 for line in printed.splitlines())
    for task in found.tasks:
        assert task.schedule is not None
        assert task.schedule.name is not None
        assert task.bound.seconds > 0
        assert task.name in printed
    assert found.seconds == pytest.approx(sum(t.bound.seconds for t in found.tasks))
    for what, amount in found.total.items():
        assert amount.value == sum(task.cost[what].value for task in found.tasks)
    assert found.step.attended.value > 0
    assert found.cache.elements.value >= 0
    assert json.loads(found.to_json()) == found.to_dict()


@pytest.mark.parametrize("name", ["causal", "dsa", "mla_prefill", "quest"])
def test_patterns_are_explained_for_a_gpu_that_is_not_here(name: str) -> None:
    config = patterns.configs(name)[-1]
    found = sg.explain(name, "sm_90", sizes=config.sizes, dtype="bfloat16", **config.hyper)
    assert "989,400 GFLOP/s in bfloat16" in str(found)
    for task in found.tasks:
        assert task.schedule is not None
        others = dict(task.schedule.others)
        assert others[f"{task.family}_cpu"] == "needs cpu, which sm_90 does not have"


def test_mla_keeps_576_elements_and_saves_98_percent() -> None:
    found = explained("mla_decode", "deepseek-v3", dtype="bfloat16")
    assert {k.name: k.elements.value for k in found.cache.kept} == {"c_kv": 512, "k_rope": 64}
    assert (found.cache.elements.formula, found.cache.elements.value) == ("c + r", 576)
    assert found.cache.bytes.value == 1152
    assert (found.cache.multi_head.formula, found.cache.multi_head.value) == ("2*H*v", 32768)
    assert round(found.cache.saving, 1) == 98.2
    assert "c + r = 576 elements, 1,152 bytes" in str(found)
    assert "2*H*v = 32,768 elements; this is 98.2 % less" in str(found)


def test_nsa_reads_5632_tokens_at_64k() -> None:
    step = explained("nsa", "nsa-27b-decode").step
    assert (step.at_most.formula, step.at_most.value) == ("S/16 + 1536", 5632)
    assert step.attended.value == 5631  # the last window of 32 is never complete
    printed = str(explained("nsa", "nsa-27b-decode"))
    assert "tokens read: S/16 + 1536 = 5,632" in printed
    assert "= 5,631:" in printed
    assert "incomplete windows" in printed


def test_dsa_costs_an_indexer_and_a_budget_per_query() -> None:
    step = explained("dsa", "deepseek-v3.2-decode").step
    assert step.flops["select_1"].formula == "2*Hi*S*e"
    assert step.flops["select_1"].value == 2 * 64 * 128 * 32768
    assert step.flops["attend_1"].formula == "2*Hq*(c + 512)*Min(2048, S)"
    assert step.total.value == 2 * 64 * 128 * 32768 + 2 * 128 * (576 + 512) * 2048
    assert (step.attended.value, step.scored.value) == (2048, 32768)
    fewer = explained("dsa", "deepseek-v3.2-decode", topk=512).step
    assert fewer.flops["attend_1"].value * 4 == step.flops["attend_1"].value


def test_long_counts_have_names_that_formulas_use(zen: None) -> None:
    (attend,) = explained("sliding_window", "gpt-oss-120b").tasks
    (domain,) = attend.domains
    assert domain.pairs.name == "pairs_1"
    assert attend.cost["pointwise"].formula == "Hq*pairs_1"
    assert attend.cost["pointwise"].value == 64 * domain.pairs.value
    (causal,) = explained("causal", "llama-3-8b").tasks
    assert causal.domains[0].pairs.name == ""
    assert causal.cost["FLOPs"].formula == "Hq*T*(D + E)*(2*S - T + 1)"


def test_bounds_are_for_all_sequences() -> None:
    sizes = {"T": 1, "S": 8192, "Hq": 8, "Hk": 8, "D": 64, "E": 64}
    one, eight = (sg.explain("causal", sizes={**sizes, "B": b}) for b in (1, 8))
    assert eight.batch == 8
    assert eight.seconds == pytest.approx(8 * one.seconds)
    assert eight.total == one.total
    assert "8 sequences" in str(eight)


def test_a_schedule_that_was_asked_for_is_shown(zen: None) -> None:
    schedule = sg.Schedule("attend_cpu", chunk=32)
    (task,) = explained("causal", "llama-3-8b", schedule=schedule).tasks
    assert task.schedule is not None
    assert (task.schedule.name, task.schedule.origin) == ("attend_cpu", "asked for")
    assert task.schedule.knobs["chunk"] == 32
    with pytest.raises(UnsupportedError, match="attend_mma"):
        explained("causal", "llama-3-8b", schedule=sg.Schedule("attend_mma"))


KEY = Key(
    task="", sizes=Sizes(batch=1, query=4096, key=4096), distribution="none", arch="sm_90",
    threads=132, toolchain="", device="NVIDIA H200",
)  # fmt: skip


def test_a_recorded_choice_is_shown(zen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Found(sg.Schedule("attend_cpu"), SimpleNamespace(key=KEY))
    monkeypatch.setattr(
        "sparsegen.tuning.database.recorded", lambda plan, arch, sizes: {"attend_1": choice}
    )
    found = explained("causal", "llama-3-8b")
    assert found.tasks[0].schedule is not None
    assert found.tasks[0].schedule.origin == "recorded"
    assert "from a tuning record" in str(found)
    source = "measured on NVIDIA H200 at 1 x 4096 queries, 4096 keys"
    assert found.tasks[0].schedule.source == source
    assert source in str(found)


def test_what_no_schedule_takes_is_explained_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(BARE)
    arch.register_path(tmp_path)
    try:
        found = explained("dsa", "deepseek-v3.2-decode", "bare")
    finally:
        arch.unregister_path(tmp_path)
    assert "select_1: no schedule takes it" in str(found)
    assert "attend_1: no schedule takes it" in str(found)
    assert "not select_cpu: needs cpu, which bare does not have" in str(found)
    for task in found.tasks:
        assert task.schedule is not None
        assert task.schedule.name is None
        assert f"{task.family}_cpu" in dict(task.schedule.others)
    assert found.step.total.value > 0


BARE = """
from sparsegen.arch import Arch
ARCH = Arch(
    name="bare", kind="cuda", features=frozenset(), vector_bytes=16, vector_registers=65536,
    peak_flops={"float32": 1e13}, bandwidth=1e12, l1_bytes=1, l2_bytes=1,
    target={"kind": "cuda", "arch": "sm_70"},
)
"""


def test_programs_that_are_no_attention_are_explained() -> None:
    @sg.pattern
    def lists(q: sg.Tensor["T H D"], k: sg.Tensor["S 1 D"], *, n=8):
        i, j = sg.index(q, k)
        score = sg.score(q, k, where=j <= i)
        return sg.select(sg.reduce(score, "max", by=(i, j)), topk=n).indices

    @sg.pattern
    def shared(x: sg.Tensor["S H D"]):
        i, j = sg.index(x, x)
        return sg.attend(x, x, x, where=(j < i) & (j > i))

    found = sg.explain(lists, sizes={"T": 2, "S": 64, "H": 4, "D": 8})
    assert found.cache.multi_head is None
    assert "keys scored to select them: S = 64" in str(found)
    assert "multi-head" not in str(found)
    found = sg.explain(shared.program, sizes={"S": 64, "H": 4, "D": 8})
    assert found.step.attended.value == 0
    assert found.workspace.value == 0


def test_scratch_memory_of_a_schedule_is_shown() -> None:
    found = explained("dsa", "deepseek-v3.2", "sm_90", dtype="bfloat16")
    (schedule,) = (t.schedule for t in found.tasks if t.family == "select")
    assert schedule is not None
    if schedule.name == "select_gpu":
        assert schedule.scratch.value > 0
        assert f"scratch memory: {schedule.scratch} bytes" in str(found)


def test_another_cpu_counts_by_the_core() -> None:
    found = explained("causal", "llama-3-8b", "aarch64_neon")
    assert found.rates.cores == 1
    assert "peaks of 1 core: 40 GFLOP/s in float32, 14 GB/s" in str(found)


def test_a_peak_that_is_not_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arch, "host", lambda: dataclasses.replace(ZEN, peak_flops={}))
    printed = str(explained("causal", "llama-3-8b"))
    assert "no peak of float32 is known" in printed
    assert "matrix products unknown" in printed


@pytest.mark.parametrize(
    ("sizes", "what", "fix"),
    [
        ({"T": 1, "S": 8}, "explaining causal needs the sizes of D, E, Hk, Hq", "'D': ..."),
        ({"T": 1, "Z": 8}, "causal has no axis Z", "choose one of: D, E, Hk, Hq, S, T"),
        ({"T": 1, "hq": 8}, "causal has no axis hq", "did you mean 'Hq'?"),
        ({"T": 0, "S": 8, "D": 4, "E": 4, "Hk": 1, "Hq": 1}, "T=0: an extent", None),
        ({"T": 1, "S": 8, "D": 4, "E": 4, "Hk": 2, "Hq": 3}, "3 query heads are no multiple", None),
        ({"B": 0, "T": 1, "S": 8, "D": 4, "E": 4, "Hk": 1, "Hq": 1}, "B=0: an extent", None),
        (7, "sizes=7 is a int", "pass sizes="),
    ],
)
def test_wrong_sizes_are_named(sizes: Any, what: str, fix: str | None) -> None:
    with pytest.raises(BindingError) as caught:
        sg.explain("causal", sizes=sizes)
    assert what in str(caught.value)
    if fix is not None:
        assert fix in str(caught.value)


def test_a_hyperparameter_is_no_size() -> None:
    with pytest.raises(BindingError, match="no axis topk") as error:
        sg.explain("dsa", sizes={"T": 1, "S": 8, "topk": 5})
    assert error.value.hint == "topk is a hyperparameter: give it beside the sizes, as topk=..."


def test_a_size_that_contradicts_a_hyperparameter_is_named() -> None:
    config = patterns.configs("nsa")[0]
    with pytest.raises(BindingError, match="the axis l has 16 elements, but the hyperparameter"):
        sg.explain("nsa", sizes={**config.sizes, "l": 16})


def test_wrong_words_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, what, fix in (
        (["dsb"], "unknown pattern 'dsb'", "did you mean 'dsa'?"),
        (["dsa"], "explaining dsa needs sizes", "--config deepseek-v3.2 ("),
        (["dsa", "--sizes", "T=1,S=9"], "needs the sizes of Hi, Hq, c, e", "'Hi': ..."),
        (["dsa", "--config", "glm-5", "--target", "sm_91"], "'sm_91'", "did you mean"),
        (["dsa", "--config", "glm-5", "--set", "topq=4"], "topq", "topk"),
    ):
        code, out, err = run(capsys, "explain", *argv)
        assert (code, out) == (2, "")
        assert what in err
        assert fix in err


def test_the_command_prints_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("explain", "dsa", "--config", "deepseek-v3.2-decode", "--set", "topk=512")
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "tokens read: 512" in out
    code, out, _ = run(capsys, *argv, "--sizes", "S=4096", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["sizes"]["S"] == 4096
    assert data["tasks"][1]["schedule"]["name"] == "attend_cpu"
    assert data["step"]["attended"] == {"formula": "Min(512, S)", "value": 512}


@pytest.mark.parametrize(
    ("name", "config"),
    [("dsa", "deepseek-v3.2-decode"), ("mla_decode", "deepseek-v3"), ("nsa", "nsa-27b-decode")],
)
def test_printed(
    name: str, config: str, snapshot: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    found = explained(name, config, "sm_90", dtype="bfloat16")
    # New schedules are no change of what this prints about the pattern.
    tasks = tuple(dataclasses.replace(task, schedule=SOME) for task in found.tasks)
    snapshot(str(dataclasses.replace(found, tasks=tasks)))


SOME = Scheduled(
    name="some_gpu",
    knobs={"warps": 4},
    origin="default",
    source="",
    others=(("other_gpu", "needs more"),),
    scratch=Amount("512*T", 512),
)
