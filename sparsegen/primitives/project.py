"""Multiply by a weight: latent projections, absorbable because they are linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsegen.analysis.cost import Cost, Costing, rule
from sparsegen.errors import PatternError, Site
from sparsegen.ir.axes import Axis, Fixed
from sparsegen.ir.node import Input, Node
from sparsegen.primitives._evaluate import Array


@dataclass(frozen=True, kw_only=True)
class Project(Node):
    """out[t, h, b] = sum_a x[t, h, a] * w[h, a, b], or w[a, b] when the heads share it.

    `transposed` says that the weight stores its output axis before the contracted one.
    """

    op: ClassVar[str] = "project"
    x: Node
    w: Node
    transposed: bool


def project(x: Node, w: Node, site: Site | None) -> Project:
    """Type `project(x, w)`: contract the last axis of `x` with the weight's axis of that name."""
    if not isinstance(w, Input):
        raise PatternError(
            f"the weight of project() is {w.title}, but must be an input",
            at=site,
            hint='declare it as a parameter, as in w: sg.Tensor["H n c"]',
        )
    if len(x.axes) != 3:
        raise PatternError(
            f"project() takes [sequence heads dim], got [{' '.join(map(str, x.axes))}]",
            at=site,
            hint="declare three axes; a literal 1 stands for a single head",
        )
    if len(w.axes) not in (2, 3):
        raise PatternError(
            f"project() takes a weight of two axes (in, out) or three (head, in, out), "
            f"but {w.name!r} has [{' '.join(map(str, w.axes))}]",
            at=site,
            hint="declare the weight with the axis to contract and the axis it becomes",
        )
    last, pair = x.axes[-1], w.axes[-2:]
    if last not in pair:
        raise PatternError(
            f"project() contracts the last axis of the value, [{last}], "
            f"but the weight {w.name!r} has [{' '.join(map(str, w.axes))}]",
            at=site,
            hint=f"declare one of the weight's last two axes as {last}",
        )
    transposed = pair[0] != last  # a square weight is [in out]
    out: Axis = pair[0] if transposed else pair[1]
    heads: Axis = x.axes[1]
    if len(w.axes) == 3 and heads != w.axes[0]:
        if heads != Fixed(1):
            raise PatternError(
                f"project() multiplies heads [{heads}] by weights of heads [{w.axes[0]}]",
                at=site,
                hint="use one letter for both, or a value with a single head",
            )
        heads = w.axes[0]
    return Project(x=x, w=w, transposed=transposed, axes=(x.axes[0], heads, out), site=site)


def reference(node: Project, x: Array, w: Array) -> Array:
    """Evaluate in float64: x [rows heads in], w as declared; returns [rows heads out]."""
    if node.transposed:
        w = w.swapaxes(-1, -2)
    if w.ndim == 2:
        return x @ w
    out: Array = (x.transpose(1, 0, 2) @ w).transpose(1, 0, 2)
    return out


@rule("project", stored=True)
def cost(node: Project, at: Costing) -> Cost:
    """Count the product; a decoding step projects its query, or all keys again."""
    own = str(node.axes[0]) == at.program.query
    row = 2 * at.size(node.axes[1]) * at.size(node.x.axes[-1]) * at.size(node.axes[-1])
    return Cost(
        products=at.size(node.axes[0]) * row,
        read=at.read(node.x, node.w),
        written=at.written(node),
        step=row if own else at.size(node.axes[0]) * row,
    )
