"""Call a built kernel on memory of its own, and see whether it is right and stays within it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparsegen.tuning.cases import Case, Expected
from sparsegen.tuning.packing import Array, decode

_FEW = 4
"""Keys in which a list may differ when scores are inexact: two that change places."""

Shape = tuple[str, tuple[int, ...]]
"""Dtype and shape of memory that a schedule takes beside the buffers of its task."""


class Buffer(Protocol):
    """An argument between guards; `argument` is what a kernel takes."""

    argument: Any

    def reset(self) -> None:
        """Write the original values again, and the guards."""

    def is_outside_written(self) -> bool:
        """Tell whether a guard was written."""

    def is_changed(self) -> bool:
        """Tell whether the values are other ones than at the start."""

    def rows(self, rows: Array, tail: tuple[int, ...]) -> Array:
        """Return rows of the memory, seen as [..., *tail]."""

    def copy(self) -> Any:
        """Return the memory as it is now."""

    def equals(self, other: Any) -> bool:
        """Tell whether the memory holds the bits of a copy."""


class Bench(Protocol):
    """A place where kernels run: this machine's memory, or a GPU's.

    repeats  calls of a check; where the order of work is not fixed, races show as differences
    """

    repeats: int

    def place(self, values: Array, dtype: str) -> Buffer:
        """Return an argument that holds some values."""

    def scratch(self, n: int, dtype: str, shape: tuple[int, ...]) -> Any:
        """Return poisoned memory for the `n`-th scratch argument; calls share it."""

    def clear(self) -> None:
        """Give memory back that no argument holds."""

    def load(self, library: Path, function: str) -> Callable[..., object]:
        """Return a function of a built library."""

    def wait(self) -> None:
        """Wait until what was called has ended."""

    def is_lost(self) -> bool:
        """Tell whether an earlier fault makes every further call of this process fail."""

    def sustained(self, call: Callable[[], object], seconds: float, least: int) -> list[float]:
        """Return microseconds of single calls under load, the caches cold before each."""

    def typical(self, times: list[float]) -> float:
        """Return what counts of the times that `sustained` returned."""

    def burst(self, call: Callable[[], object], rest: float, count: int) -> list[float]:
        """Return microseconds of the first calls after a rest, the caches cold before each."""


class Call:
    """A case in memory, ready to be called and called again."""

    def __init__(self, case: Case, bench: Bench) -> None:
        self.case, self._bench = case, bench
        self.strayed = False
        """A kernel wrote what is not its own, and who knows what else."""
        values = (*case.inputs, *case.outputs)
        self._memory = [bench.place(x, d) for x, d in zip(values, case.dtypes, strict=True)]
        for memory in self._memory:
            memory.reset()

    def arguments(self, scratch: Sequence[Shape] = ()) -> list[Any]:
        """Return what a kernel takes, its scratch memory included."""
        more = [self._bench.scratch(n, *shape) for n, shape in enumerate(scratch)]
        return [*(memory.argument for memory in self._memory), *more]

    def check(self, kernel: Callable[..., object], scratch: Sequence[Shape] = ()) -> str | None:
        """Run the kernel and say what is wrong with what it did, if anything."""
        first: list[Any] = []
        for _ in range(self._bench.repeats):
            for memory in self._memory:
                memory.reset()
            kernel(*self.arguments(scratch))
            self._bench.wait()
            stray = self._stray()
            self.strayed = self.strayed or stray is not None
            found = stray or self._wrong() or self._differs(first)
            if found is not None:
                return f"{found}, in the call of {self.case.name}"
            if self._bench.repeats > 1 and not first:
                first = [memory.copy() for memory in self._outputs]
        return None

    @property
    def _outputs(self) -> list[Buffer]:
        return self._memory[len(self.case.inputs) :]

    def _stray(self) -> str | None:
        """Say where the kernel wrote what is not its own."""
        for n, memory in enumerate(self._memory):
            if memory.is_outside_written():
                return f"argument {n} is written out of bounds"
        for n, memory in enumerate(self._memory[: len(self.case.inputs)]):
            if memory.is_changed():
                return f"argument {n} is read only but was written"
        return None

    def _wrong(self) -> str | None:
        dtypes = self.case.dtypes[len(self.case.inputs) :]
        for expected in self.case.expected:
            found = self._outputs[expected.output].rows(expected.rows, expected.values.shape[1:])
            if wrong := compare(decode(found, dtypes[expected.output]), expected):
                return f"output {expected.output} {wrong}"
        return None

    def _differs(self, first: list[Any]) -> str | None:
        for n, before in enumerate(first):
            if not self._outputs[n].equals(before):
                return f"output {n} differs between calls of the same arguments"
        return None


def compare(got: Array, expected: Expected) -> str | None:
    """Say where `got` differs from what is expected by more than the tolerance, or None."""
    want = expected.values
    if want.size == 0:
        return None
    if want.dtype.kind == "i":
        return _compare_lists(got, expected)
    finite = np.isfinite(want)
    size = _size(np.where(finite, want, 0.0), int(np.count_nonzero(finite)))
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


def _size(want: Array, count: int) -> Array:
    """Return what errors are relative to, beside the value itself: [..., 1].

    Weights rounded to 16 bits err by a share of the values they meet, however these cancel. That is
    large in a row that sees few keys, whose elements are large on the whole.
    """
    row = np.sqrt(np.mean(np.square(want), axis=-1, keepdims=True))
    return np.asarray(np.maximum(row, np.sum(np.abs(want)) / max(1, count)))


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
