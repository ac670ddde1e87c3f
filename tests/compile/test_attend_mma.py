"""Attention on mma.sync cut in every way, emulated on the CPU against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

import sparsegen as sg
from schedules.attend_mma import Knobs
from sparsegen import patterns
from sparsegen.patterns import Config
from tests.emulator import emulated
from tests.gpu.test_patterns_gpu import guarded, verify
from tests.harness import Case, batch, listed, one_sequence, poisoned

CUTS = [
    Knobs(1, 1, 1, 1, 16, 1),
    Knobs(4, 1, 1, 1, 64, 2),
    Knobs(2, 2, 1, 1, 128, 3),
    Knobs(1, 2, 2, 1, 32, 1),
    Knobs(2, 2, 4, 1, 64, 2),
    Knobs(1, 1, 4, 1, 128, 3),
]
# Together: ranges, lists of keys and blocks, several sources, mods, masks pair by pair.
NAMES = ("causal", "document", "dsa", "mla_decode", "moba", "sliding_window", "softcap", "v4_csa")


def check(case: Case, knobs: Knobs) -> None:
    with emulated((8, 0)), guarded(0xFF) as untouched:
        schedule = {"attend_1": sg.Schedule("attend_mma", **asdict(knobs))}
        kernel = sg.compile(case.program, target="sm_80", schedule=schedule, **case.options)
        got = listed(kernel(**case.inputs, **case.call))
        untouched()
    verify(case, got)


@pytest.mark.parametrize("knobs", CUTS, ids=lambda k: "-".join(map(str, asdict(k).values())))
@pytest.mark.parametrize("name", NAMES)
def test_every_cut(name: str, knobs: Knobs) -> None:
    check(one_sequence(name, patterns.configs(name, test=True)[0], torch.bfloat16), knobs)


@sg.pattern
def latent(q: "T Hq c", kv: "S 1 c", x: "T 1 e", y: "S 1 e", *, topk=40, d_v=72):  # type: ignore
    """Attend in a latent space to keys that are chosen: all of the machinery of wide values."""
    i, j = sg.index(q, kv)
    sel = sg.select(sg.reduce(sg.score(x, y), "sum", by=(i, j)), topk=topk)
    a = sg.attend(q, kv, kv[..., :d_v], where=(j <= i) & sel[i, j])
    return a, a.lse


# Warps that share rows: by columns alone, and with halves of the products.
SPLIT = [Knobs(2, 2, 2, 1, 32, 2), Knobs(2, 2, 2, 2, 32, 2), Knobs(3, 2, 4, 2, 64, 1)]
SPLIT_IDS = ["columns", "depths", "more depths"]


@pytest.mark.parametrize("layout", ["ragged", "paged"])
@pytest.mark.parametrize("knobs", SPLIT, ids=SPLIT_IDS)
def test_warps_share_rows(knobs: Knobs, layout: str) -> None:
    config = Config("split", {"T": 9, "S": 70, "Hq": 70, "c": 128, "e": 8})
    lengths = [(5, 90), (0, 0), (3, 17)]
    check(batch(latent, config, layout, lengths, dtype=torch.bfloat16), knobs)


@pytest.mark.parametrize("knobs", SPLIT, ids=SPLIT_IDS)
def test_what_is_not_finite_with_shared_rows(knobs: Knobs) -> None:
    config = Config("split", {"T": 5, "S": 70, "Hq": 70, "c": 128, "e": 8})
    for value in (math.nan, math.inf, -math.inf):
        check(poisoned(latent, config, torch.bfloat16, value), knobs)
