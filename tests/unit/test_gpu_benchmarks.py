"""The GPU benchmarks where no kernel is needed: what is drawn, counted, survived and reported."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import profile_gpu, readme_gpu
from benchmarks.gpu import build, kernels, measure, suite
from benchmarks.gpu.build import Variant
from benchmarks.gpu.draws import block_lists, documents, token_lists
from benchmarks.gpu.kernels import Kernel
from benchmarks.gpu.problem import Problem
from benchmarks.gpu.workload import Workload, chosen
from sparsegen import arch
from sparsegen.runtime import catalog

GROUPED = {"heads": 4, "kv_heads": 2, "d_qk": 8, "d_v": 4}
LATENT = {"heads": 3, "kv_heads": 1, "d_qk": 12, "d_v": 8}
SMALL = {
    "listed-h128": replace(suite.SHAPES["listed-h128"], topk=16, **LATENT),
    "decode-h128": replace(suite.SHAPES["decode-h128"], page=16, **LATENT),
    "blocks": replace(suite.SHAPES["blocks"], topk=4, block=16, **GROUPED),
    "entries": replace(suite.SHAPES["entries"], width=8, stride=4, **GROUPED),
    "pooled": replace(suite.SHAPES["pooled"], width=8, stride=4, **GROUPED),
    "window": replace(suite.SHAPES["window"], window=13, **GROUPED),
    "packed": replace(suite.SHAPES["packed"], **GROUPED),
    "prefill": replace(suite.SHAPES["prefill"], **GROUPED),
}


@pytest.mark.parametrize("name", SMALL)
def test_pairs_are_those_that_queries_see(name: str) -> None:
    shape = SMALL[name]
    for back in (0, 7):
        lengths = [(5, 70), (1, 33), (40, 37)]
        problem = Problem(shape, lengths, offsets=[s - t - back for t, s in lengths], device="cpu")
        seen = sum(
            len(problem.seen(row, head)) * shape.group
            for row in range(problem.rows)
            for head in range(shape.kv_heads)
        )
        assert problem.pairs() == seen
        assert problem.flops == 2 * seen * (shape.d_qk + shape.d_v)


def test_hidden_keys_are_those_that_no_query_sees() -> None:
    problem = Problem(SMALL["window"], [(3, 50)], device="cpu")
    problem.hide()
    assert problem.k[:, :, 0].isnan().all(1).tolist() == [j < 50 - 3 - 12 for j in range(50)]


def test_lists_of_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    for draw, counts in (
        ("causal", [16] * 8), ("padded", [12] * 8), ("start", [1, 2, 3, 4, 5, 6, 7, 8]),
    ):  # fmt: skip
        lists = token_lists(8, 100, 16, draw, generator)
        first = 0 if draw == "start" else 92
        assert [len({x for x in row if x >= 0}) for row in lists.tolist()] == counts
        assert all(max(row) <= first + t for t, row in enumerate(lists.tolist()))


def test_documents_of_about_a_thousand_keys_lie_in_a_row() -> None:
    found = documents(32768, torch.Generator().manual_seed(0))
    assert found.diff().min() >= 0
    assert 25 < len(found.unique()) <= 34


def test_neighbours_share_nine_of_ten_blocks_where_they_are_clustered() -> None:
    tokens, share = 32768, {}
    for draw in ("random", "clustered"):
        generator = torch.Generator().manual_seed(0)
        lists = block_lists(tokens, tokens, 1, 16, 64, draw, generator)[:, 0]
        assert (lists[20000:] >= 0).all()
        for t in (0, 63, 64, 5000, tokens - 1):
            row = lists[t][lists[t] >= 0].tolist()
            assert row == sorted(set(row))
            assert {0, t // 64, max(t // 64 - 1, 0)} <= set(row)
            assert max(row) == t // 64
        pairs = [(t, t + 1) for t in range(20480, 20480 + 1000) if (t + 1) % 64]
        both = [len(set(lists[a].tolist()) & set(lists[b].tolist())) for a, b in pairs]
        share[draw] = sum(both) / len(both) / 16
    assert 0.85 < share["clustered"] < 0.95
    assert share["random"] < 0.3


def test_variants_and_names_are_read() -> None:
    assert Variant.parse("mine") == Variant("mine")
    assert Variant.parse("listed-*=wide:attend_mma:warps=8,copy=True") == Variant(
        "wide", "attend_mma", (("warps", 8), ("copy", True)), "listed-*"
    )
    names = [w.name for w in chosen(suite.WORKLOADS, "W1 h16 8k,W6*clustered")]
    assert names == [
        "W1 h16 8k", "W1 h16 8k padded", "W1 h16 8k start", "W6 selected 8k clustered",
        "W6 selected 32k clustered", "W6 selected 64k clustered",
    ]  # fmt: skip


def test_every_workload_has_a_kernel_that_is_lowered() -> None:
    for name in {w.kernel for w in suite.WORKLOADS}:
        assert suite.of(suite.SHAPES[name]).plan.tasks


def test_scratch_memory_is_that_of_the_runtime(tmp_path: Path) -> None:
    shape, processor = SMALL["listed-h128"], arch.get("sm_90")
    task = suite.of(shape).plan.tasks[0]
    choice = catalog.choose(task, processor)
    wanted = catalog.scratch(choice, task, processor)
    assert wanted
    build.copy_runner(tmp_path)
    kernel = Kernel.__new__(Kernel)
    kernel.runner = kernels.runner(tmp_path)
    kernel.arguments = [
        (a["part"], kernel.runner.spec.TensorSpec.from_json(a["tensor"]))
        for a in build.scratch_of(choice, task, processor)
    ]
    held = kernel.scratch(kernel.extent(2, 5, 90, 70, 60), "cpu")
    assert [str(x.dtype).removeprefix("torch.") for x in held] == [b.dtype for b, _ in wanted]
    for x, (buffer, _) in zip(held, wanted, strict=True):
        tail = x.shape if buffer.rows.space == "none" else x.shape[1:]
        assert all(n == m or m == -1 for n, m in zip(tail, buffer.shape, strict=True))
    given = {"q": torch.zeros(1)}
    kernel.arguments = [("q", None), *kernel.arguments]
    assert [id(x) for x in kernel.bind(given, held)] == [id(x) for x in (given["q"], *held)]


class Bench:
    """Stands for the one that needs a GPU: some of its kernels are bad."""

    def __init__(self, folder: Any, options: measure.Options, told: Any) -> None:
        self.told = told

    def row(self, workload: Workload, failed: dict[str, str]) -> dict[str, Any]:
        kernels: dict[str, Any] = {}
        for label in ("good", "dies", "sleeps", "raises"):
            if label in failed:
                kernels[label] = {"error": failed[label]}
                continue
            self.told(label)
            if workload.name == "all well":
                continue
            if label == "dies":
                os._exit(7)
            if label == "sleeps":
                time.sleep(60)
            if label == "raises":
                raise RuntimeError("an illegal access\nof memory")
        if workload.name == "bad timing":
            self.told(measure.TIMING + "good")
            os._exit(8)
        ceiling = {"tflops": 1.0, "gbs": 1.0}
        return {**workload.to_json(), "kernels": kernels, "peers": {}, "ceiling": ceiling}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_what_crashes_or_hangs_harms_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fakes = {"Bench": Bench, "Folder": lambda path: None, "machine": dict, "DEVICE": "cpu"}
    for name, value in fakes.items():
        monkeypatch.setattr(measure, name, value)
    names = ("some bad", "bad timing", "all well")
    workloads = [Workload(name=name, kernel="x", queries=1, keys=1) for name in names]
    out = tmp_path / "out.json"
    assert not measure.measure(tmp_path, out, workloads, measure.Options(limit=1.0))
    some, timing, well = measure.json.loads(out.read_text())["workloads"]
    assert some["kernels"] == {
        "dies": {"error": "the process died with code 7"},
        "sleeps": {"error": "1 s were not enough"},
        "raises": {"error": "RuntimeError: an illegal access"},
    }
    assert timing["error"] == "the process died with code 8 at timing: good"
    assert well["kernels"] == {}
    assert "an illegal access" in capfd.readouterr().out


def test_reports_of_one_machine_are_joined() -> None:
    def report(gpu: str, rounds: int = 2, **rows: int) -> dict[str, Any]:
        return {
            "machine": {"gpu": gpu},
            "rounds": rounds,
            "workloads": [{"name": name, "ms": ms} for name, ms in rows.items()],
        }

    joined = measure.merge([report("A", x=1, y=2), report("A", rounds=3, y=3, z=4)])
    assert joined["rounds"] == 2  # what every row had at least
    assert {row["name"]: row["ms"] for row in joined["workloads"]} == {"x": 1, "y": 3, "z": 4}
    with pytest.raises(ValueError, match="is not"):
        measure.merge([report("A", x=1), report("B", x=1)])


def test_a_table_of_ncu_is_read() -> None:
    stall = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    names = ["ID", "Kernel Name", "gpu__time_duration.sum", "launch__registers_per_thread"]
    names += [stall.format(x) for x in ("wait", "barrier")]
    table = [names, ["", "", "ns", "", "inst", "inst"], ["0", "f(int *)", "1,500", "168", "1", "2"]]
    lines = ["==PROF== hello", *(",".join(f'"{x}"' for x in row) for row in table)]
    (kernel,) = profile_gpu.read(lines)
    assert kernel["kernel"] == "f(int *)"
    assert kernel["us"] == 1.5
    assert kernel["registers of a thread"] == 168
    assert kernel["tensor cores, %"] is None
    assert list(kernel["stalls"].items()) == [("barrier", 2.0), ("wait", 1.0)]


def measured(ms: float, **more: Any) -> dict[str, Any]:
    rates = {"tflops": 600.0 / ms, "gbs": 10.0, "bound": "product", "share": 0.8 / ms}
    return {"ms": ms, "p10": ms, "p90": ms, "calls": 9, **rates, **more}


def test_failures_are_shown_and_the_fastest_peer_counts() -> None:
    workloads = {w.name: w for w in suite.WORKLOADS}

    def row(name: str, kernel: dict[str, Any], peers: dict[str, Any]) -> dict[str, Any]:
        workload = workloads[name]
        return {
            **workload.to_json(), "shape": vars(suite.SHAPES[workload.kernel]), "peers": peers,
            "kernels": {"default": {"schedule": "s", "commit": "c0ffee", **kernel}},
            "ceiling": {"tflops": 700.0, "gbs": 3000.0},
        }  # fmt: skip

    peers = {"slow": measured(4.0), "fast": measured(2.0), "none": {"error": "no <kernel> | here"}}
    report = {
        "machine": {"gpu": "G", "driver": "1", "torch": "2"},
        "date": "2026-01-01", "rounds": 3, "seconds": 0.1,
        "workloads": [
            row("W1 h128 8k", measured(1.0), peers),
            row("W8 8k", {"error": "WRONG: row 3"}, {}),
            {**workloads["W6 window 8k"].to_json(), "error": "the process died"},
        ],
    }  # fmt: skip
    path = Path("/project/benchmarks/results/gpu-g.json")
    section = "\n".join(readme_gpu.section(report, path, Path("/project")))
    assert "| 1.00 (1.00-1.00) | 600 TFLOP/s | 80% | fast | 2.00 | 2.00 |" in section
    assert "WRONG" not in section
    page = "\n".join(readme_gpu.page({path: report}, Path("/project")))
    for text in ("| WRONG: row 3 |", "| the process died |", "| no (kernel) / here |", "c0ffee"):
        assert text in page
    plot = readme_gpu.plot(report)
    assert plot.count("<rect") == 3 + 2
    assert "2.00 ms, fast" in plot
