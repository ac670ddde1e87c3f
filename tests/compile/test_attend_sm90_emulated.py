"""Attention over lists and in a latent space on Hopper, emulated, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests import gathered, latent
from tests.emulator import emulated
from tests.gpu.test_patterns_gpu import guarded, verify
from tests.harness import listed

CASES = {**latent.CASES, **gathered.CASES}
# Cases with a sibling that is much like them run on devices only: here each takes a while.
ON_DEVICES = frozenset(
    {
        "range 40 ragged", "more tokens than blocks 3", "list, joined, a sink 16 ragged",
        "blocks beside a window 16", "entries and a window 8 ragged",
        "entries and a window 40 ragged", "listed entries and a window 5 ragged",
        "entries 70 ragged", "boxes, ragged", "boxes for both, ragged", "nan 8", "-inf 40",
        "groups of four 16 2 64 ragged", "groups of four 3 1 192 paged",
        "own lists 20 1 64 paged", "odd values 8 paged 1 bfloat16",
        "odd values 80 paged 1 bfloat16", "odd values of two sources 8 ragged",
        "odd values of two sources 80 ragged", "narrow 99 3 64 64 ragged",
        "narrow 66 2 64 448 ragged", "narrow 80 2 192 192 paged",
        "narrow lists of two sources 40 64 64", "narrow lists of two sources 130 192 64",
        "narrow lists of two sources 64 576 64", "narrow lists of two sources 65 384 320",
        "odd values, narrow 80 64 paged 64", "odd values, narrow 140 192 ragged 1",
        "odd values, narrow 70 320 ragged 8",
    }
)  # fmt: skip
assert not ON_DEVICES - set(CASES)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ON_DEVICES])
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
