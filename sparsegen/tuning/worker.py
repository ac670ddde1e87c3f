"""Build, check and time candidates in a process of its own, which may crash or hang.

`python -m sparsegen.tuning.worker` reads one JSON object a line and answers each with one.
`python -m sparsegen.tuning.worker FILE.json` repeats what put a candidate into quarantine.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sparsegen.errors import SparsegenError
from sparsegen.tuning import cases, memory
from sparsegen.tuning.job import Job
from sparsegen.tuning.packing import Array

_SAMPLE_SECONDS = 0.1
_MOST_CALLS = 5
_PR_SET_PDEATHSIG = 1


class Worker:
    """Hold what a worker knows between requests."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._calls: list[memory.Call] = []
        self._kernels: dict[str, Callable[..., object]] = {}
        self._calls_per_sample: dict[str, int] = {}
        self._sweep: list[Array] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do one request: its "op" names a method, the rest are the arguments."""
        op = request.pop("op")
        found = getattr(self, f"do_{op}")(**request)
        return found if isinstance(found, dict) else {"ok": True}

    def do_job(self, **fields: Any) -> None:
        """Learn what is tuned."""
        self._job = Job.from_json(fields)
        # Importing TVM and partitioning now leaves only the building itself to be timed.
        assert self._job.plan

    def do_build(self, schedule: str, knobs: dict[str, Any], out: str) -> dict[str, Any] | None:
        """Build a candidate into the library `out`."""
        assert self._job is not None
        try:
            self._job.build(schedule, knobs, Path(out))
        except SparsegenError as error:
            return {"rejected": str(error)}
        except Exception as error:
            # A schedule that trips over a candidate declines it; the search goes on without.
            return {"rejected": f"{type(error).__name__}: {str(error).strip()[-2000:]}"}
        return None

    def do_cases(self, paths: list[str], sweep: int, threads: int) -> None:
        """Lay out the calls; the last is the timed one. `sweep` bytes are read before each."""
        self._kernels.clear()
        self._calls_per_sample.clear()
        self._calls = [memory.Call(cases.Case.load(Path(p))) for p in paths]
        self._sweep = [np.zeros(sweep // threads // 8) for _ in range(threads if sweep else 0)]

    def do_load(self, name: str, library: str, function: str) -> None:
        """Load a built candidate."""
        self._kernels[name] = memory.load(Path(library), function)

    def do_check(self, name: str) -> dict[str, Any] | None:
        """Run every case and compare."""
        for call in self._calls:
            try:
                wrong = call.check(self._kernels[name])
            except Exception as error:
                # What TVM raises when a kernel refuses its arguments.
                wrong = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
            if wrong is not None:
                return {"rejected": wrong}
        return None

    def do_time(self, name: str) -> dict[str, Any]:
        """Return the least time of a few calls in microseconds, each from a cold cache."""
        kernel, arguments = self._kernels[name], self._calls[-1].arguments
        times = [self._once(kernel, arguments)]
        if name not in self._calls_per_sample:
            # The first call also starts threads and touches fresh pages.
            times = [self._once(kernel, arguments)]
            calls = _SAMPLE_SECONDS / max(times[0], 1e-9)
            self._calls_per_sample[name] = max(1, min(_MOST_CALLS, round(calls)))
        while len(times) < self._calls_per_sample[name]:
            times.append(self._once(kernel, arguments))
        return {"micros": min(times) * 1e6}

    def _once(self, kernel: Callable[..., object], arguments: list[Any]) -> float:
        if self._sweep:
            with ThreadPoolExecutor(len(self._sweep)) as pool:
                list(pool.map(lambda x: np.add(x, 1.0, out=x), self._sweep))
        start = time.perf_counter()
        kernel(*arguments)
        return time.perf_counter() - start


def serve() -> int:
    """Answer requests until the input ends."""
    _isolate()
    # Whatever prints to stdout here goes to stderr; the pipe is for answers.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        worker = Worker()
        for line in sys.stdin:
            answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
    return 0


def _isolate() -> None:
    """Die at once when a kernel crashes, and with the parent; leave nothing behind."""
    # TVM's handlers start processes that look up the stack, which is of no use here.
    for fault in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL):
        signal.signal(fault, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def repeat(path: Path) -> int:
    """Build and check the candidate of a quarantine file in this process."""
    data = json.loads(path.read_text())
    found = Job.from_json(data["job"])
    with TemporaryDirectory() as folder:
        library = found.build(data["schedule"], data["knobs"], Path(folder) / "kernel.so")
        kernel = memory.load(library, found.task)
        for case in found.cases():
            wrong = memory.Call(case).check(kernel)
            print(f"{case.name}: {wrong or 'correct'}", flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(repeat(Path(sys.argv[1])) if len(sys.argv) > 1 else serve())
