"""Every shipped pattern's GPU kernels against the float64 reference, emulated on the CPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sparsegen as sg
from sparsegen import patterns
from tests.emulator import emulated
from tests.gpu.test_patterns_gpu import guarded, verify
from tests.harness import Case, as_numpy, batch, listed, one_sequence, poisoned


def check(case: Case) -> None:
    with emulated((8, 0)), guarded(0xFF) as untouched:
        got = listed(case.compile("sm_80")(**case.inputs, **case.call))
        untouched()
    verify(case, got)


@pytest.mark.parametrize("name", patterns.names())
def test_one_sequence(name: str) -> None:
    check(one_sequence(name, patterns.configs(name, test=True)[0], torch.bfloat16))


@pytest.mark.parametrize("name", patterns.names())
def test_what_is_not_finite_reaches_those_who_see_it(name: str) -> None:
    for value in (math.nan, math.inf, -math.inf):
        check(poisoned(name, patterns.configs(name, test=True)[0], torch.bfloat16, value))


@pytest.mark.parametrize("layout", ["ragged", "paged"])
@pytest.mark.parametrize("name", ["dsa", "hisa", "nsa", "v4_hca"])
def test_batches(name: str, layout: str) -> None:
    config = patterns.configs(name, test=True)[1]
    lengths = [(5, 31), (0, 0), (1, 17), (70, 90)]
    check(batch(name, config, layout, lengths, dtype=torch.bfloat16, explicit=False))


@pytest.mark.parametrize("name", ["causal", "dsa"])
def test_float16(name: str) -> None:
    check(one_sequence(name, patterns.configs(name, test=True)[0], torch.float16))


@pytest.mark.parametrize("zeros", [True, False])
def test_ties_go_to_the_lower_key(zeros: bool) -> None:
    """Scores are +0 and -0, or all equal."""

    @sg.pattern
    def tied(q: sg.Tensor["T H D"], k: sg.Tensor["S H D"]):
        i, j = sg.index(q, k)
        flat = (lambda s: s * 0) if zeros else (lambda s: s * 0 + 1)
        s = sg.score(q, k, mod=flat, scale=1, where=j <= i)
        return sg.select(sg.reduce(s, "max", by=(i, j)), topk=5).indices

    rng = np.random.default_rng(0)
    inputs = {
        n: torch.from_numpy(rng.standard_normal((t, 2, 8)).astype(np.float32)).bfloat16()
        for n, t in (("q", 9), ("k", 40))
    }
    options = {"dtype": "bfloat16", "sizes": {"H": 2, "D": 8}}
    want = listed(sg.reference(tied, as_numpy(inputs)))
    check(Case(tied.program, options, inputs, {}, want))
