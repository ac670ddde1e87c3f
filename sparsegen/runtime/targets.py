"""Find the processors that a target names."""

from __future__ import annotations

from collections.abc import Sequence

from sparsegen import arch as archs
from sparsegen.arch import Arch
from sparsegen.errors import BindingError


def arch_of(target: str) -> Arch:
    """Return the architecture a target names: "cpu" is this machine's, "cuda" the GPU's present.

    "cuda:sm_90", "sm_90" and "sm_90a" name a GPU's, which need not be here.

    Raises:
        BindingError: there is no such architecture, or this machine cannot run its code.
    """
    found = described(target)
    if target not in ("cpu", "cuda") and (reason := archs.unfit(found)):
        raise BindingError(
            f"target={target!r}: {reason}", hint="compile on such a machine, or for target='cpu'"
        )
    return found


def described(target: str) -> Arch:
    """Return the architecture a target names, also of a CPU that is not this machine's.

    Raises:
        BindingError: there is no such architecture.
    """
    if target == "cpu":
        return archs.host()
    if target == "cuda":
        return _gpu_present()
    name = target.removeprefix("cuda:")
    return archs.get(name.rstrip("af") if name.startswith("sm_") else name)


def _gpu_present() -> Arch:
    from sparsegen.runtime.gpu import newest, present

    every = sorted(map(archs.get, archs.names()), key=lambda arch: arch.capability)
    known = [arch.name for arch in every if arch.kind == "cuda"]
    way_out = f"name the GPU to compile for: target={' or '.join(map(repr, known))}"
    found = present()
    if found is None:
        raise BindingError(
            "target='cuda' means the GPU of this machine, and torch sees none",
            hint=f"install torch for CUDA and a driver, or {way_out}",
        )
    arch = newest(found.capability)
    if arch is None:
        raise BindingError(
            f"target='cuda': {found}, which none of the architectures {', '.join(known)} is for",
            hint=f"the oldest supported is sm_80; to compile for another GPU, {way_out}; on newer "
            "GPUs the PTX of a bundle runs: sg.export(..., target=[...])",
        )
    return arch


def archs_of(target: str | Sequence[str]) -> list[Arch]:
    """Return the architectures that several targets name, each once.

    Raises:
        BindingError: there is none, one is not known, or they are of both kinds.
    """
    names = [target] if isinstance(target, str) else list(target)
    found = list({arch.name: arch for arch in map(arch_of, names)}.values())
    if not found:
        raise BindingError("target=[] names no processor", hint="name one or several")
    kinds = {arch.kind: arch.name for arch in found}
    if len(kinds) > 1:
        raise BindingError(
            f"target={names!r} has {kinds['cpu']}, a CPU, beside {kinds['cuda']}, a GPU: a kernel "
            "takes its tensors from one kind of memory",
            hint="export a bundle for CPUs and one for GPUs",
        )
    return found
