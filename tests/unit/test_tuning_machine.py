from types import SimpleNamespace

import pytest

from sparsegen import arch
from sparsegen.codegen.gpu import build
from sparsegen.errors import BindingError
from sparsegen.runtime import gpu
from sparsegen.runtime.standalone.gpu import Gpu
from sparsegen.tuning.machine import machine_of


def test_the_machine_of_a_gpu_is_the_one_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "present", lambda: Gpu("cuda:0", "NVIDIA H200", (9, 0)))
    monkeypatch.setattr(build, "toolkit", lambda: SimpleNamespace(version="13.0.88"))
    found = machine_of(arch.get("sm_90"))
    assert (found.device, found.compiler, found.threads) == ("NVIDIA H200", "nvcc 13.0.88", 132)
    assert found.builders == arch.host().cores
    for other in ("sm_80", "sm_100"):
        with pytest.raises(BindingError, match=f"{other} cannot be measured here.*NVIDIA H200"):
            machine_of(arch.get(other))


def test_without_a_gpu_none_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "present", lambda: None)
    with pytest.raises(BindingError, match="this machine is without a GPU"):
        machine_of(arch.get("sm_90"))


def test_a_cpu_builds_on_all_cores() -> None:
    host = arch.host()
    found = machine_of(host)
    assert (found.device, found.compiler) == ("", "")
    assert found.builders == found.threads == host.cores
