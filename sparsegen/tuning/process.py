"""Talk to worker processes that may crash or hang at any time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

# TVM imports torch where it finds it, which takes longer than all the rest; kernels of CPUs need
# none. Builders make way for whoever measures.
BOOT = {
    "builder": """
import os, sys
os.nice(10)
sys.modules["torch"] = None
from sparsegen.codegen import tvm
from sparsegen.tuning.worker import serve
sys.exit(serve())
""",
    "cpu": """
import sys
sys.modules["torch"] = None
from sparsegen.tuning import host
from sparsegen.tuning.worker import serve
sys.exit(serve())
""",
    "cuda": """
import sys
from sparsegen.runtime import measure
from sparsegen.tuning.worker import serve
sys.exit(serve())
""",
}
"""What a worker runs that builds, or whose kernels run on a CPU or a GPU."""
_BURIAL_SECONDS = 30.0
"""How long a killed worker may take to go; the driver first ends what it left on the GPU."""
_LAST_WORDS = 5


class WorkerDied(Exception):  # noqa: N818
    """A worker crashed, or was killed because it hung; the text says how."""


class Process:
    """One worker process; started on first use and again after it died.

    Args:
        log: file that receives what the worker writes to stderr.
        threads: size of the thread pool of its kernels.
        role: one of BOOT.
    """

    def __init__(self, log: Path, threads: int, role: str) -> None:
        self._log, self._threads, self._role = log, threads, role
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._buffer = b""
        self.told: object = None
        """Whoever told this worker what it works on; a new worker has been told nothing."""

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
            [sys.executable, "-c", BOOT[self._role]],
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
        lines = self._log.read_text(errors="replace").splitlines()
        said = [x for x in lines if x.strip() and not x.startswith(("  File ", "!!!!"))]
        self.kill()
        return "\n".join([how, *said[-_LAST_WORDS:]])

    def interrupt(self) -> None:
        """Kill the worker; the thread that waits for its answer is told, and cleans up."""
        process = self._process
        if process is not None:
            process.kill()

    def kill(self) -> None:
        """End the worker at once, whatever it does."""
        self.told = None
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_BURIAL_SECONDS)
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
