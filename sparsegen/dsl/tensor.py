"""Declare the axes of a pattern's inputs: `q: sg.Tensor["T Hq D"]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from sparsegen.errors import PatternError, Site
from sparsegen.ir.axes import Axis, Fixed, Named

_WORD = re.compile(r"[A-Za-z_]\w*|\d+")
_AXES = re.compile(r"\s*(?:[A-Za-z_]\w*|\d+)(?:\s+(?:[A-Za-z_]\w*|\d+))*\s*")


@dataclass(frozen=True)
class Declaration:
    """The axes of an input in order, and whether its elements are numbers or integer ids."""

    axes: tuple[Axis, ...]
    kind: Literal["float", "int"] = "float"


class Tensor:
    """Annotate an input: `Tensor["S Hk D"]`, or `Tensor["S", "int"]` for a table of ids.

    Letters name axes, and equal letters are equal extents (a square weight is "D D"); a number is a
    literal size. The first axis of queries and of keys is their sequence axis.
    """

    def __class_getitem__(cls, item: str | tuple[str, str]) -> Declaration:
        text, kind = item if isinstance(item, tuple) else (item, "float")
        return declaration(text, kind, Site.caller())


def declaration(text: Any, kind: str, site: Site | None) -> Declaration:
    """Read "T Hq D"."""
    if not isinstance(text, str) or not _AXES.fullmatch(text):
        raise PatternError(
            f"{text!r} is no declaration of axes",
            at=site,
            hint='write letters and sizes separated by spaces, as in sg.Tensor["S 1 c"]',
        )
    if kind not in ("float", "int"):
        raise PatternError(
            f"{kind!r} is no kind of input", at=site, hint='use "int" for tables of ids, or nothing'
        )
    axes = tuple(Fixed(int(w)) if w.isdigit() else Named(w) for w in _WORD.findall(text))
    for axis in axes:
        if isinstance(axis, Fixed) and axis.size < 1:
            raise PatternError(
                f"an axis of size {axis.size} in {text!r}",
                at=site,
                hint="write a positive size, or a letter",
            )
    return Declaration(axes, "int" if kind == "int" else "float")
