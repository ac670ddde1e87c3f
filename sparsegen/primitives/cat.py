"""Join values along their last axis; always a view: attend and score read the parts in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsegen.analysis.cost import Cost, Costing, rule
from sparsegen.errors import PatternError, Site
from sparsegen.ir.axes import Concat, Fixed
from sparsegen.ir.node import Node
from sparsegen.primitives._evaluate import Array


@dataclass(frozen=True, kw_only=True)
class Cat(Node):
    """Parts side by side along the last axis; a part with one head serves every head."""

    op: ClassVar[str] = "cat"
    parts: tuple[Node, ...]


def cat(parts: tuple[Node, ...], site: Site | None) -> Cat:
    """Type `cat(a, b, ...)`: equal sequence axes, equal heads (or one), last axes joined."""
    if len(parts) < 2:
        raise PatternError(
            "cat() joins two values or more", at=site, hint="use a single value as it is"
        )
    for part in parts:
        if len(part.axes) != 3:
            raise PatternError(
                f"cat() takes [sequence heads dim], got [{' '.join(map(str, part.axes))}]",
                at=site,
                hint="declare three axes; a literal 1 stands for a single head",
            )
    first = parts[0]
    heads = next((p.axes[1] for p in parts if p.axes[1] != Fixed(1)), Fixed(1))
    for part in parts[1:]:
        if part.axes[0] != first.axes[0] or part.axes[1] not in (heads, Fixed(1)):
            raise PatternError(
                f"cat() of [{' '.join(map(str, first.axes))}] and "
                f"[{' '.join(map(str, part.axes))}]: only the last axis may differ",
                at=site,
                hint="give them one sequence axis, and equal heads (or a literal 1)",
            )
    joined = Concat(tuple(p.axes[-1] for p in parts))
    return Cat(parts=parts, axes=(first.axes[0], heads, joined), site=site)


def reference(parts: Sequence[Array]) -> Array:
    """Evaluate in float64: parts [rows heads dim] or [rows 1 dim], joined along the last axis."""
    heads = max(p.shape[1] for p in parts)
    return np.concatenate([np.broadcast_to(p, (len(p), heads, p.shape[2])) for p in parts], axis=-1)


@rule("cat", stored=False)
def cost(node: Cat, at: Costing) -> Cost:
    """Cost nothing: the parts are read in place."""
    return Cost()
