"""The CUDA compiler is found in a toolkit or in packages, and what a library shall hold is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparsegen import arch
from sparsegen.codegen.gpu import build
from sparsegen.errors import CompileError


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make a machine without a toolkit; return a folder from which Python imports."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(build, "_HOME", tmp_path / "absent")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    return tmp_path


def executable(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_without_a_compiler_the_error_says_how_to_get_one(nothing: Path) -> None:
    with pytest.raises(CompileError, match="needs nvcc") as error:
        build.toolkit()
    hint = error.value.hint or ""
    assert "CUDA_HOME" in hint
    assert "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl" in hint
    with pytest.raises(CompileError, match="needs nvcc"):
        build.compile_source("", arch.get("sm_90"), nothing / "kernel.so")


def test_packages_bring_their_headers_and_libraries(nothing: Path) -> None:
    root = nothing / "nvidia" / "cu13"
    nvcc = executable(root / "bin" / "nvcc")
    dump = executable(root / "bin" / "cuobjdump")
    (root / "lib").mkdir()
    assert build.toolkit() == build.Toolkit(nvcc, (root / "include",), (root / "lib",))
    assert build.program("cuobjdump") == dump
    assert build.program("nvdisasm") is None


def test_a_toolkit_comes_before_packages(nothing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(nothing / "nvidia" / "cu13" / "bin" / "nvcc")
    monkeypatch.setattr(build, "_HOME", nothing / "usual")
    for where, name in (("usual", ""), ("path", "PATH"), ("home", "CUDA_HOME")):
        nvcc = executable(nothing / where / "bin" / "nvcc")
        if name:
            monkeypatch.setenv(name, str(nvcc.parents[name == "CUDA_HOME"]))
        assert build.toolkit() == build.Toolkit(nvcc), where


def test_the_version_is_read_from_the_compiler(nothing: Path) -> None:
    said = "Cuda compilation tools, release 13.0, V13.0.88"
    nvcc = executable(nothing / "bin" / "nvcc", f"#!/bin/sh\necho '{said}'\n")
    assert build.Toolkit(nvcc).version == "13.0.88"


@pytest.mark.parametrize(
    ("names", "source", "portable", "codes"),
    [
        (["sm_90"], "mma.sync", False, ["sm_90"]),
        (["sm_90"], "wgmma.mma_async", False, ["sm_90a"]),
        (["sm_120", "sm_80"], "mma.sync", True, ["sm_80", "sm_120", "compute_120"]),
        (["sm_90"], "setmaxnreg.inc", True, ["sm_90a"]),
        (["sm_86"], "", True, ["sm_86", "compute_86"]),
    ],
)
def test_what_a_library_holds_is_decided_by_its_source(
    names: list[str], source: str, portable: bool, codes: list[str]
) -> None:
    assert build.codes_of(list(map(arch.get, names)), source, portable) == tuple(codes)


def test_options_name_the_code_and_what_it_is_made_from() -> None:
    assert build.gencode(["sm_90a", "compute_80"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]
