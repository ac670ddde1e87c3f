"""Attention over lists and in a latent space on Hopper, emulated, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests import gathered, latent
from tests.emulator import emulated
from tests.gpu.test_patterns_gpu import guarded, verify
from tests.harness import listed

CASES = {**latent.CASES, **gathered.CASES}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name: str) -> None:
    case = CASES[name]()
    with emulated((9, 0)):
        kernel = case.compile("sm_90")
        assert kernel.schedules["attend_1"].name == "attend_sm90"
        results = []
        for poison in (0xFF, 0x5A):
            with guarded(poison) as untouched:
                results.append(listed(kernel(**case.inputs, **case.call)))
                untouched()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "repeats differ"
    verify(case, results[0])
