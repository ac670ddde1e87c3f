"""Patterns at sizes that Hopper's attention over tiles takes, against float64, on a GPU.

The small sizes of the other tests are no multiples of 64 and go to other schedules.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsegen as sg
from sparsegen.patterns import Config
from tests.gpu.test_patterns_gpu import SCALE, check
from tests.harness import UNPAGED, batch, one_sequence, poisoned

pytestmark = [pytest.mark.gpu, pytest.mark.arch("sm_90")]

_SIZES = {"T": 150, "S": 150, "Hq": 6, "Hk": 2, "D": 128, "E": 64}
CONFIGS = {
    "alibi": Config("tiles", _SIZES),
    "causal": Config("tiles", {**_SIZES, "D": 192, "E": 128}),
    "document": Config("tiles", _SIZES),
    "full": Config("tiles", {**_SIZES, "Hk": 6}),
    "infllm_v2": Config("tiles", _SIZES, {"width": 32, "stride": 16, "B": 64, "n": 3, "local": 1}),
    "mla_prefill": Config(
        "tiles", {"T": 150, "S": 150, "H": 3, "n": 128, "r": 64, "c": 64, "v": 64}
    ),
    "moba": Config("tiles", _SIZES, {"B": 128, "n": 2}),
    "msa": Config("tiles", {**_SIZES, "Hq": 32, "e": 16}, {"B": 64, "n": 2}),
    "nsa": Config("tiles", {**_SIZES, "Hq": 32}, {"l": 32, "d": 16, "L": 64, "n": 2, "W": 70}),
    "quest": Config("tiles", _SIZES, {"B": 16, "n": 5}),
    "seer": Config("tiles", {**_SIZES, "g": 16}, {"B": 32, "n": 3}),
    "sliding_window": Config("tiles", {**_SIZES, "D": 64}, {"window": 70, "first": 3}),
    "softcap": Config("tiles", {**_SIZES, "D": 256, "E": 256}, {"cap": 0.5}),
    "vertical_slash": Config(
        "tiles", _SIZES, {"last": 5, "columns": 9, "slashes": 12, "first": 2, "recent": 3}
    ),
    "xattention": Config("tiles", _SIZES, {"stride": 8, "B": 64, "mass": 0.7}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_sequence(name: str, dtype: torch.dtype) -> None:
    check(one_sequence(name, CONFIGS[name], dtype), scale=SCALE.get(name, 1.0))


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_in_pages(name: str) -> None:
    lengths = [(5, 31), (0, 0), (1, 17), (150, 333), (65, 700), (19, 13)]
    layout = "ragged" if name in UNPAGED else "paged"
    case = batch(
        name, CONFIGS[name], layout, lengths, page=64, dtype=torch.bfloat16, explicit=False
    )
    check(case, scale=SCALE.get(name, 1.0))


def test_many_items() -> None:
    """A block of threads takes several items: all that tells about them is written anew."""
    sizes = {"T": 1700, "S": 150, "Hq": 64, "Hk": 1, "D": 128, "E": 128}
    check(one_sequence("full", Config("many", sizes), torch.bfloat16))


# Knobs that no default has.
KNOBS = [
    ("causal", "attend_1", {"groups": 2, "stages": 3, "tail": 16}),
    ("sliding_window", "attend_1", {"groups": 3, "stages": 4, "joint": True, "tail": 32}),
]


@pytest.mark.parametrize(("name", "task", "knobs"), KNOBS)
def test_knobs(name: str, task: str, knobs: dict[str, Any]) -> None:
    chosen = {task: sg.Schedule("attend_tiles_sm90", keys=64, ahead=False, **knobs)}
    lengths = [(5, 31), (150, 333), (0, 0), (65, 700), (19, 13)]
    options = {"dtype": torch.bfloat16, "explicit": False}
    case = batch(name, CONFIGS[name], "ragged", lengths, **options)
    check(replace(case, options={**case.options, "schedule": chosen}), scale=SCALE.get(name, 1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["causal", "moba", "nsa", "sliding_window"])
def test_a_hidden_row_reaches_no_output(name: str, value: float) -> None:
    check(poisoned(name, CONFIGS[name], torch.bfloat16, value), 2, SCALE.get(name, 1.0))


@pytest.mark.parametrize("name", ["causal", "moba", "sliding_window"])
@settings(max_examples=20)
@given(
    layout=st.sampled_from(["ragged", "paged"]),
    lengths=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 600)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_random_batches(name: str, layout: str, lengths: list[tuple[int, int]], seed: int) -> None:
    case = batch(
        name, CONFIGS[name], layout, lengths, page=64, dtype=torch.bfloat16, seed=seed,
        explicit=False,
    )  # fmt: skip
    check(case, 2)
