"""Keep the processes of a search: some build, what is wanted comes first, and one measures."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
from collections.abc import Hashable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import PriorityQueue
from types import TracebackType
from typing import Any

from sparsegen.tuning.job import Job
from sparsegen.tuning.process import Process

START_SECONDS = 120.0

WANTED, AHEAD, END = 0, 1, 2


@dataclass
class Work:
    """A request to a builder about a job; its answer comes when a builder had time for it."""

    job: Job
    request: dict[str, Any]
    seconds: float
    answer: Future[dict[str, Any]] = field(default_factory=Future)
    begun: bool = False


class Workers:
    """The processes of a search: some build, one runs kernels and nothing else runs beside it.

    Args:
        builders: how many candidates are built at a time.
        threads: of the kernels that are measured, on a CPU.
        kind: of the processor whose kernels are measured, "cpu" or "cuda".
    """

    def __init__(self, builders: int, threads: int, kind: str) -> None:
        self.kind = kind
        self.folder = Path(tempfile.mkdtemp(prefix="sparsegen-tune-"))
        self.runner = Process(self.folder / "runner.log", threads, kind)
        self._builders = [
            Process(self.folder / f"builder{n}.log", 1, "builder") for n in range(builders)
        ]
        self._queue: PriorityQueue[tuple[int, int, Work | None]] = PriorityQueue()
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._works: dict[Hashable, Work] = {}
        for process in (self.runner, *self._builders):
            process.start()  # importing TVM takes a second; there is other work meanwhile
        self._threads = [
            threading.Thread(target=self._serve, args=(p,), daemon=True) for p in self._builders
        ]
        for thread in self._threads:
            thread.start()

    @property
    def builders(self) -> int:
        """Return how many candidates are built at a time."""
        return len(self._builders)

    def ask(
        self,
        key: Hashable,
        job: Job,
        request: dict[str, Any],
        seconds: float,
        urgency: int = WANTED,
    ) -> Future[dict[str, Any]]:
        """Return the answer of a builder to come; what has a key already is not done again.

        Args:
            seconds: how long the builder may take before it is killed.
            urgency: WANTED now, or AHEAD of being wanted: done when no builder has anything else.

        Raises (from the future):
            WorkerDied: the builder crashed or hung.
        """
        with self._lock:
            work = self._works.get(key)
            if work is None:
                work = self._works[key] = Work(job, request, seconds)
            elif work.begun or urgency != WANTED:
                return work.answer
            self._queue.put((urgency, next(self._count), work))
        return work.answer

    @property
    def backlog(self) -> int:
        """Return how much nobody has begun."""
        with self._lock:
            return sum(not work.begun for work in self._works.values())

    def drop(self, job: Job | None = None) -> None:
        """Forget what nobody has begun, of one job or of all."""
        with self._lock:
            for key, work in list(self._works.items()):
                if not work.begun and job in (None, work.job):
                    work.begun = True
                    work.answer.set_exception(CancelledError())
                    del self._works[key]

    def _serve(self, builder: Process) -> None:
        while True:
            work = self._queue.get()[-1]
            if work is None:
                return
            with self._lock:
                if work.begun:
                    continue
                work.begun = True
            try:
                if builder.told != work.job:
                    builder.ask(START_SECONDS, op="job", **work.job.to_json())
                    builder.told = work.job
                work.answer.set_result(builder.ask(work.seconds, **work.request))
            except Exception as error:
                work.answer.set_exception(error)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # Threads may be waiting for answers: only they may close the pipes meanwhile.
        self.drop()
        for _ in self._threads:
            self._queue.put((END, next(self._count), None))
        for builder, thread in zip(self._builders, self._threads, strict=True):
            while thread.is_alive():  # it may be about to ask, which starts a worker
                builder.interrupt()
                thread.join(0.05)
        for process in (self.runner, *self._builders):
            process.kill()
        shutil.rmtree(self.folder)
