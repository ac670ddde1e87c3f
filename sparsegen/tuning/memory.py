"""Call a built kernel on numpy memory, and see whether it stays within it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparsegen.codegen import tvm as adapter
from sparsegen.tuning.cases import Case, Expected
from sparsegen.tuning.packing import Array, decode

_ALIGN = 64
_GUARD = 1024
"""Bytes before and after each buffer that nobody may write."""
_UNTOUCHED = 0xA5
_FEW = 4
"""Keys in which a list may differ when scores are inexact: two that change places."""


class Call:
    """A case in memory, ready to be called and called again."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._raw: list[Array] = []
        self._originals = (*case.inputs, *case.outputs)
        self._memory = [self._place(x) for x in self._originals]
        self.arguments = [
            _argument(x, dtype) for x, dtype in zip(self._memory, case.dtypes, strict=True)
        ]

    def _place(self, values: Array) -> Array:
        raw = np.full(values.nbytes + 2 * _GUARD + _ALIGN, _UNTOUCHED, np.uint8)
        start = _GUARD + -(raw.ctypes.data + _GUARD) % _ALIGN
        self._raw.append(raw)
        memory = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        memory[...] = values
        return memory

    def check(self, kernel: Callable[..., object]) -> str | None:
        """Run the kernel once and say what is wrong with what it did, if anything."""
        for memory, poison in zip(self._memory, self._originals, strict=True):
            memory[...] = poison
        kernel(*self.arguments)
        found = self._stray() or self._wrong()
        return None if found is None else f"{found}, in the call of {self.case.name}"

    def _stray(self) -> str | None:
        """Say where the kernel wrote what is not its own; undo what is outside of buffers."""
        found = None
        for n, (memory, raw) in enumerate(zip(self._memory, self._raw, strict=True)):
            start = memory.ctypes.data - raw.ctypes.data
            for guard in (raw[:start], raw[start + memory.nbytes :]):
                if (guard != _UNTOUCHED).any():
                    guard[...] = _UNTOUCHED
                    found = f"argument {n} is written out of bounds"
        for n, original in enumerate(self.case.inputs):
            if not np.array_equal(_bits(self._memory[n]), _bits(original)):
                found = found or f"argument {n} is read only but was written"
        return found

    def _wrong(self) -> str | None:
        inputs = len(self.case.inputs)
        for expected in self.case.expected:
            memory = self._memory[inputs + expected.output]
            dtype = self.case.dtypes[inputs + expected.output]
            flat = memory.reshape(-1, *expected.values.shape[1:])
            if wrong := compare(decode(flat[expected.rows], dtype), expected):
                return f"output {expected.output} {wrong}"
        return None


def compare(got: Array, expected: Expected) -> str | None:
    """Say where `got` differs from what is expected by more than the tolerance, or None."""
    want = expected.values
    if want.size == 0:
        return None
    if want.dtype.kind == "i":
        return _compare_lists(got, expected)
    finite = np.isfinite(want)
    size = float(np.mean(np.abs(want[finite]))) if finite.any() else 0.0
    with np.errstate(invalid="ignore"):
        error = np.abs(got - want) / (np.abs(want) + size + 1e-30)
    error = np.where(finite, error, np.where(got == want, 0.0, np.inf))
    error = np.where(np.isnan(error), np.inf, error)
    worst = np.unravel_index(np.argmax(error), error.shape)
    if error[worst] <= expected.tolerance:
        return None
    at = ", ".join(map(str, (int(expected.rows[worst[0]]), *map(int, worst[1:]))))
    return (
        f"is wrong at [{at}]: got {got[worst]:.6g}, want {want[worst]:.6g} "
        f"(off by {error[worst]:.2g}, allowed {expected.tolerance:.2g})"
    )


def _compare_lists(got: Array, expected: Expected) -> str | None:
    want, width = expected.values, expected.values.shape[-1]
    rows_got, rows_want = got.reshape(-1, width), want.reshape(-1, width)
    differ = np.flatnonzero((rows_got != rows_want).any(axis=-1))
    if len(differ) == 0:
        return None
    allowed = 0 if expected.tolerance == 0 else max(1, round(expected.tolerance * len(rows_want)))
    first = differ[0]
    if len(differ) <= allowed:
        far = [n for n in differ if len(set(rows_got[n]) ^ set(rows_want[n])) > _FEW]
        far += [n for n in differ if not _is_list(rows_got[n])]
        if not far:
            return None
        first = far[0]
    wrong = int(np.flatnonzero(rows_got[first] != rows_want[first])[0])
    at = (int(x) for x in np.unravel_index(first, want.shape[:-1]))
    row, *groups = at
    place = ", ".join(map(str, (int(expected.rows[row]), *groups, wrong)))
    return (
        f"is wrong in {len(differ)} of {len(rows_want)} lists, first at [{place}]: "
        f"got {rows_got[first][wrong]}, want {rows_want[first][wrong]}"
    )


def _is_list(keys: Array) -> bool:
    used = keys[keys >= 0]
    return bool((np.diff(used) > 0).all() and (keys[len(used) :] == -1).all())


def _argument(memory: Array, dtype: str) -> Any:
    runtime = adapter.tvm.runtime
    if memory.size == 0:
        return runtime.empty(memory.shape, dtype)
    tensor = runtime.from_dlpack(memory)
    # numpy has no bfloat16: the memory is uint16 and its view says what the bits mean.
    return tensor._create_view(memory.shape, dtype) if dtype == "bfloat16" else tensor


def _bits(x: Array) -> Array:
    """Return the bytes of an array, in which NaN equals itself."""
    return x.reshape(-1).view(np.uint8)


def load(library: Path, function: str) -> Callable[..., object]:
    """Return a function of a built library."""
    found: Callable[..., object] = adapter.tvm.runtime.load_module(str(library))[function]
    return found
