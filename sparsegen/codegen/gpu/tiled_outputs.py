"""Write the outputs of `tiled` attention, or put down what must be done again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.stream import cell, get, pin
from sparsegen.codegen.cpu.vec import LOG2E, load_f32
from sparsegen.codegen.gpu import mma
from sparsegen.codegen.gpu.launch import across, add
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.tiled_weights import NEVER
from sparsegen.codegen.tvm import Memory, T, Value, cast, const, equal, load, select, store

if TYPE_CHECKING:
    from sparsegen.codegen.cpu.rows import Sequence
    from sparsegen.codegen.gpu.tiled_compute import Compute

LN2 = 0.6931471805599453
_EXCHANGE = """
__device__ __forceinline__ int sparsegen_exchange(int* p, int x) { return atomicExch(p, x); }
"""


def finish(compute: Compute, sequence: Sequence) -> None:
    """Write the rows of a warp group, and tell where a sum is not finite."""
    kernel, task, cut = compute.kernel, compute.kernel.task, compute.cut
    weights = compute.weights
    zero, odd = const(0.0, "float32"), cell("float32", const(0.0, "float32"))
    first = kernel.fact(compute.base, "first") + compute.group * cut.tokens
    for half in range(2):
        token = T.bind(compute.rows[half] // cut.heads)
        head = T.bind(compute.head + (compute.rows[half] - token * cut.heads))
        total = across(load(weights.total, half), add, 4)
        peak = T.bind(load(weights.peak, half))
        whole = total
        if task.sink is not None:
            flat = kernel.arguments[task.sink].flat
            sink = load_f32(flat, task.sink.dtype, cast(head, "int64"))
            whole = T.bind(total + T.exp2(sink * const(LOG2E, "float32") - peak))
        some = T.bind(T.Not(equal(total, zero)))
        scale = pin(select(some, const(1.0, "float32") / whole, zero))
        with T.If(token < compute.present), T.Then():
            for n in range(kernel.dim // 2):
                if n // 2 % 2 == half:
                    _notice(odd, load(compute.out, n))
            _notice(odd, total)
            row = sequence.q_start + cast(first + token, "int64")
            at = T.bind(row * task.q.heads + cast(head, "int64"))
            _write(compute, half, at, scale)
            if task.lse is not None:
                with T.If(compute.lane % 4 < 1), T.Then():
                    lse = T.log(total) + peak * const(LN2, "float32")
                    lse = select(some, lse, const(NEVER, "float32"))
                    store(kernel.arguments[task.lse].flat, lse, at)
    wrong = T.bind(T.Not(equal(get(odd), zero)))
    if kernel.listed:
        bits = T.shift_right(kernel.fact(compute.base, "twice"), compute.group)
        wrong = T.Or(wrong, T.bitwise_and(bits, const(1, "int32")) > 0)
    with T.If(weights.any(wrong)), T.Then(), T.If(compute.lane < 1), T.Then():
        _put_down(compute)


def _notice(odd: Memory, x: Value) -> None:
    """Add a zero to `odd`, or NaN for what is not finite; as PTX, for compilers take 0 * x as 0."""
    ptx("fma.rn.f32", odd[0], x, const(0.0, "float32"), odd[0])


def _write(compute: Compute, half: int, row: Value, scale: Value) -> None:
    """Write the elements of a row that this thread has."""
    kernel = compute.kernel
    flat, dim = kernel.arguments[kernel.task.o].flat, kernel.dim
    at = T.bind(row * dim + cast(compute.lane % 4 * 2, "int64"))
    for j in range(dim // 8):
        low, high = (load(compute.out, 4 * j + 2 * half + c) * scale for c in range(2))
        to = flat.ptr_to([at + 8 * j])
        if kernel.task.o.dtype == "float32":
            ptx("st.global.v2.f32", to, low, high)
        else:
            ptx("st.global.b32", to, mma.pack(low, high, kernel.dtype))


def _put_down(compute: Compute) -> None:
    """Put the rows of this warp group on the list of what is done again, once."""
    kernel, turn = compute.kernel, get(compute.turn)
    told = kernel.told.ptr_to([compute.group])
    before = T.bind(
        T.cuda.func_call(
            "sparsegen_exchange", told, turn, source_code=_EXCHANGE, return_type="int32"
        )
    )
    with T.If(T.Not(equal(before, turn))), T.Then():
        place = T.bind(T.cuda.atomic_add(kernel.state.ptr_to([1]), const(1, "int32")))
        entry = kernel.fact(compute.base, "entry") + compute.group
        store(kernel.again, entry, cast(place, "int64"))
