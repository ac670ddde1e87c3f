"""Build candidates in parallel and run them in a worker process that may die."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path

from sparsegen.tuning.job import Job
from sparsegen.tuning.process import WorkerDied, Workers
from sparsegen.tuning.space import Candidate, Rejected

BUILD_SECONDS = 120.0
START_SECONDS = 120.0
PATIENCE = 20.0
"""A candidate may take this many times as long as the first one that worked."""
LEAST_SECONDS = 5.0
MOST_SECONDS = 60.0


class Isolated:
    """Prepare and time the candidates of one job.

    Nothing that is generated runs in this process. A worker that crashes or hangs is replaced; the
    candidate is rejected and put into quarantine with a file that repeats the failure.

    Args:
        quarantine: folder for candidates that could not be built, crashed, hung or were wrong.
        cold: empty the caches before each timed call where the data would fit in them.
    """

    def __init__(self, job: Job, workers: Workers, quarantine: Path, *, cold: bool = True) -> None:
        self.job, self._workers, self._runner = job, workers, workers.runner
        self._quarantine, self._cold = quarantine, cold
        self._folder = Path(tempfile.mkdtemp(prefix="job-", dir=workers.folder))
        self._libraries: dict[Candidate, Path] = {}
        self._passed: set[Candidate] = set()
        self._loaded: set[Candidate] = set()
        self._cases: list[str] = []
        self._sweep = 0
        self._typical: float | None = None

    # --- building -------------------------------------------------------------------------------

    def prepare(
        self, candidates: Sequence[Candidate], deadline: float
    ) -> Iterator[tuple[Candidate, Rejected | None]]:
        """Build all candidates, several at a time, and check each as soon as it is built."""
        self._make_cases()
        for candidate in self._passed.intersection(candidates):
            yield candidate, None
        jobs: dict[Future[Rejected | None], Candidate] = {
            self._workers.pool.submit(self._build, c, deadline): c
            for c in candidates
            if c not in self._passed
        }
        try:
            left = max(0.0, deadline - time.monotonic())
            for done in as_completed(jobs, timeout=left):
                candidate, rejected = jobs[done], done.result()
                if rejected is None:
                    rejected = self._check(candidate)
                if rejected is not None and rejected.stage == "budget":
                    continue
                if rejected is not None:
                    self._isolate(candidate, rejected)
                yield candidate, rejected
        except TimeoutError:
            return
        finally:
            for job in jobs:
                job.cancel()

    def _build(self, candidate: Candidate, deadline: float) -> Rejected | None:
        seconds = min(BUILD_SECONDS, deadline - time.monotonic())
        if seconds <= 0:
            return Rejected("budget", "no time left")
        library = self._folder / f"{_name(candidate)}.so"
        builder = self._workers.builders.get()
        try:
            if builder.told is not self:
                builder.ask(START_SECONDS, op="job", **self.job.to_json())
                builder.told = self
            answer = builder.ask(
                seconds, op="build", schedule=candidate.schedule, knobs=dict(candidate.knobs),
                out=str(library),
            )  # fmt: skip
        except WorkerDied as death:
            late = time.monotonic() >= deadline
            return Rejected("budget" if late else "build", str(death))
        finally:
            self._workers.builders.put(builder)
        if "rejected" in answer:
            return Rejected("build", answer["rejected"])
        self._libraries[candidate] = library
        return None

    # --- running --------------------------------------------------------------------------------

    def _make_cases(self) -> None:
        if self._cases:
            return
        cases = self.job.cases()
        for n, case in enumerate(cases):
            self._cases.append(str(case.save(self._folder / f"case{n}.npz")))
        machine = self.job.machine
        caches = machine.l3_bytes + self.job.threads * machine.l2_bytes
        # What does not fit in the caches anyway is cold at the start of every call.
        self._sweep = 2 * caches if self._cold and cases[-1].bytes < 4 * caches else 0

    def _ask(self, candidate: Candidate, op: str) -> dict[str, object]:
        """Ask the runner about a candidate, telling a new runner what it must know."""
        if self._runner.told is not self:
            self._loaded.clear()
            threads = self.job.threads
            self._runner.ask(
                START_SECONDS, op="cases", paths=self._cases, sweep=self._sweep, threads=threads
            )
            self._runner.told = self
        name = _name(candidate)
        if candidate not in self._loaded:
            library = str(self._libraries[candidate])
            self._runner.ask(
                LEAST_SECONDS, op="load", name=name, library=library, function=self.job.task
            )
            self._loaded.add(candidate)
        return self._runner.ask(self._patience(), op=op, name=name)

    def _patience(self) -> float:
        if self._typical is None:
            return MOST_SECONDS
        return min(MOST_SECONDS, max(LEAST_SECONDS, PATIENCE * self._typical))

    def _check(self, candidate: Candidate) -> Rejected | None:
        start = time.monotonic()
        try:
            answer = self._ask(candidate, "check")
        except WorkerDied as death:
            return Rejected("check", str(death))
        if "rejected" in answer:
            return Rejected("check", str(answer["rejected"]))
        if self._typical is None:
            self._typical = time.monotonic() - start
        self._passed.add(candidate)
        return None

    def round(self, candidates: Sequence[Candidate]) -> Mapping[Candidate, float | Rejected]:
        """Time each candidate once."""
        found: dict[Candidate, float | Rejected] = {}
        for candidate in candidates:
            try:
                found[candidate] = float(str(self._ask(candidate, "time")["micros"]))
            except WorkerDied as death:
                found[candidate] = Rejected("time", str(death))
                self._isolate(candidate, Rejected("time", str(death)))
        return found

    def _isolate(self, candidate: Candidate, rejected: Rejected) -> None:
        """Write a file that repeats the failure."""
        self._quarantine.mkdir(parents=True, exist_ok=True)
        data = {
            "repeat": "python -m sparsegen.tuning.worker THIS_FILE",
            "stage": rejected.stage,
            "why": rejected.why,
            "schedule": candidate.schedule,
            "knobs": dict(candidate.knobs),
            "job": self.job.to_json(),
        }
        text = json.dumps(data, indent=1)
        digest = hashlib.sha256(f"{self.job}{candidate}".encode()).hexdigest()[:12]
        path = self._quarantine / f"{candidate.schedule}-{rejected.stage}-{digest}.json"
        path.write_text(text + "\n")


def _name(candidate: Candidate) -> str:
    return hashlib.sha256(str(candidate).encode()).hexdigest()[:16]
