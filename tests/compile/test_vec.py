"""Functions of SIMD lanes, in every form that this machine can run, against float64."""

import math

import numpy as np
import pytest
import torch

from sparsegen import arch
from sparsegen.arch import Arch
from sparsegen.codegen import tvm
from sparsegen.codegen.cpu.vec import exp2
from sparsegen.codegen.tvm import I, IRBuilder, T

HOST = arch.host()
# With AVX-512, 16 lanes take other instructions than fewer do.
FORMS = [
    pytest.param(machine, lanes, id=f"{name}-{lanes}")
    for name, machine in (("any", None), ("host", HOST))
    for lanes in (1, 8, 16)
]


def powers(x: np.ndarray, machine: Arch | None, lanes: int) -> np.ndarray:
    with IRBuilder() as builder, I.ir_module(), T.prim_func(s_tir=True):
        T.func_name("powers")
        given = T.match_buffer(T.arg("x", T.handle()), x.shape, "float32", align=4)
        out = T.match_buffer(T.arg("out", T.handle()), x.shape, "float32", align=4)
        with T.serial(len(x) // lanes) as step:
            at = step * lanes
            tvm.store(out, exp2(tvm.load(given, at, lanes=lanes), machine), at)
    result = torch.full(x.shape, -1.0)
    tvm.compile_module(builder.get(), HOST).mod["powers"](torch.from_numpy(x), result)
    return result.numpy()


@pytest.mark.parametrize(("machine", "lanes"), FORMS)
def test_powers_of_two(machine: Arch | None, lanes: int) -> None:
    x = np.random.default_rng(3).uniform(-125.5, 127, 4096).astype(np.float32)
    np.testing.assert_allclose(powers(x, machine, lanes), np.exp2(x.astype(np.float64)), rtol=2e-7)


@pytest.mark.parametrize(("machine", "lanes"), FORMS)
def test_powers_beyond_the_range(machine: Arch | None, lanes: int) -> None:
    x = np.array([math.nan, math.inf, -math.inf, 3e38, -3e38, 129, -160, 0], dtype=np.float32)
    want = [math.nan, math.inf, 0, math.inf, 0, math.inf, 0, 1]
    got = powers(np.repeat(x, 16), machine, lanes)
    np.testing.assert_array_equal(got, np.repeat(np.array(want, dtype=np.float32), 16))
