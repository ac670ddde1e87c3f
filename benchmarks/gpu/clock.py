"""Time functions on a GPU: in turns, each under its own load, with a cold cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

FLUSH = 256 << 20  # bytes written before each call: several times the L2 cache
SIDE = 8192
COPIED = 1 << 30


@dataclass(frozen=True)
class Times:
    """Milliseconds of a call: median and the tenths below and above, of so many calls."""

    ms: float
    p10: float
    p90: float
    calls: int

    @staticmethod
    def of(samples: list[float]) -> Times:
        """Return the statistics of samples."""
        x = sorted(samples)
        n = len(x)
        return Times(x[n // 2], x[n // 10], x[min(n - 1, 9 * n // 10)], n)


@dataclass(frozen=True)
class Ceilings:
    """What the GPU reached beside the kernels: TFLOP/s of a product, GB/s of a copy."""

    tflops: float
    gbs: float


class Reel:
    """Functions to time in turns; the two that measure the ceilings are among them."""

    def __init__(self, seconds: float = 0.15, rounds: int = 3) -> None:
        self.seconds, self.rounds = seconds, rounds
        self.flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
        self.factors = [
            torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        ]
        self.source = torch.empty(COPIED, dtype=torch.uint8, device="cuda").random_()
        self.target = torch.empty_like(self.source)

    def race(
        self, functions: Mapping[str, Callable[[], object]], told: Callable[[str], None]
    ) -> tuple[dict[str, Times], Ceilings]:
        """Return the times of functions and the ceilings between them.

        Args:
            functions: by label.
            told: is called with a label before its function runs.
        """
        product = torch.empty_like(self.factors[0])
        runners: dict[str, Callable[[], object]] = {
            **functions,
            " product": lambda: torch.mm(*self.factors, out=product),
            " copy": lambda: self.target.copy_(self.source),
        }
        samples: dict[str, list[float]] = {label: [] for label in runners}
        for n in range(self.rounds):
            order = list(runners)
            for label in order if n % 2 == 0 else reversed(order):
                told(label)
                taken = self._stretch(runners[label])
                samples[label] += taken[len(taken) // 3 :]
        times = {label: Times.of(x) for label, x in samples.items()}
        ceilings = Ceilings(
            2 * SIDE**3 / times.pop(" product").ms / 1e9, 2 * COPIED / times.pop(" copy").ms / 1e6
        )
        return times, ceilings

    def _stretch(self, function: Callable[[], object]) -> list[float]:
        """Return the times of calls, one after another, for some time."""
        taken: list[float] = []
        batch = 2
        start = time.perf_counter()
        while len(taken) < 6 or time.perf_counter() - start < self.seconds:
            events = []
            for _ in range(batch):
                self.flush.zero_()
                pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                pair[0].record()
                function()
                pair[1].record()
                events.append(pair)
            torch.cuda.synchronize()
            taken += [a.elapsed_time(b) for a, b in events]
            # The GPU must not wait for the host between calls: some 20 ms are given at once.
            batch = max(1, min(100, round(20 / max(taken[-1], 0.05))))
        return taken
