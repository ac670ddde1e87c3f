"""Say on which machine candidates are measured: its processor, and what stands by to build them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparsegen import arch as archs
from sparsegen.arch import Arch
from sparsegen.errors import BindingError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What kernels are measured on.

    arch      its architecture; for a CPU, `cores` are this machine's
    device    name of the GPU; empty for a CPU
    builders  how many candidates are built at a time: as many as the host has cores
    compiler  what takes part in the building beside TVM, with its version; empty for a CPU
    """

    arch: Arch
    device: str = ""
    builders: int = 1
    compiler: str = ""

    @property
    def threads(self) -> int:
        """Return how many cores, or multiprocessors, kernels use."""
        return self.arch.cores or 1


def machine_of(arch: Arch) -> Machine:
    """Return this machine as one of an architecture.

    Raises:
        BindingError: this machine cannot run code for the architecture.
        CompileError: the architecture is a GPU's, and there is no nvcc.
    """
    host = archs.host()
    cores = host.cores or 1
    if arch.kind == "cpu":
        if not arch.features <= host.features:
            raise _unfit(arch, host.name, host.name)
        return Machine(arch=replace(arch, cores=cores), builders=cores)
    from sparsegen.codegen.gpu.build import toolkit
    from sparsegen.runtime.gpu import device_of, present

    device, found = device_of(arch), present()
    if device is None:
        raise _unfit(arch, "without a GPU" if found is None else found.name, "cuda")
    return Machine(arch=arch, device=device, builders=cores, compiler=f"nvcc {toolkit().version}")


def _unfit(arch: Arch, here: str, instead: str) -> BindingError:
    return BindingError(
        f"{arch.name} cannot be measured here: this machine is {here}",
        hint=f"tune on such a machine, or for {instead!r}",
    )
