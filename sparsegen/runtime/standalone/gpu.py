"""Say which GPU is here, and which code runs on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

OLDEST = (8, 0)
"""The lowest compute capability that there are kernels for."""


@dataclass(frozen=True)
class Gpu:
    """A device.

    where       "cuda:0"
    name        "NVIDIA H200"
    capability  compute capability, (9, 0)
    shared      bytes of shared memory that a block may have; 0 where torch does not say
    """

    where: str
    name: str
    capability: tuple[int, int]
    shared: int = 0

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.where} is {self.name} of compute capability {major}.{minor}"

    @property
    def arch(self) -> str:
        """Return what its own code is called, "sm_90"."""
        return "sm_{}{}".format(*self.capability)


def gpu(device: torch.device | str | int | None = None) -> Gpu:
    """Return a device of this machine, by default the current one."""
    where = (
        torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
    )
    if where.type != "cuda":
        raise RuntimeError(f"{where} is no GPU")
    index = torch.cuda.current_device() if where.index is None else where.index
    properties = torch.cuda.get_device_properties(index)
    return Gpu(
        f"cuda:{index}",
        torch.cuda.get_device_name(index),
        torch.cuda.get_device_capability(index),
        getattr(properties, "shared_memory_per_block_optin", 0),
    )


def rank(code: str, capability: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Return how well code fits a GPU, more being better, or None if it does not run there.

    Machine code for x.y, "sm_80", runs on x.z with z >= y; that of one GPU, "sm_90a", on x.y alone.
    PTX, "compute_80", is compiled by the driver of any GPU from x.y on.
    """
    kind, _, version = code.partition("_")
    digits = version.rstrip("af")
    major, minor = int(digits[:-1]), int(digits[-1])
    letter = digits != version
    if (major, minor) > capability or (letter and (major, minor) != capability):
        return None
    if kind == "sm":
        return (1, major, minor, letter) if major == capability[0] else None
    return 0, major, minor, letter


def best(codes: Sequence[str], found: Gpu) -> tuple[int, int, int, int] | None:
    """Return the rank of the code that a GPU runs best, or None if it runs none."""
    ranks = (rank(code, found.capability) for code in codes)
    return max((r for r in ranks if r is not None), default=None)


def unfit(codes: Sequence[str], shared: int, found: Gpu) -> str | None:
    """Return why a GPU does not run a library, or None.

    Args:
        codes: what the library holds.
        shared: bytes of shared memory that a block of it takes.
        found: the GPU.
    """
    if best(codes, found) is None:
        return f"{found}, which runs none of it"
    if found.shared and shared > found.shared:
        return (
            f"{found}, whose blocks have up to {found.shared} bytes of shared memory: it takes "
            f"{shared}"
        )
    return None
