"""Which code of a bundle a GPU gets, and what is refused."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsegen import api
from sparsegen.errors import BindingError, BundleError
from sparsegen.runtime import gpu as gpus
from sparsegen.runtime import targets
from sparsegen.runtime.kernel import ERRORS
from sparsegen.runtime.standalone import bundle
from sparsegen.runtime.standalone.gpu import Gpu, gpu, rank, unfit

A100 = Gpu("cuda:0", "NVIDIA A100", (8, 0), 163 << 10)
L4 = Gpu("cuda:0", "NVIDIA L4", (8, 9), 99 << 10)
H100 = Gpu("cuda:0", "NVIDIA H100", (9, 0), 227 << 10)
B200 = Gpu("cuda:0", "NVIDIA B200", (10, 0), 227 << 10)
B300 = Gpu("cuda:0", "NVIDIA B300", (10, 3), 227 << 10)
RTX = Gpu("cuda:0", "NVIDIA RTX 5090", (12, 0), 99 << 10)
T4 = Gpu("cuda:0", "Tesla T4", (7, 5), 64 << 10)
# As `sg.export` makes them: where the source differs, and where it is the same.
DSA = {
    "sm_80": (("sm_80", "compute_80"), 90 << 10),
    "sm_86": (("sm_86", "compute_86"), 60 << 10),
    "sm_90": (("sm_90a",), 220 << 10),
}
CAUSAL = {
    "sm_80, sm_90": (("sm_80", "sm_90", "compute_90"), 52 << 10),
    "sm_86, sm_120": (("sm_86", "sm_120", "compute_120"), 30 << 10),
}
LARGE = {"sm_80": (("sm_80", "compute_80"), 160 << 10)}


@pytest.mark.parametrize(
    ("code", "runs", "not_on"),
    [
        ("sm_80", [A100, L4], [H100, T4, RTX]),
        ("sm_86", [L4], [A100, H100]),
        ("sm_90a", [H100], [A100, B200]),
        ("sm_100", [B200, B300], [RTX, H100]),
        ("sm_100a", [B200], [B300]),
        ("compute_80", [A100, L4, H100, B300, RTX], [T4]),
        ("compute_90", [H100, B200, RTX], [L4]),
        ("compute_90a", [H100], [B200]),
    ],
)
def test_where_code_runs(code: str, runs: list[Gpu], not_on: list[Gpu]) -> None:
    assert all(rank(code, x.capability) is not None for x in runs)
    assert all(rank(code, x.capability) is None for x in not_on)


def choose(
    monkeypatch: pytest.MonkeyPatch, held: dict[str, Any], found: Gpu | None, **more: Any
) -> str:
    """Return what a bundle's loader takes on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found is not None)
    monkeypatch.setattr(bundle, "gpu", lambda device: found)
    machine = more.get("machine", platform.machine())
    libraries = [{"archs": names.split(", "), "machine": machine} for names in held]
    specs: Any = [SimpleNamespace(codes=codes, shared=n) for codes, n in held.values()]
    place = bundle._for_a_gpu(Path("folder"), libraries, specs, None, ERRORS)
    return list(held)[place]


@pytest.mark.parametrize(
    ("held", "found", "taken"),
    [
        (DSA, A100, "sm_80"),
        (DSA, L4, "sm_86"),  # the newest machine code that runs there
        (DSA, H100, "sm_90"),
        (DSA, B200, "sm_86"),  # nothing but PTX: the newest
        (DSA, RTX, "sm_86"),
        (CAUSAL, A100, "sm_80, sm_90"),
        (CAUSAL, H100, "sm_80, sm_90"),
        (CAUSAL, L4, "sm_86, sm_120"),
        (CAUSAL, B300, "sm_80, sm_90"),
        (CAUSAL, RTX, "sm_86, sm_120"),
        (LARGE, A100, "sm_80"),
        (LARGE, H100, "sm_80"),  # by PTX
    ],
)
def test_a_gpu_gets_its_own_code_or_the_newest_that_runs(
    held: dict[str, Any], found: Gpu, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(monkeypatch, held, found) == taken


@pytest.mark.parametrize(
    ("held", "found", "says", "fix"),
    [
        (DSA, None, "torch sees no GPU", "install torch for CUDA"),
        (DSA, T4, r"Tesla T4 of compute capability 7\.5", r"compute capability 8\.0 and newer"),
        (LARGE, L4, r"up to 101376 bytes of shared memory: it takes 163840", "'sm_89'"),
        ({"sm_90": DSA["sm_90"]}, A100, r"sm_90 \(sm_90a\).* NVIDIA A100", "'sm_80'"),
        ({"sm_90": DSA["sm_90"]}, B200, r"capability 10\.0, which runs none of it", "'sm_100'"),
    ],
)
def test_refusals_say_what_is_here_what_is_held_and_the_way_out(
    held: dict[str, Any],
    found: Gpu | None,
    says: str,
    fix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BundleError, match=says) as error:
        choose(monkeypatch, held, found)
    assert next(iter(held)) in str(error.value)
    assert error.value.hint is not None
    assert fix.replace("\\", "") in error.value.hint


def test_kernels_are_started_by_code_for_one_kind_of_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BundleError, match="exported on riscv64, and this is"):
        choose(monkeypatch, DSA, H100, machine="riscv64")


def test_unfit_without_a_word_of_torch_on_shared_memory() -> None:
    assert unfit(("sm_80",), 1 << 20, Gpu("cuda:0", "?", (8, 0))) is None


def test_only_gpus_are_gpus() -> None:
    with pytest.raises(RuntimeError, match="cpu is no GPU"):
        gpu("cpu")


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 7), "sm_86"), ((9, 0), "sm_90"), ((10, 3), "sm_100"),
     ((12, 1), "sm_120"), ((7, 5), None), ((11, 0), None)],
)  # fmt: skip
def test_the_gpu_present_is_compiled_for(
    capability: tuple[int, int], name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Gpu("cuda:0", "a GPU", capability)
    monkeypatch.setattr(gpus, "present", lambda: here)
    if name is not None:
        assert api.arch_of("cuda").name == name
        return
    with pytest.raises(BindingError, match="cuda:0 is a GPU of compute capability") as error:
        api.arch_of("cuda")
    assert "target='sm_80' or 'sm_86'" in (error.value.hint or "")


def test_without_a_gpu_the_error_says_what_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BindingError, match="torch sees none") as error:
        api.arch_of("cuda")
    assert "target='sm_80' or 'sm_86'" in (error.value.hint or "")


def test_targets_are_of_one_kind() -> None:
    assert [a.name for a in targets.archs_of(["sm_80", "cuda:sm_90a", "sm_80"])] == [
        "sm_80", "sm_90",
    ]  # fmt: skip
    with pytest.raises(BindingError, match="a CPU, beside sm_90, a GPU"):
        targets.archs_of(["cpu", "sm_90"])
    with pytest.raises(BindingError, match="names no processor"):
        targets.archs_of([])
