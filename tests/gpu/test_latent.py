"""Attention over lists of keys, and in a latent space, on a GPU against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests import gathered, latent
from tests.gpu.test_patterns_gpu import run, verify

pytestmark = pytest.mark.gpu

CASES = {**latent.CASES, **gathered.CASES}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name: str) -> None:
    case = CASES[name]()
    if torch.cuda.get_device_capability() != (9, 0) and "schedule" in case.options:
        pytest.skip("the schedule is for Hopper")
    verify(case, run(case))
