"""Hold scores over keyed coordinates while the references of score, reduce and select run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sparsegen.ir.axes import Entries
from sparsegen.ir.expr import Apply, Const, Expr, KeyVar, Pos
from sparsegen.primitives._evaluate import Array, Env


@dataclass(frozen=True)
class Space:
    """Values over the coordinates named by `keys`; -inf means that nothing is visible there.

    keys    one expression per axis of `values`
    coords  the consecutive integers that each axis stands for
    """

    keys: tuple[Expr, ...]
    coords: tuple[Array, ...]
    values: Array

    def env(self, env: Env) -> Env:
        """Return `env` with every key, also as `KeyVar`, bound to its coordinates."""
        return keyed(self.keys, self.coords, env)


def keyed(keys: tuple[Expr, ...], coords: tuple[Array, ...], env: Env) -> Env:
    """Return `env` with keys bound to coordinates, one array axis for each key."""
    values: dict[Expr, Array] = {}
    floors: list[tuple[Expr, int, Array]] = []
    for n, (key, coord) in enumerate(zip(keys, coords, strict=True)):
        shaped = coord.reshape([-1 if m == n else 1 for m in range(len(keys))])
        values[KeyVar(n)] = shaped
        if not isinstance(key, Const):
            values[key] = shaped
        match key:
            case Apply("floordiv", (x, Const(int() as divisor))):
                floors.append((x, divisor, shaped))
            case Pos(role, Entries(parent, width, stride)) if width == stride:
                floors.append((Pos(role, parent), stride, shaped))
    return replace(env.bind(values), floors=tuple(floors))


def softmax(x: Array) -> Array:
    """Normalise the last axis over its visible elements; the others stay -inf."""
    if x.size == 0:
        return x
    visible = x != -np.inf
    with np.errstate(all="ignore"):
        top = np.max(x, axis=-1, keepdims=True)
        e = np.where(visible, np.exp(x - np.where(np.isneginf(top), 0.0, top)), 0.0)
        return np.where(visible, e / e.sum(axis=-1, keepdims=True), -np.inf)
