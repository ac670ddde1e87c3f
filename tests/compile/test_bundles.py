"""Bundles for several processors: what shares a library, what is in it, and who gets which."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsegen as sg
from sparsegen import arch, patterns
from sparsegen.cli import main
from sparsegen.codegen.gpu.build import program, run, toolkit
from sparsegen.errors import BindingError, BundleError, CompileError, UnsupportedError
from sparsegen.runtime.kernel import ERRORS
from sparsegen.runtime.standalone import bundle
from sparsegen.runtime.standalone.gpu import Gpu
from tests.emulator import emulated
from tests.harness import Case, one_sequence

CPUS = ["generic", arch.host().name]
several = pytest.mark.skipif(len({*CPUS}) < 2, reason="this CPU is as any other")


def case_of(name: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    return one_sequence(name, patterns.configs(name, test=True)[0], dtype)


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / bundle.MANIFEST).read_text())
    return found


def on(monkeypatch: pytest.MonkeyPatch, found: Gpu) -> None:
    """Make the loader see a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bundle, "gpu", lambda device: found)


@pytest.mark.skipif(program("cuobjdump") is None, reason="cuobjdump is not installed")
def test_gpus_of_one_source_share_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        toolkit()
    except CompileError as error:
        pytest.skip(str(error))
    case = case_of("causal")
    kernel = case.compile("sm_80")
    folder = sg.export(kernel, tmp_path / "several", ["sm_90", "sm_80"])
    (entry,) = manifest(folder)["libraries"]
    assert entry["archs"] == ["sm_90", "sm_80"]
    assert entry["spec"]["codes"] == ["sm_80", "sm_90", "compute_90"]
    assert entry["machine"] == platform.machine()
    assert entry["toolchain"]["nvcc"]
    assert set(entry["schedules"]) == {"sm_80", "sm_90"}
    library, dump = str(folder / entry["file"]), str(program("cuobjdump"))
    assert set(re.findall(r"(sm_\d+)\.cubin", run([dump, "-lelf", library], library))) == {
        "sm_80", "sm_90",
    }  # fmt: skip
    assert set(re.findall(r"(sm_\d+)\.ptx", run([dump, "-lptx", library], library))) == {"sm_90"}
    alone = sg.export(kernel, tmp_path / "alone")
    assert manifest(alone)["libraries"][0]["spec"]["codes"] == ["sm_80"]
    # A kernel is exported as it is, also where no GPU is; loading says that there is none.
    on(monkeypatch, Gpu("cuda:0", "NVIDIA H100", (9, 0)))
    assert sg.load(folder).spec.codes == ("sm_80", "sm_90", "compute_90")
    with pytest.raises(BundleError, match=r"holds sm_80 \(sm_80\).*NVIDIA H100"):
        sg.load(alone)


def test_gpus_of_other_sources_have_libraries_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("dsa")
    with emulated((8, 0)):
        folder = sg.export(case.program, tmp_path / "dsa", ["sm_80", "sm_86"], **case.options)
    entries = manifest(folder)["libraries"]
    assert [entry["archs"] for entry in entries] == [["sm_80"], ["sm_86"]]
    assert [entry["spec"]["codes"] for entry in entries] == [
        ["sm_80", "compute_80"], ["sm_86", "compute_86"],
    ]  # fmt: skip
    # Each has the memory that its own schedule takes.
    assert entries[0]["spec"]["buffers"] != entries[1]["spec"]["buffers"]
    for capability, codes in (((8, 0), "sm_80"), ((8, 9), "sm_86"), ((9, 0), "sm_86")):
        on(monkeypatch, Gpu("cuda:0", "a GPU", capability))
        assert sg.load(folder).spec.codes[0] == codes
    text = (folder / "README.md").read_text()
    assert "for sm_80, sm_86." in text
    assert "no C++\nheader for GPUs" in text
    assert not (folder / "cpp").exists()


@several
def test_cpus_take_the_most_demanding_library_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("causal", torch.float32)
    folder = sg.export(case.program, tmp_path / "cpus", CPUS, **case.options)
    entries = manifest(folder)["libraries"]
    assert [entry["archs"] for entry in entries] == [[name] for name in CPUS[::-1]]
    want = sg.compile(case.program, target="cpu", **case.options)(**case.inputs)
    assert bundle.open_bundle(folder, ERRORS).archs == (CPUS[1],)
    assert torch.equal(sg.load(folder)(**case.inputs), want)
    monkeypatch.setattr(bundle, "cpu_flags", frozenset)
    assert bundle.open_bundle(folder, ERRORS).archs == ("generic",)
    torch.testing.assert_close(sg.load(folder)(**case.inputs), want)
    with pytest.raises(BundleError, match="is for CPUs, and device='cuda:1' was asked for"):
        sg.load(folder, device="cuda:1")


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    case = case_of("causal", torch.float32)
    kernel = case.compile("cpu")
    with pytest.raises(BindingError, match="a CPU, beside sm_90, a GPU"):
        sg.export(kernel, tmp_path / "a", ["cpu", "sm_90"])
    with pytest.raises(BindingError, match="names no processor"):
        sg.export(kernel, tmp_path / "b", [])
    with pytest.raises(BundleError, match="not specialised to sizes yet"):
        sg.export(sg.compile(case.program), tmp_path / "c")
    with pytest.raises(BundleError, match="takes a kernel or a pattern, not 7"):
        sg.export(7, tmp_path / "d")
    with pytest.raises(BindingError, match="exported for sizes"):
        sg.export("causal", tmp_path / "e", "cpu")
    with pytest.raises(BindingError, match="a compiled kernel takes no dtype"):
        sg.export(kernel, tmp_path / "f", dtype="float16")
    # A kernel of float32 has no schedule on a GPU: that is said before anything is written.
    with pytest.raises(UnsupportedError):
        sg.export(kernel, tmp_path / "g", ["sm_80", "sm_90"])
    assert not [*tmp_path.iterdir()]


@several
def test_what_the_user_asked_for_holds_for_every_target(tmp_path: Path) -> None:
    case = case_of("causal", torch.float32)
    asked = sg.Schedule("attend_cpu", pieces=4)
    kernel = sg.compile(case.program, target="cpu", schedule=asked, **case.options)
    folder = sg.export(kernel, tmp_path / "asked", CPUS)
    for entry in manifest(folder)["libraries"]:
        (schedules,) = entry["schedules"].values()
        assert "pieces=4" in next(iter(schedules.values()))


@several
def test_the_command_line_takes_several_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "causal", str(tmp_path / "cli"), "--target", ",".join(CPUS)]
    assert main([*words, "--sizes", "Hq=2,Hk=1,D=16,E=16"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "cli")
    assert len(manifest(tmp_path / "cli")["libraries"]) == 2
