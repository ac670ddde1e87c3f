"""Say which GPU is present, and what to compile for it."""

from __future__ import annotations

import torch

from sparsegen import arch as archs
from sparsegen.arch import Arch
from sparsegen.runtime.standalone.gpu import Gpu, gpu, rank


def present() -> Gpu | None:
    """Return torch's current GPU; None if it sees none."""
    return gpu() if torch.cuda.is_available() else None


def device_of(arch: Arch) -> str | None:
    """Return the name of torch's current GPU if it runs code for an architecture, else None."""
    found = present()
    if found is None or rank(str(arch.target["arch"]), found.capability) is None:
        return None
    return found.name


def newest(capability: tuple[int, int]) -> Arch | None:
    """Return the newest architecture whose code a GPU of a compute capability runs, or None."""
    known = [arch for arch in map(archs.get, archs.names()) if arch.kind == "cuda"]
    found = [arch for arch in known if rank("sm_{}{}".format(*arch.capability), capability)]
    return max(found, key=lambda arch: arch.capability, default=None)
