"""Merge attention results: by their lse, or as a gated sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsegen.analysis.cost import INDEX_BYTES, Cost, Costing, rule
from sparsegen.errors import PatternError, Site
from sparsegen.ir.axes import Fixed
from sparsegen.ir.node import Node
from sparsegen.primitives._evaluate import Array


@dataclass(frozen=True, kw_only=True)
class Merge(Node):
    """Without gates, the attention over the union of disjoint parts: weights exp(lse_p - lse).

    With gates [query heads parts], o[i, h] = sum_p gates[i, h, p] * o_p[i, h] (and no lse).
    """

    op: ClassVar[str] = "merge"
    parts: tuple[Node, ...]
    gates: Node | None = None


def merge(parts: tuple[Node, ...], gates: Node | None, site: Site | None) -> Merge:
    """Type `merge(parts, gates=)`; parts are attend results of equal axes."""
    if len(parts) < 2:
        raise PatternError(
            "merge() combines two parts or more", at=site, hint="return a single part as it is"
        )
    for part in parts:
        if part.op not in ("attend", "merge") or (gates is None and part.op == "merge"):
            raise PatternError(
                f"merge() takes attend() results, not {part.title}",
                at=site,
                hint="merge all parts in one call: sg.merge([a, b, c])",
            )
        if gates is None and getattr(part, "sink", None) is not None:
            raise PatternError(
                "merge() without gates joins parts of one softmax, but a part has its own sink",
                at=site,
                hint="attend to all sources in one call: sg.attend(q, [k1, k2], ..., sink=sink)",
            )
        if part.axes != parts[0].axes:
            raise PatternError(
                f"merge() of [{' '.join(map(str, parts[0].axes))}] and "
                f"[{' '.join(map(str, part.axes))}]: the axes must be equal",
                at=site,
                hint="parts share their queries, and their values are equally wide",
            )
    if gates is not None:
        want = (*parts[0].axes[:2], Fixed(len(parts)))
        if (
            gates.axes[:2] != want[:2]
            or len(gates.axes) != 3
            or (isinstance(gates.axes[2], Fixed) and gates.axes[2] != want[2])
        ):
            raise PatternError(
                f"the gates of merge() must be [{' '.join(map(str, want))}], "
                f"got [{' '.join(map(str, gates.axes))}]",
                at=site,
                hint="declare one gate per query, head and part",
            )
    return Merge(parts=parts, gates=gates, axes=parts[0].axes, site=site)


def reference(
    parts: Sequence[Array], lses: Sequence[Array], gates: Array | None
) -> tuple[Array, Array | None]:
    """Evaluate in float64: parts [t heads dim], lses [t heads]; return o and, ungated, lse."""
    if gates is not None:
        return _weighted([gates[:, :, p] for p in range(len(parts))], parts), None
    lse = np.logaddexp.reduce(np.stack(lses))
    finite = np.where(np.isneginf(lse), 0.0, lse)
    return _weighted([np.exp(part - finite) for part in lses], parts), lse


def _weighted(weights: Sequence[Array], parts: Sequence[Array]) -> Array:
    total: Array = np.zeros_like(parts[0])
    for weight, part in zip(weights, parts, strict=True):
        total += weight[:, :, None] * part
    return total


@rule("merge", stored=True)
def cost(node: Merge, at: Costing) -> Cost:
    """Count one multiplication and addition per part, and read parts with their gates or lses."""
    each = 2 * len(node.parts) * at.elements(node)
    rows = at.size(node.axes[0]) * at.size(node.axes[1])
    weights = rows * len(node.parts) * INDEX_BYTES if node.gates is None else at.read(node.gates)
    lse = rows * INDEX_BYTES if (node, "lse") in at.returned else 0
    return Cost(pointwise=each, read=at.read(*node.parts) + weights, written=at.written(node) + lse)
