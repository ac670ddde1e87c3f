"""Heads, dimensions, lists, pages and lengths drawn at random, against float64, on a GPU.

Every example is compiled anew; dimensions that wgmma takes are as likely as those it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsegen.patterns import Config
from tests.gpu.test_patterns_gpu import check
from tests.harness import batch

pytestmark = pytest.mark.gpu

Draw = Callable[..., int]
LENGTHS = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 400)), min_size=1, max_size=4)
DIMENSIONS = st.sampled_from([64, 128, 192, 256, 8, 37, 72, 130])


def _heads(draw: Draw) -> dict[str, int]:
    shared, group = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    return {"Hk": shared, "Hq": shared * group, "D": draw(DIMENSIONS), "E": draw(DIMENSIONS)}


@st.composite
def _dsa(draw: Draw) -> Config:
    c = draw(st.one_of(st.sampled_from([192, 576, 512]), st.integers(2, 300)))
    # Values of whole tiles, or not.
    parts = range(64, min(c, 512) + 1, 64)
    d_v = draw(st.sampled_from(parts)) if parts and draw(st.integers(0, 3)) > 0 else c // 2
    sizes = {"Hq": draw(st.integers(1, 130)), "c": c, "Hi": draw(st.integers(1, 9)), "e": 24}
    hyper = {"topk": draw(st.integers(1, 300)), "d_v": d_v}
    return Config("drawn", sizes, hyper)


@st.composite
def _window(draw: Draw) -> Config:
    hyper = {"window": draw(st.integers(1, 300)), "first": draw(st.integers(0, 9))}
    return Config("drawn", _heads(draw), hyper)


@st.composite
def _blocks(draw: Draw) -> Config:
    block = draw(st.one_of(st.sampled_from([16, 32, 64, 128]), st.integers(1, 90)))
    return Config("drawn", _heads(draw), {"B": block, "n": draw(st.integers(2, 6))})


@st.composite
def _causal(draw: Draw) -> Config:
    return Config("drawn", _heads(draw))


SHAPES: Mapping[str, st.SearchStrategy[Config]] = MappingProxyType(
    {"causal": _causal(), "dsa": _dsa(), "moba": _blocks(), "sliding_window": _window()}
)


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=6)
@given(data=st.data(), layout=st.sampled_from(["dense", "ragged", "paged"]), lengths=LENGTHS)
def test_random_shapes(
    name: str, data: st.DataObject, layout: str, lengths: list[tuple[int, int]]
) -> None:
    config = data.draw(SHAPES[name])
    page = data.draw(st.one_of(st.sampled_from([16, 64]), st.integers(1, 70)))
    seed = data.draw(st.integers(0, 99))
    if layout == "dense":
        lengths = [lengths[0]] * len(lengths)
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    case = batch(name, config, layout, lengths, page=page, dtype=dtype, seed=seed, explicit=False)
    check(case, 2)
