"""Attention on mma.sync cut in every way, emulated on the CPU against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

import sparsegen as sg
from schedules import attend_mma
from schedules.attend_mma import Knobs
from sparsegen import arch, partition, patterns
from sparsegen.errors import CompileError
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import AttendTask
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


# Every cut meets half of the patterns, and every pattern half of the cuts.
PAIRS = [
    pytest.param(name, knobs, id=f"{name}-{'-'.join(map(str, asdict(knobs).values()))}")
    for n, name in enumerate(NAMES)
    for c, knobs in enumerate(CUTS)
    if (n + c) % 2 == 0
]
# Operands that are copied 16 bytes at a time, as test shapes, multiples of nothing, are not.
WHOLE = {
    "causal": Config("whole", {"T": 70, "S": 133, "Hq": 6, "Hk": 2, "D": 64, "E": 32}),
    "document": Config("whole", {"T": 90, "S": 90, "Hq": 2, "Hk": 1, "D": 48, "E": 48}),
    "moba": Config(
        "whole", {"T": 9, "S": 77, "Hq": 4, "Hk": 2, "D": 80, "E": 16}, {"B": 16, "n": 3}
    ),
    "nsa": Config(
        "whole", {"T": 37, "S": 37, "Hq": 6, "Hk": 2, "D": 16, "E": 24},
        {"l": 4, "d": 2, "L": 8, "n": 3, "W": 9},
    ),
    "sliding_window": Config(
        "whole", {"T": 150, "S": 150, "Hq": 4, "Hk": 1, "D": 64, "E": 64},
        {"window": 70, "first": 5},
    ),
}  # fmt: skip


def check(case: Case, knobs: Knobs | None = None) -> None:
    schedule = None if knobs is None else {"attend_1": sg.Schedule("attend_mma", **asdict(knobs))}
    with emulated((8, 0)), guarded(0xFF) as untouched:
        kernel = sg.compile(case.program, target="sm_80", schedule=schedule, **case.options)
        got = listed(kernel(**case.inputs, **case.call))
        untouched()
    verify(case, got)


@pytest.mark.parametrize(("name", "knobs"), PAIRS)
def test_every_cut(name: str, knobs: Knobs) -> None:
    check(one_sequence(name, patterns.configs(name, test=True)[0], torch.bfloat16), knobs)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_units(name: str) -> None:
    check(one_sequence(name, WHOLE[name], torch.bfloat16))


@pytest.mark.parametrize("layout", ["ragged", "paged"])
def test_whole_units_of_batches(layout: str) -> None:
    lengths = [(5, 131), (0, 0), (1, 17), (70, 90), (9, 5)]
    check(batch("causal", WHOLE["causal"], layout, lengths, dtype=torch.float16, page=16))


@pytest.mark.parametrize("layout", ["ragged", "paged"])
def test_short_of_registers(layout: str) -> None:
    """Sums and scores take 192: rows share answers, and weights are rounded at once."""
    config = Config("wide", {"T": 70, "S": 70, "Hq": 4, "Hk": 2, "D": 128, "E": 128})
    lengths = [(5, 131), (1, 17), (70, 90)]
    check(batch("document", config, layout, lengths, dtype=torch.bfloat16, page=16))


@pytest.mark.parametrize("name", ["causal", "sliding_window"])
def test_what_is_not_finite_in_whole_units(name: str) -> None:
    for value in (math.nan, math.inf, -math.inf):
        check(poisoned(name, WHOLE[name], torch.bfloat16, value))


def test_limits_are_refused_with_their_numbers() -> None:
    plan = partition(
        patterns.load("causal").program,
        Binding(dtype="bfloat16", sizes=(("D", 192), ("E", 256), ("Hk", 1), ("Hq", 8))),
    )
    (task,) = (t for t in plan.tasks if isinstance(t, AttendTask))
    gpu = arch.get("sm_86")
    for knobs, why in (
        (Knobs(4, 2, 2, 1, 64, 2), "bytes of shared memory, sm_86 has 101376"),
        (Knobs(4, 2, 1, 1, 64, 1), "1 columns, sums need 2"),
        (Knobs(4, 1, 1, 1, 40, 1), "40 keys: a multiple of 16"),
        (Knobs(4, 1, 2, 2, 32, 1), "2 depths take 2 tiles"),
        (Knobs(0, 1, 1, 1, 16, 1), "at least 1"),
    ):
        with pytest.raises(CompileError, match=why):
            attend_mma.apply(task, knobs, gpu)
    found = list(attend_mma.space(task, gpu))
    assert found[0] == attend_mma.default(task, gpu)
    assert all(attend_mma.apply(task, k, gpu) for k in found[:3] if isinstance(k, Knobs))
    assert any(isinstance(k, Rejected) and "shared memory" in k.reason for k in found)


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
