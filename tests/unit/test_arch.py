"""Architectures are data, one per file."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsegen import arch
from sparsegen.arch import Arch
from sparsegen.errors import BindingError
from sparsegen.plugins import discover

NEW = """\
from sparsegen.arch import Arch

ARCH = Arch(
    name="rv64",
    kind="cpu",
    features=frozenset({"zvfh"}),
    vector_bytes=32,
    vector_registers=32,
    peak_flops={"float32": 1e9},
    bandwidth=1e9,
    l1_bytes=1 << 15,
    l2_bytes=1 << 18,
    target={"kind": "llvm", "mtriple": "riscv64-linux-gnu"},
)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    arch.register_path(tmp_path)
    yield tmp_path
    arch.unregister_path(tmp_path)


def fake_host(monkeypatch: pytest.MonkeyPatch, machine: str, flags: frozenset[str]) -> Arch:
    monkeypatch.setattr(arch.platform, "machine", lambda: machine)
    monkeypatch.setattr(arch, "_cpu_flags", lambda: flags)
    return arch.host()


@pytest.mark.parametrize("name", arch.names())
def test_file_is_sound(name: str) -> None:
    found = arch.get(name)
    assert found.name == name
    assert "num-cores" not in found.target
    assert (found.cores is None) == (found.kind == "cpu")
    assert "float32" in found.peak_flops
    assert found.l1_bytes < found.l2_bytes
    assert hash(found) == hash(arch.get(name))


def test_shipped_cpus_are_listed() -> None:
    assert {"aarch64_neon", "generic", "x86_64_v3", "x86_64_v4", "znver4"} <= set(arch.names())


def test_unknown_name_offers_the_closest() -> None:
    with pytest.raises(BindingError, match=r"unknown architecture 'znver5'\n.*'znver4'"):
        arch.get("znver5")


def test_host_has_the_features_it_claims() -> None:
    here = arch.host()
    assert here.kind == "cpu"
    assert here.cores == len(os.sched_getaffinity(0))
    assert here == arch.get(here.name)


@pytest.mark.parametrize("name", ["x86_64_v3", "x86_64_v4", "znver4", "aarch64_neon"])
def test_host_is_the_most_specific_that_fits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = arch.get(name)
    assert wanted.machine is not None
    flags = wanted.features | {"sse2", "unheard_of"}
    assert fake_host(monkeypatch, wanted.machine, flags).name == name


def test_intel_with_bfloat16_is_not_zen(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = arch.get("znver4").features - {"sse4a"}
    assert fake_host(monkeypatch, "x86_64", flags).name == "x86_64_v4"


@pytest.mark.parametrize("machine", ["x86_64", "riscv64", "arm64"])
def test_host_falls_back_to_generic(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fake_host(monkeypatch, machine, frozenset({"sse2"})).name == "generic"


def test_memory_rate_saturates() -> None:
    zen = arch.get("znver4")
    assert zen.core_bandwidth is not None
    assert zen.memory_rate(2) == 2 * zen.core_bandwidth
    assert zen.memory_rate(96) == zen.memory_rate() == zen.bandwidth


def test_one_file_adds_an_architecture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "rv64.py").write_text(NEW)
    assert "rv64" in arch.names()
    assert arch.get("rv64").machine == "riscv64"
    assert fake_host(monkeypatch, "riscv64", frozenset({"zvfh"})).name == "rv64"


def test_removed_folder_takes_its_names_along(tmp_path: Path) -> None:
    (tmp_path / "rv64.py").write_text(NEW)
    arch.register_path(tmp_path)
    arch.unregister_path(tmp_path)
    assert "rv64" not in arch.names()


def test_file_of_another_name_is_refused(folder: Path) -> None:
    (folder / "misnamed.py").write_text(NEW)
    with pytest.raises(BindingError, match=r"ARCH = Arch\(name='misnamed'"):
        arch.get("misnamed")


def test_same_name_twice_is_refused(folder: Path) -> None:
    (folder / "znver4.py").write_text(NEW)
    with pytest.raises(BindingError, match="two architecture files are named 'znver4'"):
        arch.names()


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('kind="cpu"', 'kind="tpu"', "has kind 'tpu'"),
        ("vector_bytes=32", "vector_bytes=24", "vectors of 24 bytes"),
        ("bandwidth=1e9", "bandwidth=0.0", "no positive rate for bandwidth"),
    ],
)
def test_impossible_data_is_refused(before: str, after: str, says: str, folder: Path) -> None:
    (folder / "rv64.py").write_text(NEW.replace(before, after))
    with pytest.raises(BindingError, match=says):
        arch.get("rv64")


def test_listing_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "_shared.py").write_text("")
    (tmp_path / "whole.py").write_text("X = 1\n")
    plugins = discover("sparsegen.arch", "architecture", [tmp_path])
    assert set(plugins) - set(arch.names()) == {"broken", "whole"}
    assert plugins["whole"].X == 1
    assert plugins["whole"] is plugins["whole"]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="imported"):
            plugins["broken"]


def test_missing_package_and_folder_say_how_to_fix(tmp_path: Path) -> None:
    with pytest.raises(BindingError, match="not installed\n  fix: run `pip install"):
        discover("sparsegen.absent", "thing").files()
    with pytest.raises(BindingError, match="no folder"):
        arch.register_path(tmp_path / "absent")
