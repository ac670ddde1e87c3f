"""Least times against peaks by hand; batches; workspaces against what the runner allocates."""

import dataclasses
from typing import Any

import pytest
import sympy as sp

from sparsegen import arch, patterns
from sparsegen.analysis.cost import Cost, Costing, kernels
from sparsegen.analysis.roofline import of_batch, rates, roofline
from sparsegen.analysis.sums import letter, value
from sparsegen.api import request_of
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.workspace import workspace

T, S = letter("T"), letter("S")
ZEN = dataclasses.replace(arch.get("znver4"), cores=4)


def test_the_slowest_resource_decides() -> None:
    at = rates(ZEN, "float32")
    assert (at.products, at.pointwise, at.cores) == (4 * 118.4e9, 2 * 118.4e9, 4)
    assert at.memory == min(460.8e9, 4 * 25e9)
    roof = roofline(Cost(products=2 * T * S, pointwise=T, read=4 * S, written=4 * T), at)
    assert roof.intensity == 2 * T * S / (4 * S + 4 * T)
    assert roof.ridge == pytest.approx(4.736)
    one = roof.bound({"T": 1, "S": 1000})
    assert one.by == "memory"
    assert one.seconds == one.times["memory"] == pytest.approx(4004 / 100e9)
    many = roof.bound({"T": 1000, "S": 1000})
    assert many.by == "products"
    assert many.seconds == pytest.approx(2e6 / 473.6e9)
    (slow,) = (roofline(Cost(pointwise=S, read=sp.Integer(4)), at),)
    assert slow.bound({"S": 10**6}).by == "pointwise"
    with pytest.raises(KeyError, match="S"):
        roof.bound({"T": 1})


def test_a_dtype_without_arithmetic_is_computed_in_float32() -> None:
    assert rates(ZEN, "bfloat16").products == 4 * 236.8e9
    assert rates(ZEN, "float16").dtype == "float32"
    assert rates(ZEN, "float16").products == 4 * 118.4e9


def test_one_core_counts_where_their_number_is_not_known() -> None:
    at = rates(arch.get("znver4"), "float32")
    assert (at.cores, at.products, at.memory) == (1, 118.4e9, 25e9)


def test_a_gpu_counts_whole() -> None:
    at = rates(arch.get("sm_90"), "bfloat16")
    assert (at.cores, at.products, at.memory) == (None, 9.894e14, 3.35e12)


def test_a_peak_that_is_not_known_bounds_nothing() -> None:
    bare = dataclasses.replace(ZEN, peak_flops={})
    at = rates(bare, "float32")
    assert at.products is None
    roof = roofline(Cost(products=10**15 * S, read=4 * S), at)
    found = roof.bound({"S": 8})
    assert (found.by, found.times["products"], roof.ridge) == ("memory", None, None)


def test_weights_of_a_batch_are_read_once() -> None:
    config = patterns.configs("mla_decode")[0]
    at = Costing(patterns.load("mla_decode").trace(**config.hyper), config.sizes)
    (node, cost), (attend, attended) = kernels(at)[:2]
    eight = of_batch(cost, node, at, 8)
    weights = 4 * 128 * 512 * 128
    assert value(cost.read - weights, config.sizes) * 8 + weights == value(eight.read, config.sizes)
    assert value(eight.products, config.sizes) == 8 * value(cost.products, config.sizes)
    assert of_batch(attended, attend, at, 8).read == 8 * attended.read


def test_sinks_and_slopes_are_weights() -> None:
    for name in ("sliding_window", "alibi"):
        config = patterns.configs(name)[0]
        at = Costing(patterns.load(name).trace(**config.hyper), config.sizes)
        ((node, cost),) = kernels(at)
        twice = value(of_batch(cost, node, at, 2).read, config.sizes)
        once = value(cost.read, config.sizes)
        assert twice == 2 * once - 4 * config.sizes["Hq"]


def plan_of(name: str, config: patterns.Config, **binding: Any) -> Plan:
    request = request_of(name, **binding, **config.hyper)
    sequence = {request.program.query, request.program.key}
    return request.plan({n: s for n, s in config.sizes.items() if n not in sequence})


@pytest.mark.parametrize("name", patterns.names())
@pytest.mark.parametrize("batch", [1, 3])
def test_workspace_is_what_the_runner_allocates(name: str, batch: int) -> None:
    from sparsegen.runtime.describe import describe
    from sparsegen.runtime.standalone.shapes import Extent, shape_of

    for config in patterns.configs(name, test=True):
        plan = plan_of(name, config)
        at = Costing(plan.program, config.sizes)
        queries, keys = (config.sizes[x] for x in (plan.program.query, plan.program.key))
        extent = Extent(batch, batch * queries, batch * keys, {"query": keys, "key": keys})
        buffers = {b.name: b for b in describe(plan, "op", ZEN).buffers}
        allocated = 0
        for buffer in plan.intermediates:
            shape = shape_of(buffers[buffer.name], extent)
            allocated += 4 * int(sp.prod(shape))
        assert value(workspace(plan, at, batch), config.sizes) == allocated, config


def test_workspace_is_a_formula() -> None:
    config = patterns.configs("dsa")[0]
    plan = plan_of("dsa", config)
    assert workspace(plan, Costing(plan.program, config.sizes)) == 8192 * T
    config = patterns.configs("causal")[0]
    plan = plan_of("causal", config)
    assert workspace(plan, Costing(plan.program, config.sizes)) == 0
