"""Describe processors as data: one per file, found by file name."""

import dataclasses
import functools
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparsegen.errors import BindingError
from sparsegen.plugins import discover

_PLUGINS = discover(__name__, "architecture")
register_path = _PLUGINS.register_path
unregister_path = _PLUGINS.unregister_path


@dataclass(frozen=True, kw_only=True)
class Arch:
    """Hold the features, limits and peaks of one processor.

    Rates are datasheet peaks; the cost model ranks by them, nothing is refused because of them.
    """

    name: str
    """The stem of the file."""
    kind: Literal["cpu", "cuda"]
    features: frozenset[str]
    """What schedules may require. For a CPU: the flags of /proc/cpuinfo the compiler may use."""
    vector_bytes: int
    """Widest vector register (cpu) or widest load of one thread (cuda)."""
    vector_registers: int
    """Registers of that width one thread can name (cpu), 32-bit registers of one core (cuda)."""
    peak_flops: Mapping[str, float] = field(hash=False)
    """dtype -> FLOP/s, an fma counting two: of one core (cpu), of the device (cuda)."""
    bandwidth: float
    """Bytes/s from main memory, all cores together."""
    core_bandwidth: float | None = None
    """Bytes/s from main memory that one core can draw; None when one core is no limit."""
    l1_bytes: int
    """First-level data cache of one core."""
    l2_bytes: int
    """Second-level cache: of one core (cpu), of the device (cuda)."""
    l3_bytes: int = 0
    """Last-level cache that one core can reach; 0 when there is none."""
    shared_bytes: int = 0
    """Shared memory one thread block may have; 0 for a CPU."""
    shared_core_bytes: int = 0
    """Shared memory of one multiprocessor; 0 for a CPU."""
    threads_per_core: int = 0
    """Threads one multiprocessor holds; 0 for a CPU."""
    cores: int | None = field(default=None, compare=False)
    """Cores (cpu) or multiprocessors (cuda); None where the name does not settle it."""
    target: Mapping[str, Any] = field(hash=False)
    """TVM target without the number of cores."""

    def __post_init__(self) -> None:
        """Refuse data that no processor has."""
        if self.kind not in ("cpu", "cuda"):
            raise BindingError(
                f"architecture {self.name!r} has kind {self.kind!r}", hint="cpu or cuda"
            )
        if self.vector_bytes <= 0 or self.vector_bytes & (self.vector_bytes - 1):
            raise BindingError(
                f"architecture {self.name!r} has vectors of {self.vector_bytes} bytes",
                hint="give a power of two",
            )
        rates = {**self.peak_flops, "bandwidth": self.bandwidth}
        if wrong := [name for name, rate in rates.items() if rate <= 0]:
            raise BindingError(
                f"architecture {self.name!r} has no positive rate for {', '.join(wrong)}",
                hint="give FLOP/s and bytes/s",
            )

    @property
    def capability(self) -> tuple[int, int]:
        """Return the compute capability of a GPU; (0, 0) for a CPU."""
        if self.kind == "cpu":
            return 0, 0
        digits = str(self.target["arch"]).removeprefix("sm_").rstrip("af")
        return int(digits[:-1]), int(digits[-1])

    @property
    def machine(self) -> str | None:
        """Return the instruction set of a CPU, as `uname -m` says it; None for any."""
        triple = self.target.get("mtriple")
        return None if triple is None else str(triple).partition("-")[0]

    def memory_rate(self, cores: int | None = None) -> float:
        """Return the bytes/s that `cores` cores (default: all of them) draw from main memory."""
        count = cores if cores is not None else self.cores
        if count is None or self.core_bandwidth is None:
            return self.bandwidth
        return min(self.bandwidth, count * self.core_bandwidth)


def names() -> list[str]:
    """Return the names of all architectures, sorted."""
    return list(_PLUGINS)


def get(name: str) -> Arch:
    """Return the architecture of a name.

    Raises:
        BindingError: no file has that name, or the file does not hold `ARCH` of that name.
    """
    module = _PLUGINS.require(name)
    arch = getattr(module, "ARCH", None)
    if not isinstance(arch, Arch) or arch.name != name:
        raise BindingError(
            f"{module.__file__} does not describe an architecture named {name!r}",
            hint=f"let it end with ARCH = Arch(name={name!r}, ...)",
        )
    return arch


def host() -> Arch:
    """Return the most specific CPU whose every feature this machine has, with `cores` filled in."""
    flags, machine = _cpu_flags(), platform.machine()
    cpus = [arch for arch in map(get, names()) if arch.kind == "cpu"]
    fitting = [arch for arch in cpus if arch.features <= flags and arch.machine in (None, machine)]
    best = max(fitting, key=lambda arch: (len(arch.features), arch.machine is not None, arch.name))
    return dataclasses.replace(best, cores=_usable_cores())


def unfit(arch: Arch) -> str | None:
    """Return why this machine cannot run code for a CPU, or None; any may compile for a GPU."""
    if arch.kind == "cuda":
        return None
    here = platform.machine()
    if arch.machine not in (None, here):
        return f"{arch.name} is for {arch.machine}, and this machine is {here}"
    missing = sorted(arch.features - _cpu_flags())
    return f"this machine lacks {', '.join(missing)}" if missing else None


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Return the feature flags the kernel reports of the first core; none outside Linux."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except FileNotFoundError:
        pass
    return frozenset()


def _usable_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
