"""Have candidates built in parallel, and run them in a worker process that may die."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures import TimeoutError as Late
from pathlib import Path
from typing import Any

from sparsegen.errors import TuningError
from sparsegen.tuning.job import Job
from sparsegen.tuning.process import WorkerDied
from sparsegen.tuning.space import Candidate, Rejected, Sample
from sparsegen.tuning.workers import AHEAD, START_SECONDS, WANTED, Workers

BUILD_SECONDS = 300.0
MAKE_SECONDS = 600.0
PATIENCE = 20.0
"""A candidate may take this many times as long as the first one that worked."""
LEAST_SECONDS = 5.0
MOST_SECONDS = 60.0


class Isolated:
    """Prepare and time the candidates of one job.

    Nothing that is generated runs in this process. A worker that crashes, hangs or loses its GPU is
    replaced; the candidate is rejected and put into quarantine with a file that repeats the
    failure.

    Args:
        quarantine: folder for candidates that could not be built, crashed, hung or were wrong.
        cold: empty the caches of a CPU before each timed call where the data would fit in them.
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

    def ahead(self, candidates: Sequence[Candidate]) -> None:
        """Let builders make the calls, and begin with candidates, before they are asked for.

        On a CPU they would disturb whoever measures, so there it does nothing.
        """
        if self._workers.kind == "cpu":
            return
        self._make(AHEAD)
        for candidate in candidates:
            self._build(candidate, AHEAD)

    def is_ready(self, candidates: Sequence[Candidate]) -> bool:
        """Tell whether the calls are made and candidates are built, or have failed to be."""
        if self._workers.kind == "cpu":
            return True
        return self._make(AHEAD).done() and all(self._build(c, AHEAD).done() for c in candidates)

    def close(self) -> None:
        """Remove the calls, which may be large, and forget what nobody has begun to build."""
        self._workers.drop(self.job)
        self._cases.clear()
        if self._runner.told is self:
            self._runner.told = None
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- building -------------------------------------------------------------------------------

    def prepare(
        self, candidates: Sequence[Candidate], deadline: float
    ) -> Iterator[tuple[Candidate, Rejected | None]]:
        """Build all candidates, several at a time, and check each as soon as it is built."""
        for candidate in self._passed.intersection(candidates):
            yield candidate, None
        made = self._make(WANTED)
        jobs = {self._build(c, WANTED): c for c in candidates if c not in self._passed}
        try:
            if jobs and not self._cases:
                self._take_cases(made, deadline)
            for done in as_completed(jobs, timeout=max(0.0, deadline - time.monotonic())):
                candidate = jobs[done]
                rejected = self._built(candidate, done) or self._check(candidate)
                if rejected is not None:
                    self._isolate(candidate, rejected)
                yield candidate, rejected
        except Late:
            return

    def _build(self, candidate: Candidate, urgency: int) -> Future[dict[str, Any]]:
        kernels = self.job.kernels
        folder = self._workers.folder / hashlib.sha256(repr(kernels).encode()).hexdigest()[:16]
        folder.mkdir(exist_ok=True)
        library = self._libraries[candidate] = folder / f"{_name(candidate)}.so"
        request = {
            "op": "build", "schedule": candidate.schedule, "knobs": dict(candidate.knobs),
            "out": str(library),
        }  # fmt: skip
        key = (kernels, candidate)
        return self._workers.ask(key, self.job, request, BUILD_SECONDS, urgency)

    def _built(self, candidate: Candidate, done: Future[dict[str, Any]]) -> Rejected | None:
        try:
            answer = done.result()
        except WorkerDied as death:
            return Rejected("build", str(death))
        return Rejected("build", answer["rejected"]) if "rejected" in answer else None

    def _make(self, urgency: int) -> Future[dict[str, Any]]:
        request = {"op": "make", "folder": str(self._folder)}
        return self._workers.ask(id(self), self.job, request, MAKE_SECONDS, urgency)

    def _take_cases(self, made: Future[dict[str, Any]], deadline: float) -> None:
        try:
            answer = made.result(max(0.0, deadline - time.monotonic()))
        except WorkerDied as death:
            raise TuningError(f"the calls of {self.job.task} cannot be made: {death}") from None
        if "error" in answer:
            raise TuningError(answer["error"], hint=answer["hint"])
        self._cases = list(answer["paths"])
        machine = self.job.machine
        caches = machine.l3_bytes + self.job.threads * machine.l2_bytes
        # What does not fit in the caches anyway is cold at the start of every call.
        fits = machine.kind == "cpu" and answer["bytes"] < 4 * caches
        self._sweep = 2 * caches if self._cold and fits else 0

    # --- running --------------------------------------------------------------------------------

    def _ask(self, candidate: Candidate, op: str) -> dict[str, Any]:
        """Ask the runner about a candidate, telling a new runner what it must know."""
        if self._runner.told is not self:
            self._loaded.clear()
            self._lay_out()
            self._runner.told = self
        name = _name(candidate)
        if candidate not in self._loaded:
            answer = self._runner.ask(
                LEAST_SECONDS, op="load", name=name, library=str(self._libraries[candidate]),
                function=self.job.task,
                scratch=self.job.scratch(candidate.schedule, dict(candidate.knobs)),
            )  # fmt: skip
            if "rejected" in answer:
                return answer
            self._loaded.add(candidate)
        start = time.monotonic()
        answer = self._runner.ask(self._patience(), op=op, name=name)
        if answer.get("lost"):
            self._runner.kill()
        elif self._typical is None and "rejected" not in answer:
            self._typical = time.monotonic() - start
        return answer

    def _lay_out(self) -> None:
        """Have the calls in the runner's memory; a GPU that was just lost may take a second try."""
        for tries in (1, 2):
            try:
                self._runner.ask(
                    START_SECONDS, op="cases", paths=self._cases, kind=self._workers.kind,
                    sweep=self._sweep, threads=self.job.threads,
                )  # fmt: skip
                return
            except WorkerDied as death:
                if tries == 2:
                    raise TuningError(
                        f"the calls of {self.job.task} cannot be laid out: {death}",
                        hint="tune for sizes that fit into memory",
                    ) from None

    def _patience(self) -> float:
        if self._typical is None:
            return MOST_SECONDS
        return min(MOST_SECONDS, max(LEAST_SECONDS, PATIENCE * self._typical))

    def _check(self, candidate: Candidate) -> Rejected | None:
        try:
            answer = self._ask(candidate, "check")
        except WorkerDied as death:
            return Rejected("check", str(death))
        if "rejected" in answer:
            return Rejected("check", str(answer["rejected"]))
        self._passed.add(candidate)
        return None

    def round(self, candidates: Sequence[Candidate]) -> Mapping[Candidate, Sample | Rejected]:
        """Time each candidate once."""
        return {candidate: self._time(candidate, "time") for candidate in candidates}

    def burst(self, candidates: Sequence[Candidate]) -> Mapping[Candidate, Sample | Rejected]:
        """Time each candidate after a rest, on a GPU."""
        if self._workers.kind == "cpu":
            return {}
        return {candidate: self._time(candidate, "burst") for candidate in candidates}

    def confirm(self, candidate: Candidate) -> Rejected | None:
        """Check a candidate once more, on a GPU, whose threads no call orders twice alike."""
        if self._workers.kind == "cpu":
            return None
        rejected = self._check(candidate)
        if rejected is not None:
            self._passed.discard(candidate)
            self._isolate(candidate, rejected)
        return rejected

    def _time(self, candidate: Candidate, op: str) -> Sample | Rejected:
        try:
            answer = self._ask(candidate, op)
        except WorkerDied as death:
            answer = {"rejected": str(death)}
        if "rejected" not in answer:
            return Sample(float(answer["micros"]), tuple(answer["calls"]))
        rejected = Rejected("time", str(answer["rejected"]))
        self._isolate(candidate, rejected)
        return rejected

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
