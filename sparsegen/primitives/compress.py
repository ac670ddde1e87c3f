"""Summarise windows of positions: pooled keys, block statistics, learned compressors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sparsegen.analysis.cost import Cost, Costing, rule
from sparsegen.errors import PatternError, Site
from sparsegen.ir.axes import Entries, Named
from sparsegen.ir.node import Node
from sparsegen.primitives._evaluate import Array

How = Literal["mean", "max", "min", "sum", "linear", "softmax"]


@dataclass(frozen=True, kw_only=True)
class Compress(Node):
    """One entry per window of `width` positions every `stride`.

    mean, max, min, sum   over the window, per channel
    linear                weight [width]: out[d] = sum_m w[m] * (x[m, d] + bias[m, d])
                          weight [width D E]: out[e] = sum_m,d w[m, d, e] * (x[m, d] + bias[m, d])
    softmax               per channel: out[d] = sum_m softmax_m(gate[m, d] + bias[m, d]) * x[m, d]
                          with `previous` = (x', gate'): the window is preceded by the window before
                          it, read from x' and gate' (bias has 2 * width slots, previous first; the
                          first entry has no previous window). DeepSeek-V4 CSA, systems §2.1.
    """

    op: ClassVar[str] = "compress"
    x: Node
    how: How
    width: int
    stride: int
    partial: bool = False
    weight: Node | None = None
    gate: Node | None = None
    bias: Node | None = None
    previous: tuple[Node, Node] | None = None

    @property
    def entries(self) -> Entries:
        """Return the axis of the entries."""
        axis = self.axes[0]
        assert isinstance(axis, Entries)
        return axis


def compress(
    x: Node,
    how: How,
    *,
    width: int,
    stride: int,
    partial: bool,
    weight: Node | None,
    gate: Node | None,
    bias: Node | None,
    previous: tuple[Node, Node] | None,
    site: Site | None,
) -> Compress:
    """Type `compress(x, how, width=, stride=)`; the first axis becomes `Entries`."""
    parent = x.axes[0]
    if not isinstance(parent, Named):
        raise PatternError(
            f"compress() pools a sequence axis, but the first axis here is [{parent}]",
            at=site,
            hint="compress an input or a projection, not entries that are compressed already",
        )
    if len(x.axes) != 3:
        raise PatternError(
            f"compress() takes [sequence heads dim], got [{' '.join(map(str, x.axes))}]",
            at=site,
            hint="declare three axes; a literal 1 stands for a single head",
        )
    for name, value in (("width", width), ("stride", stride)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PatternError(
                f"{name}={value!r}: compress() needs a positive integer",
                at=site,
                hint="pass a number or a hyperparameter",
            )
    if width < stride:
        raise PatternError(
            f"compress(width={width}, stride={stride}) would skip positions between windows",
            at=site,
            hint="use width >= stride",
        )
    if partial and how in ("linear", "softmax"):
        raise PatternError(
            f"partial windows have no meaning for how={how!r}",
            at=site,
            hint="drop partial=True, or pool by mean, max, min or sum",
        )
    last = x.axes[-1]
    if how == "linear":
        assert weight is not None
        if len(weight.axes) == 3:
            if weight.axes[1] != last:
                raise PatternError(
                    f"the weight of compress() must be [width {last} out], "
                    f"got [{' '.join(map(str, weight.axes))}]",
                    at=site,
                    hint=f"declare the weight's second axis as {last}",
                )
            last = weight.axes[2]
        elif len(weight.axes) != 1:
            raise PatternError(
                f"the weight of compress() has [{' '.join(map(str, weight.axes))}]",
                at=site,
                hint="declare it [width], or [width in out]",
            )
    if bias is not None and how not in ("linear", "softmax"):
        raise PatternError(
            f"a slot bias has no meaning for how={how!r}",
            at=site,
            hint="pool by a weight, or by sg.softmax(gate, bias=b)",
        )
    if bias is not None and (len(bias.axes) != 2 or bias.axes[1] != x.axes[-1]):
        raise PatternError(
            f"the slot bias of compress() must be [slots {x.axes[-1]}], "
            f"got [{' '.join(map(str, bias.axes))}]",
            at=site,
            hint="declare one row per slot of the window, as wide as the value",
        )
    for other in (gate, *(previous or ())):
        if other is not None and other.axes != x.axes:
            raise PatternError(
                f"compress() of [{' '.join(map(str, x.axes))}] with a gate or previous value of "
                f"[{' '.join(map(str, other.axes))}]: the axes must be equal",
                at=site,
                hint="declare the gate and previous= with the letters of the value",
            )
    if previous is not None and width != stride:
        raise PatternError(
            f"previous= overlaps whole windows, so width ({width}) must equal stride ({stride})",
            at=site,
            hint="drop stride=: the entry already reaches back over the window before it",
        )
    axes = (Entries(parent, width, stride, partial), x.axes[1], last)
    return Compress(
        x=x, how=how, width=width, stride=stride, partial=partial, weight=weight, gate=gate,
        bias=bias, previous=previous, axes=axes, site=site,
    )  # fmt: skip


def reference(
    node: Compress,
    x: Array,
    *,
    weight: Array | None = None,
    gate: Array | None = None,
    bias: Array | None = None,
    previous: tuple[Array, Array] | None = None,
) -> Array:
    """Evaluate in float64: x [rows heads dim], others as declared; returns [entries heads out]."""
    rows = np.arange(node.entries.count(len(x)))[:, None] * node.stride + np.arange(node.width)
    inside = (rows < len(x))[:, :, None, None]  # False only in the ragged window of `partial`
    rows = np.minimum(rows, max(len(x) - 1, 0))
    window = x[rows]  # [entries width heads dim]
    out: Array
    match node.how:
        case "sum":
            out = np.where(inside, window, 0.0).sum(axis=1)
        case "mean":
            out = np.where(inside, window, 0.0).sum(axis=1) / inside.sum(axis=1)
        case "max":
            out = np.where(inside, window, -np.inf).max(axis=1)
        case "min":
            out = np.where(inside, window, np.inf).min(axis=1)
        case "linear":
            assert weight is not None
            if bias is not None:
                window = window + bias[:, None, :]
            form = "ewhd,w->ehd" if weight.ndim == 1 else "ewhd,wdo->eho"
            out = np.einsum(form, window, weight, optimize=True)
        case "softmax":
            assert gate is not None
            gates = gate[rows]
            if previous is not None:
                before = rows - node.width
                first = (before < 0)[:, :, None, None]
                earlier = np.where(first, -np.inf, previous[1][before])
                window = np.concatenate([np.where(first, 0.0, previous[0][before]), window], axis=1)
                gates = np.concatenate([earlier, gates], axis=1)
            if bias is not None:
                gates = gates + bias[:, None, :]
            weights = np.exp(gates - gates.max(axis=1, keepdims=True))
            out = (weights * window).sum(axis=1) / weights.sum(axis=1)
    return out


@rule("compress", stored=True)
def cost(node: Compress, at: Costing) -> Cost:
    """Count products with a weight, one operation per slot otherwise, three with a gate."""
    import sympy as sp

    slots = (2 if node.previous else 1) * node.width
    heads, inner = at.size(node.x.axes[1]), at.size(node.x.axes[-1])
    each = at.size(node.axes[0]) * heads * inner * slots
    wide = node.weight is not None and len(node.weight.axes) == 3
    out = at.size(node.axes[-1]) if wide else sp.Integer(1)
    pointwise = {"linear": 0, "softmax": 3}.get(node.how, 1) + (node.bias is not None)
    return Cost(
        products=2 * each * out if node.how == "linear" else 0,
        pointwise=each * pointwise,
        read=at.read(node.x, node.weight, node.gate, node.bias, *(node.previous or ())),
        written=at.written(node),
    )
