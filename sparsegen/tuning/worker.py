"""Build, check and time candidates in a process of its own, which may crash or hang.

`python -m sparsegen.tuning.worker` reads one JSON object a line and answers each with one.
`python -m sparsegen.tuning.worker FILE.json` repeats what put a candidate into quarantine.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from sparsegen.errors import SparsegenError
from sparsegen.tuning.cases import Case
from sparsegen.tuning.job import Job
from sparsegen.tuning.memory import Bench, Call, Shape

_SLICE_SECONDS = {"cpu": 0.1, "cuda": 0.03}
"""How long a candidate runs each time it is its turn."""
_LEAST_CALLS = {"cpu": 1, "cuda": 6}
_REST_SECONDS = 0.1
_BURST_CALLS = 10
_PR_SET_PDEATHSIG = 1


class Worker:
    """Hold what a worker knows between requests."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._bench: Bench | None = None
        self._kind = "cpu"
        self._calls: list[Call] = []
        self._kernels: dict[str, Callable[..., object]] = {}
        self._scratch: dict[str, list[list[Shape]]] = {}
        self._warm: set[str] = set()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do one request: its "op" names a method, the rest are the arguments."""
        op = request.pop("op")
        found = getattr(self, f"do_{op}")(**request)
        return found if isinstance(found, dict) else {"ok": True}

    # --- what builders do -----------------------------------------------------------------------

    def do_job(self, **fields: Any) -> None:
        """Learn what is tuned."""
        self._job = Job.from_json(fields)
        # Partitioning now leaves only the building itself to be timed.
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

    def do_make(self, folder: str) -> dict[str, Any]:
        """Make the calls to check, and write them into a folder; the last one is timed."""
        assert self._job is not None
        paths = []
        try:
            for n, case in enumerate(self._job.cases()):
                paths.append(str(case.save(Path(folder) / f"case{n}.npz")))
        except SparsegenError as error:
            return {"error": error.message, "hint": error.hint}
        return {"paths": paths, "bytes": case.bytes}

    # --- what the runner does -------------------------------------------------------------------

    def do_cases(self, paths: list[str], kind: str, sweep: int, threads: int) -> None:
        """Lay out the calls; the last is the timed one. `sweep` is for CPUs, see `host.Bench`."""
        self._kernels.clear()
        self._scratch.clear()
        self._warm.clear()
        self._calls.clear()
        self._kind = kind
        self._bench = bench_of(kind, self._bench, sweep, threads)
        self._bench.clear()
        self._calls += [Call(Case.load(Path(p)), self._bench) for p in paths]

    def do_load(self, name: str, library: str, function: str, scratch: list[Any]) -> dict[str, Any]:
        """Load a built candidate; `scratch` holds the memory it takes in each of the calls."""
        assert self._bench is not None
        try:
            self._kernels[name] = self._bench.load(Path(library), function)
        except Exception as error:
            return {"rejected": _last_line(error)}
        self._scratch[name] = [[(d, tuple(shape)) for d, shape in call] for call in scratch]
        return {}

    def do_check(self, name: str) -> dict[str, Any]:
        """Run every case and compare."""
        for call, scratch in zip(self._calls, self._scratch[name], strict=True):
            wrong = self._guarded(functools.partial(call.check, self._kernels[name], scratch))
            if wrong is not None:
                return {**wrong, "lost": wrong["lost"] or call.strayed}
        return {}

    def do_time(self, name: str) -> dict[str, Any]:
        """Return what a candidate's turn says, in microseconds, and the single calls."""
        seconds, least = _SLICE_SECONDS[self._kind], _LEAST_CALLS[self._kind]

        def run(bench: Bench, call: Callable[[], object]) -> list[float]:
            if name not in self._warm:
                # The first call also loads code, starts threads and touches fresh pages.
                bench.sustained(call, 0.0, 1)
                self._warm.add(name)
            return bench.sustained(call, seconds, least)

        return self._timed(name, run, lambda bench, times: bench.typical(times))

    def do_burst(self, name: str) -> dict[str, Any]:
        """Return the median of the first calls after a rest, and these calls."""
        return self._timed(
            name,
            lambda bench, call: bench.burst(call, _REST_SECONDS, _BURST_CALLS),
            lambda bench, times: median(times),
        )

    def _timed(
        self,
        name: str,
        run: Callable[[Bench, Callable[[], object]], list[float]],
        typical: Callable[[Bench, list[float]], float],
    ) -> dict[str, Any]:
        bench = self._bench
        assert bench is not None
        times: list[float] = []

        def measure() -> None:
            arguments = self._calls[-1].arguments(self._scratch[name][-1])
            times.extend(run(bench, functools.partial(self._kernels[name], *arguments)))

        failed = self._guarded(measure)
        if failed is not None:
            return failed
        return {"micros": typical(bench, times), "calls": [round(t, 3) for t in times]}

    def _guarded(self, run: Callable[[], str | None]) -> dict[str, Any] | None:
        """Return None if all went well; else what went wrong, and whether this process is lost."""
        assert self._bench is not None
        try:
            wrong = run()
        except Exception as error:
            # What a kernel raises that refuses its arguments, and what a GPU says of a fault.
            wrong = _last_line(error)
        if wrong is None:
            return None
        return {"rejected": wrong, "lost": self._bench.is_lost()}


def bench_of(kind: str, known: Bench | None, sweep: int, threads: int) -> Bench:
    """Return where kernels of a kind of processor run; a process has one GPU bench."""
    # Neither imports what the other needs: torch takes long, and so does TVM.
    if kind == "cuda":
        from sparsegen.runtime import measure

        return known if isinstance(known, measure.Bench) else measure.Bench()
    from sparsegen.tuning import host

    return host.Bench(sweep, threads)


def _last_line(error: Exception) -> str:
    lines = [x for x in str(error).strip().splitlines() if x.strip() and not x.startswith("For ")]
    # torch says first what happened, and then how to debug it; TVM ends with what happened.
    torch_says = type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
    said = (lines[0] if torch_says else lines[-1]) if lines else ""
    return f"{type(error).__name__}: {said}"


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
    kind = found.machine.kind
    bench = bench_of(kind, None, 0, found.threads)
    with TemporaryDirectory() as folder:
        library = found.build(data["schedule"], data["knobs"], Path(folder) / "kernel.so")
        kernel = bench.load(library, found.task)
        scratch = found.scratch(data["schedule"], data["knobs"])
        for case, memory in zip(found.cases(), scratch, strict=True):
            wrong = _told(Call(case, bench), kernel, memory)
            print(f"{case.name}: {wrong or 'correct'}", flush=True)  # noqa: T201
    return 0


def _told(call: Call, kernel: Callable[..., object], scratch: Sequence[Shape]) -> str | None:
    try:
        return call.check(kernel, scratch)
    except Exception as error:
        return _last_line(error)


if __name__ == "__main__":
    sys.exit(repeat(Path(sys.argv[1])) if len(sys.argv) > 1 else serve())
