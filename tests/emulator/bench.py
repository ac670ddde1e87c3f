"""Stand for a GPU in the worker processes of a search: emulated kernels on CPU memory."""

from __future__ import annotations

import time
from collections.abc import Callable

from sparsegen.codegen.gpu import build
from sparsegen.runtime import measure
from tests.emulator import compile_source


class Emulated(measure.Bench):
    """Memory and clock of the CPU."""

    def __init__(self) -> None:
        super().__init__("cpu")

    def wait(self) -> None:
        pass

    def lot(self, call: Callable[[], object], count: int) -> list[float]:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        return times


def install() -> None:
    """Replace the compiler and the bench of this process."""
    build.compile_source = compile_source
    measure.Bench = Emulated
