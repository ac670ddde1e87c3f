"""Freeze a traced pattern: outputs and hyperparameters, with canonical JSON and a content hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sparsegen.ir import serial
from sparsegen.ir.axes import letters
from sparsegen.ir.node import Input, Node, Output, walk

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Program:
    """A pattern as data.

    inputs   in the order of the pattern's parameters
    hyper    names and values of the keyword-only parameters at the time of tracing
    outputs  what the pattern returned, in order; `single` tells one value from a tuple of one
    query, key  letters of the query and key sequence axes, as paired by `index(q, k)`
    """

    name: str
    inputs: tuple[Input, ...]
    hyper: tuple[tuple[str, int | float | bool | str | None], ...]
    outputs: tuple[Output, ...]
    single: bool
    query: str
    key: str

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Return every node once, operands before users."""
        return walk(self.outputs)

    @property
    def letters(self) -> frozenset[str]:
        """Return the letters of all inputs."""
        return frozenset().union(*(letters(a) for node in self.inputs for a in node.axes))

    @cached_property
    def hash(self) -> str:
        """Return a hash of the mathematics: equal across re-traces, processes and source places."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self, *, sites: bool = False) -> str:
        """Return canonical JSON; `sites` adds where each value was written."""
        table = serial.encode(self, sites=sites)
        return json.dumps({"format": FORMAT, **table}, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Program:
        """Read what `to_json` wrote; refuse other formats."""
        data: dict[str, Any] = json.loads(text)
        if data.get("format") != FORMAT:
            raise ValueError(f"program format {data.get('format')!r}, expected {FORMAT}")
        program = serial.decode(data)
        assert isinstance(program, Program)
        return program

    def __str__(self) -> str:
        from sparsegen.ir.printer import show_program

        return show_program(self)
