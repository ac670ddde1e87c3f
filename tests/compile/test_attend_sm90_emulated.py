"""Attention over lists and in a latent space on Hopper, emulated, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests import gathered, latent
from tests.emulator import emulated
from tests.gpu.test_patterns_gpu import guarded, verify
from tests.harness import listed

CASES = {**latent.CASES, **gathered.CASES}
# What takes long here, and has a shorter sibling; tests on devices run it.
LONG = frozenset(
    {
        "narrow lists of two sources 40 64 64", "narrow lists of two sources 64 576 64",
        "narrow lists of two sources 65 384 320", "narrow 66 2 64 448 ragged",
        "narrow 80 2 192 192 paged", "odd values, narrow 140 192 ragged 1",
        "odd values, narrow 70 320 ragged 8", "boxes for both, ragged",
    }
)  # fmt: skip
assert not LONG - set(CASES)


@pytest.mark.parametrize("name", [name for name in CASES if name not in LONG])
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
