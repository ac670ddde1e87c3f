"""The GPU benchmarks with kernels of a CPU: the same calls, checks and folder, without a GPU."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers_hook
from benchmarks.gpu import build, measure, peers, suite
from benchmarks.gpu.build import Variant
from benchmarks.gpu.check import Reference, WrongError, check, trials
from benchmarks.gpu.clock import Ceilings, Times
from benchmarks.gpu.kernels import Call, Folder
from benchmarks.gpu.problem import Problem
from benchmarks.gpu.workload import Workload
from tests.unit.test_gpu_benchmarks import SMALL

WORKLOADS = [
    Workload(name="W1 padded", kernel="listed-h128", queries=70, keys=300, draw="padded"),
    Workload(name="W1 start", kernel="listed-h128", queries=70, keys=300, draw="start"),
    Workload(name="W3", kernel="decode-h128", queries=1, keys=200, batch=5),
    Workload(name="W6 random", kernel="blocks", queries=301, keys=301, draw="random"),
    Workload(name="W6 compressed", kernel="entries", queries=301, keys=74),
    Workload(name="W6 pooled", kernel="pooled", queries=301, keys=301),
    Workload(name="W6 window", kernel="window", queries=301, keys=301),
    Workload(name="packed", kernel="packed", queries=301, keys=301),
    Workload(name="W8", kernel="prefill", queries=130, keys=130),
]
VARIANTS = [
    Variant("default"),
    Variant.parse("prefill=chunks:attend_cpu:chunk=32"),
    Variant.parse("window=absent:attend_cpu:nothing=8"),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """References are made of many small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "SHAPES", SMALL)
        assert not build.build(path, WORKLOADS, VARIANTS, target="x86_64_v3")
    return Folder(path)


class Reel:
    """Calls everything once."""

    def __init__(self, seconds: float, rounds: int) -> None:
        pass

    def race(
        self, functions: Mapping[str, Callable[[], object]], told: Callable[[str], None]
    ) -> tuple[dict[str, Times], Ceilings]:
        times = {}
        for label, function in functions.items():
            told(label)
            start = time.perf_counter()
            function()
            times[label] = Times.of([1e3 * (time.perf_counter() - start)])
        return times, Ceilings(0.1, 10.0)


def test_kernels_are_built_checked_and_timed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"Reel": Reel, "DEVICE": "cpu"}.items():
        monkeypatch.setattr(measure, name, value)
    bench = measure.Bench(folder, measure.Options(peers=False), lambda what: None)
    for workload in WORKLOADS:
        row = bench.row(workload, {})
        held = row["kernels"]["default"]
        assert held["ms"] > 0
        assert held["error_of_row"] < 4e-3
        assert "\n".join(measure.lines(row)).count("ms (") == len(row["kernels"]) - (
            workload.kernel == "window"
        )
        if workload.kernel == "window":
            assert "has no knob 'nothing'" in row["kernels"]["absent"]["error"]
        if workload.kernel == "prefill":
            assert row["kernels"]["chunks"]["knobs"]["chunk"] == 32
    refused = bench.row(WORKLOADS[-1], {"chunks": "it died"})["kernels"]
    assert refused["chunks"]["error"] == "RuntimeError: it died"
    assert refused["default"]["ms"] > 0


CALLS = itertools.count()


class Tampered:
    """A kernel whose function does something more."""

    def __init__(self, kernel: Any, more: Callable[[list[torch.Tensor]], None]) -> None:
        self.kernel, self.more = kernel, more

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def function(self, *arguments: torch.Tensor) -> None:
        self.kernel.function(*arguments)
        self.more(list(arguments))


def _scale(arguments: list[torch.Tensor]) -> None:
    arguments[-2].mul_(1.01)


def _element(arguments: list[torch.Tensor]) -> None:
    arguments[-2][-1, 0, 0] += 0.2 * arguments[-2][-1].float().square().mean().sqrt()


def _lse(arguments: list[torch.Tensor]) -> None:
    arguments[-1].add_(1e-3)


def _stale(arguments: list[torch.Tensor]) -> None:
    arguments[-2][-1] = float("nan")


def _changing(arguments: list[torch.Tensor]) -> None:
    arguments[-1][3, 0] += 1e-5 * next(CALLS)


@pytest.mark.parametrize("more", [_scale, _element, _lse, _stale, _changing])
@pytest.mark.parametrize("name", ["prefill", "listed-h128"])
def test_what_is_wrong_is_found(folder: Folder, name: str, more: Any) -> None:
    kernel: Any = Tampered(folder.load(name, "default"), more)
    trial = next(iter(trials(kernel.shape, "cpu")))
    with pytest.raises(WrongError):
        check(kernel, Call(kernel, trial), Reference(trial, range(trial.rows)))


def test_a_kernel_of_another_window_is_found(folder: Folder) -> None:
    kernel = folder.load("window", "default")
    other = replace(kernel.shape, window=kernel.shape.window - 1)
    problem = Problem(other, [(40, 60)], device="cpu")
    with pytest.raises(WrongError):
        check(kernel, Call(kernel, problem), Reference(problem))


def test_harnesses_of_peers_get_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {
        "listed": replace(SMALL["listed-h128"], d_qk=24, d_v=16),
        "decode": replace(SMALL["decode-h128"], d_qk=24, d_v=16, page=16),
        "blocks": SMALL["blocks"],
    }
    assert build.build_shapes(tmp_path, shapes, [Variant("mine")], target="x86_64_v3")
    monkeypatch.setenv("SPARSEGEN_BENCH_KERNELS", str(tmp_path))
    monkeypatch.setenv("SPARSEGEN_BENCH_LABEL", "mine")
    monkeypatch.setattr(peers_hook, "D_V", 16)
    monkeypatch.setattr(peers_hook, "BLOCK", 16)
    peers_hook.kernel_of.cache_clear()

    p = Problem(shapes["listed"], [(30, 90)], offsets=[90], device="cpu")
    assert p.list is not None
    o, lse = peers_hook.sparse_mla_fwd(p.q, p.k, p.list, p.shape.scale)
    Reference(p).error(o, lse)
    with pytest.raises(ValueError, match="compiled for"):
        peers_hook.sparse_mla_fwd(p.q, p.k, p.list, 1.0)

    for keys in (50, 77):  # the same queries again, over other lengths
        p = Problem(shapes["decode"], [(2, keys), (2, 16), (2, 100)], device="cpu")
        lengths = p.cu_k.diff().int()
        assert p.table is not None
        q, pages = p.q.unflatten(0, (3, 2)), p.k.unflatten(0, (-1, 16))
        for _ in range(2):
            o = peers_hook.mla_decode(q, pages, p.table, lengths, p.shape.scale)
            Reference(p).error(o.flatten(0, 1))

    p = Problem(shapes["blocks"], [(40, 90)], draw="random", device="cpu")
    assert p.list is not None
    Reference(p).error(peers_hook.nsa_select_fwd(p.q, p.k, p.v, p.list, p.shape.scale))


def test_a_peer_that_cannot_be_imported_is_no_absent_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as nothing:
        nothing.setattr(peers, "find_spec", lambda name: None)
        with pytest.raises(peers.AbsentError, match="fla is not installed"):
            peers._fla_selected(None)
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("import a_package_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="a_package_it_needs"):
        peers._fla_selected(None)
