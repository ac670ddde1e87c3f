"""Talk to worker processes that may crash or hang at any time."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

_TAIL = 2000


class WorkerDied(Exception):  # noqa: N818
    """A worker crashed, or was killed because it hung; the text says how."""


class Process:
    """One worker process; started on first use and again after it died.

    Args:
        log: file that receives what the worker writes to stderr.
        threads: size of the thread pool of its kernels.
    """

    def __init__(self, log: Path, threads: int) -> None:
        self._log, self._threads = log, threads
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._buffer = b""
        self.known = False
        """Whether this worker has answered: a new one knows nothing of what its forerunner did."""

    @property
    def alive(self) -> bool:
        """Tell whether the worker is running."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the worker unless it runs."""
        if self.alive:
            return
        self.kill()
        threads = str(self._threads)
        self._stderr = self._log.open("wb")
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sparsegen.tuning.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "TVM_NUM_THREADS": threads, "OMP_NUM_THREADS": threads},
        )

    def ask(self, seconds: float, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            WorkerDied: it crashed, or did not answer within `seconds` and was killed.
        """
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerDied(self._obituary()) from None
        answer: dict[str, Any] = json.loads(self._line(time.monotonic() + seconds, seconds))
        self.known = True
        return answer

    def _line(self, deadline: float, seconds: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            ready = select.select([pipe], [], [], max(0.0, left))[0]
            if not ready:
                self.kill()
                raise WorkerDied(f"did not finish within {seconds:.3g} s and was killed")
            read = os.read(pipe, 1 << 16)
            if not read:
                raise WorkerDied(self._obituary())
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _obituary(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"left with code {code}"
        said = self._log.read_bytes()[-_TAIL:].decode(errors="replace").strip()
        self.kill()
        return f"{how}: {said}" if said else how

    def kill(self) -> None:
        """End the worker at once, whatever it does."""
        self.known = False
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        continue  # what was left to send has no reader any more
            self._process = None
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None
