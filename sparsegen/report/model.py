"""Hold an explanation as data: every number with the formula that it comes from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sparsegen.analysis.roofline import Bound, Rates


@dataclass(frozen=True)
class Amount:
    """A formula over letters, and its value at the sizes asked for."""

    formula: str
    value: int | float

    def __str__(self) -> str:
        shown = f"{self.value:,}"
        return shown if self.formula in ("", str(self.value)) else f"{self.formula} = {shown}"


@dataclass(frozen=True)
class Count(Amount):
    """An amount with the name that formulas have for it; "" where they write it out."""

    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """The keys that one softmax or one score runs over.

    keys      what is iterated
    ranges    stretches of the iteration, of a tile of queries from i_min to i_max
    pairs     visible pairs of a query and a key, for one head
    distinct  keys that some query sees
    last      keys that the last query sees
    """

    keys: str
    ranges: tuple[str, ...]
    pairs: Count
    distinct: Count
    last: Amount


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """What lowers a task.

    name    of the schedule; None: every one declines
    knobs   of the schedule
    origin  why these knobs: the schedule's default, a tuning record, or the caller
    source  of a tuning record: the processor and the size it was measured with
    others  the other schedules of the family, each with why it is not taken
    scratch bytes it takes beside the buffers of the task, for all sequences
    """

    name: str | None
    knobs: Mapping[str, int | bool | str]
    origin: Literal["default", "recorded", "asked for", ""]
    source: str
    others: tuple[tuple[str, str], ...]
    scratch: Amount


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """One task: what it does, over which keys, what that costs, and what lowers it.

    lines      what it reads and writes
    cost       of one sequence: "FLOPs" of products, "pointwise" operations, bytes "read" and
               "written"
    assumed    what the numbers take for granted about data
    intensity  FLOPs per byte; `ridge`: where products take as long as bytes (None: no peak known)
    bound      the least time, for all sequences, as far as data is what is assumed
    """

    name: str
    family: str
    at: str
    lines: tuple[str, ...]
    domains: tuple[Domain, ...]
    cost: Mapping[str, Amount]
    assumed: tuple[str, ...]
    intensity: Amount
    ridge: float | None
    bound: Bound
    schedule: Scheduled | None = None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A value in the cache: elements and bytes per token, and how many tokens stay (None: all)."""

    name: str
    elements: Amount
    bytes: Amount
    last: Amount | None


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """What decoding keeps per token and layer.

    elements, bytes  of what grows with the sequence
    multi_head       elements of multi-head attention of the same shape; None: there is no attention
    saving           per cent less than that
    """

    kept: tuple[Kept, ...]
    elements: Amount
    bytes: Amount
    multi_head: Amount | None
    saving: float | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the last query alone asks for, as in decoding.

    at_most   tokens attended, apart from incomplete windows: as papers print it
    attended  tokens attended at this length
    scored    keys scored to select them
    flops     of matrix products, by task and in total
    """

    at_most: Amount
    attended: Amount
    scored: Amount
    flops: Mapping[str, Amount]
    total: Amount


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What becomes of a pattern, as data; `print` it, or take the fields.

    program    as traced
    sizes      of the letters; `batch` sequences of these lengths
    rates      what the processor does in a second, at most
    tasks      in the order they run
    total      cost of one sequence, all tasks together
    seconds    the least time of the tasks one after the other
    workspace  bytes of what tasks hand to each other, for all sequences
    """

    name: str
    program: str
    arch: str
    rates: Rates
    dtype: str
    layout: str
    sizes: Mapping[str, int]
    batch: int
    tasks: tuple[TaskReport, ...]
    total: Mapping[str, Amount]
    seconds: float
    workspace: Amount
    cache: CacheReport
    step: Step

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: numbers, strings, lists and dictionaries."""
        data: dict[str, Any] = json.loads(self.to_json())
        return data

    def to_json(self) -> str:
        """Return JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        from sparsegen.report.text import text

        return text(self)

    def __repr__(self) -> str:
        return f"<Explanation of {self.name} on {self.arch}: {len(self.tasks)} tasks>"
