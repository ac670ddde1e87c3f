"""Show how a search gets on: a line that is rewritten on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from sparsegen.tuning.space import History, Rejected, Space


class Show(AbstractContextManager["Show"]):
    """Show the task at hand, what was seen, the best gain, and how long it goes on at most."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[state]}"),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._visible = self._progress.console.is_terminal
        self._line: TaskID | None = None
        self._start = self._deadline = 0.0

    def __enter__(self) -> Show:
        if self._visible:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._visible:
            self._progress.stop()

    def phase(self, what: str, deadline: float) -> None:
        """Begin something that ends at `deadline` (by `time.monotonic`) or before."""
        self._start, self._deadline = time.monotonic(), deadline
        if self._line is not None:
            self._progress.remove_task(self._line)
        self._line = self._progress.add_task(
            what, total=max(deadline - self._start, 1e-9), state=""
        )

    def progress(self, history: History, space: Space) -> None:
        """Update the line."""
        if self._line is None:
            return
        now = time.monotonic()
        self._progress.update(
            self._line, completed=now - self._start, state=self._state(history, space, now)
        )

    def _state(self, history: History, space: Space, now: float) -> str:
        seen, measured = len(history), history.measured
        failed = sum(isinstance(o, Rejected) for o in history.outcomes.values())
        best = max((1 / m.ratio for m in measured.values()), default=1.0)
        # The budget ends the search, or the last candidate does.
        rate = (now - self._start) / max(seen, 1)
        left = min(self._deadline - now, rate * (len(space.candidates) - seen))
        rejected = f", {failed} rejected" if failed else ""
        return (
            f"{seen} of {len(space.candidates)} candidates{rejected}, best {best:.2f}x, "
            f"{max(left, 0):.0f} s left"
        )
