"""Run and time kernels of a CPU in this process's memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sparsegen.codegen import tvm as adapter
from sparsegen.tuning.packing import Array, encode

_ALIGN = 64
_GUARD = 1024
"""Bytes before and after each buffer that nobody may write."""
_UNTOUCHED = 0xA5
_MOST_CALLS = 5


class Buffer:
    """An argument in memory, between guards; see `memory.Buffer`."""

    def __init__(self, values: Array, dtype: str) -> None:
        self._original = values
        self._raw = np.full(values.nbytes + 2 * _GUARD + _ALIGN, _UNTOUCHED, np.uint8)
        start = _GUARD + -(self._raw.ctypes.data + _GUARD) % _ALIGN
        end = start + values.nbytes
        self._guards = (self._raw[:start], self._raw[end:])
        self._memory = self._raw[start:end].view(values.dtype).reshape(values.shape)
        self.argument = _argument(self._memory, dtype)

    def reset(self) -> None:
        """Write the original values again, and the guards."""
        self._memory[...] = self._original
        for guard in self._guards:
            guard[...] = _UNTOUCHED

    def is_outside_written(self) -> bool:
        """Tell whether a guard was written."""
        return any(bool((guard != _UNTOUCHED).any()) for guard in self._guards)

    def is_changed(self) -> bool:
        """Tell whether the values are other ones than at the start."""
        return not np.array_equal(_bits(self._memory), _bits(self._original))

    def rows(self, rows: Array, tail: tuple[int, ...]) -> Array:
        """Return rows of the memory, seen as [..., *tail]."""
        return np.asarray(self._memory.reshape(-1, *tail)[rows])

    def copy(self) -> Array:
        """Return the memory as it is now."""
        return self._memory.copy()

    def equals(self, other: Array) -> bool:
        """Tell whether the memory holds the bits of a copy."""
        return np.array_equal(_bits(self._memory), _bits(other))


class Bench:
    """The cores of this machine; see `memory.Bench`.

    Args:
        sweep: bytes read and written before each timed call, by `threads` threads.
    """

    repeats = 1

    def __init__(self, sweep: int = 0, threads: int = 1) -> None:
        self._sweep = [np.zeros(sweep // threads // 8) for _ in range(threads if sweep else 0)]
        self._scratch: dict[tuple[int, str, tuple[int, ...]], Buffer] = {}

    def place(self, values: Array, dtype: str) -> Buffer:
        """Return an argument that holds some values."""
        return Buffer(values, dtype)

    def scratch(self, n: int, dtype: str, shape: tuple[int, ...]) -> Any:
        """Return memory for the `n`-th scratch argument, full of NaN; calls share it."""
        key = (n, dtype, shape)
        if key not in self._scratch:
            self._scratch[key] = Buffer(encode(np.full(shape, np.nan), dtype), dtype)
        self._scratch[key].reset()
        return self._scratch[key].argument

    def clear(self) -> None:
        """Give memory back that no argument holds."""
        self._scratch.clear()

    def load(self, library: Path, function: str) -> Callable[..., object]:
        """Return a function of a built library."""
        found: Callable[..., object] = adapter.tvm.runtime.load_module(str(library))[function]
        return found

    def wait(self) -> None:
        """Return: a call ends when its work has."""

    def is_lost(self) -> bool:
        """Return False: a fault of a CPU ends the process."""
        return False

    def sustained(self, call: Callable[[], object], seconds: float, least: int) -> list[float]:
        """Return microseconds of single calls, the caches cold before each."""
        times = [self._once(call)]
        while len(times) < least or (len(times) < _MOST_CALLS and sum(times) < seconds * 1e6):
            times.append(self._once(call))
        return times

    def typical(self, times: list[float]) -> float:
        """Return the least: whatever else the machine does makes calls slower only."""
        return min(times)

    def burst(self, call: Callable[[], object], rest: float, count: int) -> list[float]:
        """Return microseconds of the first calls after a rest."""
        time.sleep(rest)
        return [self._once(call) for _ in range(count)]

    def _once(self, call: Callable[[], object]) -> float:
        if self._sweep:
            with ThreadPoolExecutor(len(self._sweep)) as pool:
                list(pool.map(lambda x: np.add(x, 1.0, out=x), self._sweep))
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6


def _argument(memory: Array, dtype: str) -> Any:
    runtime = adapter.tvm.runtime
    if memory.size == 0:
        return runtime.empty(memory.shape, dtype)
    tensor = runtime.from_dlpack(memory)
    # numpy has no bfloat16: the memory is uint16 and its view says what the bits mean.
    return tensor._create_view(memory.shape, dtype) if dtype == "bfloat16" else tensor


def _bits(x: Array) -> Array:
    """Return the bytes of an array, in which NaN equals itself."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)
