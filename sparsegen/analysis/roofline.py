"""Bound a cost from below by what a processor can do: the least time, and what decides it.

products / peak, pointwise / (float32 peak / 2), bytes / bandwidth  ->  the largest of the three

Peaks are those of the arch file. The bytes are read from main memory once: inputs that a cache
already holds may come faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sparsegen.analysis.cost import Cost, Costing, stored
from sparsegen.analysis.sums import Sympy, value
from sparsegen.arch import Arch
from sparsegen.ir.axes import letters
from sparsegen.ir.node import Input, Node

FALLBACK = "float32"
"""What a processor computes in that has no arithmetic in the dtype of the inputs."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the cores at hand do in a second, at most.

    products   FLOPs of matrix products, in `dtype`; None: the arch file states no peak
    pointwise  other operations: half the float32 peak, where an fma counts two
    memory     bytes from main memory
    cores      that these numbers are for; None: the whole device
    """

    dtype: str
    products: float | None
    pointwise: float | None
    memory: float
    cores: int | None


def rates(arch: Arch, dtype: str) -> Rates:
    """Return the rates of an architecture; of one core where the number of cores is not known."""
    used = dtype if dtype in arch.peak_flops else FALLBACK
    cores = (arch.cores or 1) if arch.kind == "cpu" else None
    products, plain = arch.peak_flops.get(used), arch.peak_flops.get(FALLBACK)
    return Rates(
        dtype=used,
        products=None if products is None else products * (cores or 1),
        pointwise=None if plain is None else plain / 2 * (cores or 1),
        memory=arch.memory_rate(cores),
        cores=cores,
    )


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The least seconds of a kernel at given sizes, and the resource that asks for them.

    times  by resource; None where the rate is not known
    """

    seconds: float
    by: str
    times: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least seconds of a kernel by resource: expressions of letters; None: no rate is known.

    intensity  FLOPs of matrix products per byte
    ridge      the intensity at which products take as long as bytes; None: no peak is known
    """

    products: Sympy | None
    pointwise: Sympy | None
    memory: Sympy
    intensity: Sympy
    ridge: float | None

    def bound(self, sizes: Mapping[str, int]) -> Bound:
        """Return the largest of the times at these sizes.

        Raises:
            KeyError: a letter has no size.
        """
        found = {
            name: None if (time := getattr(self, name)) is None else float(value(time, sizes))
            for name in ("products", "pointwise", "memory")
        }
        known = {name: seconds for name, seconds in found.items() if seconds is not None}
        by = max(known, key=lambda name: known[name])
        return Bound(seconds=known[by], by=by, times=found)


def roofline(cost: Cost, at: Rates) -> Roofline:
    """Return the least times of a cost."""
    moved = cost.bytes
    return Roofline(
        products=None if at.products is None else cost.products / at.products,
        pointwise=None if at.pointwise is None else cost.pointwise / at.pointwise,
        memory=moved / at.memory,
        intensity=cost.products / moved,
        ridge=None if at.products is None else at.products / at.memory,
    )


def of_batch(cost: Cost, node: Node, at: Costing, batch: int) -> Cost:
    """Return the cost of equally long sequences: weights and tables of heads are read once."""
    once = sum(at.written(leaf) for leaf in _weights(node, at))
    return replace(
        cost,
        products=cost.products * batch,
        pointwise=cost.pointwise * batch,
        read=(cost.read - once) * batch + once,
        written=cost.written * batch,
    )


def _weights(node: Node, at: Costing) -> set[Input]:
    """Return the inputs without a sequence axis that the kernel of a node reads."""
    sequence = {at.program.query, at.program.key}
    found: set[Input] = set()
    for operand in node.operands():
        if isinstance(operand, Input):
            if not letters(operand.axes[0]) & sequence:
                found.add(operand)
        elif not stored(operand):
            found |= _weights(operand, at)
    return found
