"""Merge attention results: by their lse, or as a gated sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsegen.errors import PatternError, Site
from sparsegen.ir.axes import Fixed
from sparsegen.ir.node import Node


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
        raise PatternError("merge() combines two parts or more", at=site)
    for part in parts:
        if part.op not in ("attend", "merge") or (gates is None and part.op == "merge"):
            raise PatternError(f"merge() takes attend() results, not a {part.op}", at=site)
        if part.axes != parts[0].axes:
            raise PatternError(
                f"merge() of [{' '.join(map(str, parts[0].axes))}] and "
                f"[{' '.join(map(str, part.axes))}]: the axes must be equal",
                at=site,
            )
    if gates is not None:
        want = (*parts[0].axes[:2], Fixed(len(parts)))
        if gates.axes[:2] != want[:2] or len(gates.axes) != 3 or (
            isinstance(gates.axes[2], Fixed) and gates.axes[2] != want[2]
        ):
            raise PatternError(
                f"the gates of merge() must be [{' '.join(map(str, want))}], "
                f"got [{' '.join(map(str, gates.axes))}]",
                at=site,
            )
    return Merge(parts=parts, gates=gates, axes=parts[0].axes, site=site)
