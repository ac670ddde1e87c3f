"""What selections may ask for beside what shipped patterns do, on emulated GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sparsegen as sg
from sparsegen.ir.program import Program
from tests.compile.test_patterns_gpu_emulated import check
from tests.harness import Case, as_numpy, listed


def selecting(choose: Callable[..., Any], **options: Any) -> Program:
    """Return a program whose result is `choose(score, i, j, h)`."""

    @sg.pattern
    def chosen(q: sg.Tensor["T H D"], k: sg.Tensor["S 1 D"]):
        i, j = sg.index(q, k)
        s = sg.score(q, k, scale=0.5, where=j <= i, **options)
        return choose(s, i, j, sg.head(q)).indices

    return chosen.program


def pairs(s: Any, i: Any, j: Any, h: Any) -> Any:
    return sg.reduce(s, "max", by=(h, i, j // 2), norm="softmax")


PROGRAMS = {
    "threshold": lambda: selecting(
        lambda s, i, j, h: sg.select(sg.reduce(s, "max", by=(i, j)), threshold=0.7)
    ),
    "threshold and cap": lambda: selecting(
        lambda s, i, j, h: sg.select(sg.reduce(s, "max", by=(i, j)), threshold=0.2, topk=3)
    ),
    "top_p and cap": lambda: selecting(
        lambda s, i, j, h: sg.select(sg.reduce(s, "sum", by=(h, i, j // 3)), top_p=0.6, topk=4),
        norm="softmax",
    ),
    "top_p of columns": lambda: selecting(
        lambda s, i, j, h: sg.select(sg.reduce(s, "sum", by=(h, j)), top_p=0.5), norm="softmax"
    ),
    "budget that grows": lambda: selecting(
        lambda s, i, j, h: sg.select(sg.reduce(s, "mean", by=(i, j)), topk=1 + i // 4)
    ),
    "lse of blocks": lambda: selecting(
        lambda s, i, j, h: sg.select(sg.reduce(s, "lse", by=(i // 4, j // 5)), topk=3)
    ),
    "mean of slashes": lambda: selecting(
        lambda s, i, j, h: sg.select(sg.reduce(s, "mean", by=(h, i - j)), topk=6)
    ),
    "more forced than fit": lambda: selecting(
        lambda s, i, j, h: sg.select(sg.reduce(s, "max", by=(i, j)), topk=4, force=j % 2 == 0)
    ),
    "softmax of a reduction": lambda: selecting(
        lambda s, i, j, h: sg.select(
            sg.reduce(pairs(s, i, j, h), "sum", by=(i, j // 6)),
            topk=2,
        )
    ),
}


@pytest.mark.parametrize("odd", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", PROGRAMS)
def test_choices(name: str, odd: float | None) -> None:
    program = PROGRAMS[name]()
    rng = np.random.default_rng(0)
    inputs = {
        n: torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).bfloat16()
        for n, shape in (("q", (21, 3, 8)), ("k", (37, 1, 8)))
    }
    # Many ties: few different keys.
    inputs["k"][5:20] = inputs["k"][4]
    if odd is not None:
        inputs["k"][11, :, 3] = odd
    with np.errstate(all="ignore"):
        want = listed(sg.reference(program, as_numpy(inputs)))
    options = {"dtype": "bfloat16", "sizes": {"H": 3, "D": 8}}
    check(Case(program, options, inputs, {}, want))
