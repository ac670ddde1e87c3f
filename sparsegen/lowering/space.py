"""Hold what a knob space excludes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rejected:
    """A candidate that a static inequality excludes, with the reason in words."""

    knobs: Any
    reason: str
