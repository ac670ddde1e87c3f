"""Lay memory out on a GPU, see whether a kernel stays within it, and time calls with its clock."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsegen.runtime.kernel import ERRORS
from sparsegen.runtime.standalone.load import load_library

Array = npt.NDArray[Any]

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
}
_GUARD = 1024
"""Bytes before and after each buffer that nobody may write; a multiple of every alignment."""
_UNTOUCHED = 0xA5
_FLUSH = 256 << 20
"""Bytes written before each timed call: several times the L2 cache of any GPU."""
_LOT = 10
"""Calls that are queued together: while the cache is overwritten, the host runs ahead."""


class Buffer:
    """An argument in device memory, between guards.

    Args:
        values: what it holds at the start of a call; bfloat16 is kept as uint16.
    """

    def __init__(self, values: Array, dtype: str, device: str) -> None:
        self._raw = torch.empty(values.nbytes + 2 * _GUARD, dtype=torch.uint8, device=device)
        self._bytes = self._raw[_GUARD : _GUARD + values.nbytes]
        self._bits: Any = np.dtype(f"i{values.dtype.itemsize}")
        uniform = values.size > 0 and not any(values.strides)
        few = values.reshape(-1)[:1].copy() if uniform else np.ascontiguousarray(values)
        self._original = torch.from_numpy(few.view(self._bits)).to(device)
        self._memory = self._bytes.view(self._original.dtype).view(values.shape)
        self.argument = self._bytes.view(_DTYPES[dtype]).view(values.shape)
        if values.size == 0:  # memory of no elements has no address to pass
            shape = [max(1, n) for n in values.shape]
            self.argument = torch.zeros(shape, dtype=_DTYPES[dtype], device=device)

    def reset(self) -> None:
        """Write the original values again, and the guards."""
        self._raw[:_GUARD].fill_(_UNTOUCHED)
        self._raw[_GUARD + len(self._bytes) :].fill_(_UNTOUCHED)
        if len(self._bytes):
            self._memory.copy_(self._original)

    def is_outside_written(self) -> bool:
        """Tell whether a guard was written."""
        guards = torch.cat([self._raw[:_GUARD], self._raw[_GUARD + len(self._bytes) :]])
        return not bool((guards == _UNTOUCHED).all())

    def is_changed(self) -> bool:
        """Tell whether the values are other ones than at the start."""
        return len(self._bytes) > 0 and not bool((self._memory == self._original).all())

    def rows(self, rows: Array, tail: tuple[int, ...]) -> Array:
        """Return rows of the memory, seen as [..., *tail], as the dtype that numpy has for it."""
        flat = self._memory.reshape(-1, *tail)
        found = flat[torch.from_numpy(rows).to(flat.device)].cpu().contiguous()
        kind = {torch.float32: "f4", torch.float16: "f2", torch.bfloat16: "u2", torch.int32: "i4"}
        return np.asarray(found.numpy().view(kind[self.argument.dtype]))

    def copy(self) -> torch.Tensor:
        """Return the memory as it is now."""
        return self._memory.clone()

    def equals(self, other: torch.Tensor) -> bool:
        """Tell whether the memory holds the bits of a copy."""
        return torch.equal(self._memory, other)


class Bench:
    """A GPU on which kernels are called, checked and timed."""

    repeats = 3
    """Calls of a check: a race shows as results that differ between them."""

    def __init__(self, device: str = "cuda") -> None:
        self._device = device
        self._flush = torch.empty(_FLUSH, dtype=torch.uint8, device=device)
        self._scratch: dict[tuple[int, str, tuple[int, ...]], torch.Tensor] = {}

    def place(self, values: Array, dtype: str) -> Buffer:
        """Return an argument that holds some values."""
        return Buffer(values, dtype, self._device)

    def scratch(self, n: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return memory for the `n`-th scratch argument, full of NaN; calls share it."""
        key = (n, dtype, shape)
        if key not in self._scratch:
            extents = [max(1, x) for x in shape]
            self._scratch[key] = torch.empty(extents, dtype=_DTYPES[dtype], device=self._device)
        self._scratch[key].view(torch.uint8).fill_(0xFF)
        return self._scratch[key]

    def clear(self) -> None:
        """Give memory back that no argument holds."""
        self._scratch.clear()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def load(self, library: Path, function: str) -> Callable[..., object]:
        """Return a function of a built library."""
        found: Callable[..., object] = load_library(library, ERRORS)[function]
        return found

    def wait(self) -> None:
        """Wait until the device has done what it was given.

        Raises:
            RuntimeError: something of it failed.
        """
        torch.cuda.synchronize()

    def is_lost(self) -> bool:
        """Tell whether an earlier fault makes every further call of this process fail."""
        try:
            self._flush[:1].zero_()
            self.wait()
        except RuntimeError:
            return True
        return False

    def sustained(self, call: Callable[[], object], seconds: float, least: int) -> list[float]:
        """Return microseconds of single calls in a run under load, the cache cold before each.

        It ends after `seconds` and `least` calls; one that takes longer than that is called once.
        """
        times: list[float] = []
        start = time.perf_counter()
        lot = 1
        while True:
            times += self.lot(call, lot)
            elapsed = time.perf_counter() - start
            if elapsed >= seconds and (len(times) >= least or times[-1] * 1e-6 >= seconds):
                return times
            left = max(seconds - elapsed, 0.0) * 1e6 / max(times[-1], 1.0)
            lot = max(1, min(_LOT, int(max(left, least - len(times)))))

    def typical(self, times: list[float]) -> float:
        """Return the median of the second half, which ran under load."""
        return median(times[len(times) // 2 :])

    def burst(self, call: Callable[[], object], rest: float, count: int) -> list[float]:
        """Return microseconds of the first calls after the device has rested, the cache cold."""
        self.wait()
        time.sleep(rest)
        return self.lot(call, count)

    def lot(self, call: Callable[[], object], count: int) -> list[float]:
        """Return microseconds of some calls by the device's clock, the cache cold before each."""
        event: Any = functools.partial(torch.cuda.Event, enable_timing=True)
        pairs = [(event(), event()) for _ in range(count)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        self.wait()
        return [start.elapsed_time(end) * 1e3 for start, end in pairs]
