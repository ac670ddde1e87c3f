"""Ship attention variants of the literature, one per file: the stem is the pattern's name.

A file defines the pattern, `CONFIGS` (shapes of published models) and `TEST_CONFIGS` (small shapes
that are multiples of nothing).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsegen.dsl.pattern import Hyper, Pattern
from sparsegen.errors import BindingError
from sparsegen.ir.axes import extent
from sparsegen.ir.node import Input
from sparsegen.ir.program import Program
from sparsegen.plugins import discover
from sparsegen.primitives import Compress, Project

_PLUGINS = discover("sparsegen.patterns", "pattern")
_DOCUMENTS = 16  # at most, of a packed sequence


@dataclass(frozen=True)
class Config:
    """A named shape of a pattern.

    sizes  extent of every letter that is no hyperparameter, the sequence axes included
    hyper  hyperparameters that differ from the defaults
    note   where the numbers come from
    """

    name: str
    sizes: Mapping[str, int]
    hyper: Mapping[str, Hyper] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        return self.name


def names() -> tuple[str, ...]:
    """Return the names of all patterns, without importing any."""
    return tuple(_PLUGINS)


def load(name: str) -> Pattern:
    """Return a pattern by name.

    Raises:
        BindingError: there is no such file, or it defines no pattern of that name.
    """
    found = getattr(_PLUGINS.require(name), name, None)
    if not isinstance(found, Pattern):
        raise BindingError(
            f"{_PLUGINS.files()[name]} defines no pattern {name!r}",
            hint="give the function decorated with @sg.pattern the name of its file",
        )
    return found


def configs(name: str, *, test: bool = False) -> tuple[Config, ...]:
    """Return the shapes of published models for a pattern, or its small test shapes."""
    found: tuple[Config, ...] = getattr(
        _PLUGINS.require(name), "TEST_CONFIGS" if test else "CONFIGS", ()
    )
    return found


def register_path(folder: str | Path) -> None:
    """Look for patterns in one more folder."""
    _PLUGINS.register_path(folder)


def unregister_path(folder: str | Path) -> None:
    """Stop looking in a folder that `register_path` added."""
    _PLUGINS.unregister_path(folder)


def path(name: str) -> Path:
    """Return the file of a pattern."""
    _PLUGINS.require(name)
    return _PLUGINS.files()[name]


def random_inputs(
    program: Program,
    sizes: Mapping[str, int],
    seed: int = 0,
    *,
    distinct: int | None = None,
    only: Collection[str] | None = None,
) -> dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int32]]:
    """Return inputs of one sequence: standard normal, weights of a size that keeps values so.

    Tables of ids are sorted, as those of packed documents are.

    Args:
        distinct: draw so many numbers of each input and repeat them; drawing a billion takes long.
        only: names of the inputs to draw; others are 0 and take no memory.
    """
    rng = np.random.default_rng(seed)
    sequence = (program.query, program.key)
    sizes = {
        **{n: v for n, v in program.hyper if isinstance(v, int) and n not in sequence},
        **sizes,
    }
    fan_in: dict[Input, int] = {}
    for node in program.nodes:
        if isinstance(node, Project) and isinstance(node.w, Input):
            fan_in[node.w] = extent(node.x.axes[-1], sizes)
        elif isinstance(node, Compress) and isinstance(node.weight, Input):
            wide = len(node.weight.axes) == 3
            fan_in[node.weight] = node.width * (extent(node.x.axes[-1], sizes) if wide else 1)
    made: dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int32]] = {}
    for node in program.inputs:
        shape = tuple(extent(a, sizes) for a in node.axes)
        if only is not None and node.name not in only:
            made[node.name] = np.broadcast_to(np.zeros((), np.float32), shape)
        elif node.kind == "int":
            count = min(1 + shape[0] // 8, _DOCUMENTS)
            made[node.name] = np.sort(rng.integers(0, count, shape), 0).astype(np.int32)
        else:
            count = math.prod(shape)
            drawn = rng.standard_normal(min(count, distinct or count))
            x = (drawn * fan_in.get(node, 1) ** -0.5).astype(np.float32)
            made[node.name] = np.resize(x, shape)
    return made
