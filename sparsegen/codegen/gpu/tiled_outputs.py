"""Write the outputs of `tiled` attention, or put down what must be done again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.stream import get, pin
from sparsegen.codegen.cpu.vec import LOG2E, load_f32
from sparsegen.codegen.gpu import mma
from sparsegen.codegen.gpu.launch import across, add, shuffle_xor
from sparsegen.codegen.gpu.mma import UNIT, ptx
from sparsegen.codegen.gpu.tiled_weights import NEVER
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    const,
    equal,
    load,
    scratch,
    select,
    store,
)

if TYPE_CHECKING:
    from sparsegen.codegen.cpu.rows import Sequence
    from sparsegen.codegen.gpu.tiled_compute import Compute

_CHAINS = 4  # of additions that do not wait for each other
LN2 = 0.6931471805599453
_EXCHANGE = """
__device__ __forceinline__ int sparsegen_exchange(int* p, int x) { return atomicExch(p, x); }
"""


def finish(compute: Compute, sequence: Sequence) -> None:
    """Write the rows of a warp group, and tell where a sum is not finite."""
    kernel, task, cut = compute.kernel, compute.kernel.task, compute.cut
    weights = compute.weights
    zero, odd = const(0.0, "float32"), scratch(_CHAINS, "float32")
    for n in range(_CHAINS):
        store(odd, zero, n)
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
        mine = [4 * j + 2 * half + c for j in range(kernel.dim // 8) for c in range(2)]
        with T.If(token < compute.present), T.Then():
            for n, place in enumerate(mine):
                _notice(odd, n % _CHAINS, load(compute.out, place))
            _notice(odd, 0, total)
        found = [load(compute.out, place) * scale for place in mine]
        narrow = task.o.dtype != "float32"
        if narrow:
            # All lanes take part, also those whose rows do not exist.
            pairs = zip(found[::2], found[1::2], strict=True)
            found = _gathered(compute.lane, [mma.pack(*pair, kernel.dtype) for pair in pairs])
        with T.If(token < compute.present), T.Then():
            row = sequence.q_start + cast(first + token, "int64")
            at = T.bind(row * task.q.heads + cast(head, "int64"))
            (_write_units if narrow else _write_pairs)(compute, at, found)
            if task.lse is not None:
                with T.If(compute.lane % 4 < 1), T.Then():
                    lse = T.log(total) + peak * const(LN2, "float32")
                    lse = select(some, lse, const(NEVER, "float32"))
                    store(kernel.arguments[task.lse].flat, lse, at)
    wrong = T.bind(T.Not(equal(sum(load(odd, n) for n in range(_CHAINS)), zero)))
    if kernel.listed:
        bits = T.shift_right(kernel.fact(compute.base, "twice"), compute.group)
        wrong = T.Or(wrong, T.bitwise_and(bits, const(1, "int32")) > 0)
    if kernel.maps is not None:
        wrong = T.Or(wrong, kernel.maps.twice(compute.view, compute.head))
    with T.If(weights.any(wrong)), T.Then(), T.If(compute.lane < 1), T.Then():
        _put_down(compute)


def _notice(odd: Memory, n: int, x: Value) -> None:
    """Add a zero to `odd`, or NaN for what is not finite; as PTX, for compilers take 0 * x as 0."""
    ptx("fma.rn.f32", odd[n], x, const(0.0, "float32"), odd[n])


def _gathered(lane: Value, words: list[Value]) -> list[Value]:
    """Exchange words of two elements among four lanes, so that each has 8 elements of a row.

    Of four tiles of 8 columns, a lane has a word each, and gets all words of one tile.
    """
    words = [pin(w) for w in words]
    for step in (1, 2):
        upper = T.bind(T.bitwise_and(lane, const(step, "int32")) > 0)
        for n in range(len(words)):
            if n & step == 0:
                a, b = words[n], words[n + step]
                got = pin(shuffle_xor(pin(select(upper, a, b)), step))
                words[n], words[n + step] = pin(select(upper, got, a)), pin(select(upper, b, got))
    return words


def _write_units(compute: Compute, row: Value, words: list[Value]) -> None:
    """Write what lanes have of a row, 16 bytes at a time."""
    kernel = compute.kernel
    flat = kernel.arguments[kernel.task.o].flat
    at = T.bind(row * kernel.dim + cast(compute.lane % 4 * UNIT, "int64"))
    for n in range(0, len(words), 4):
        ptx("st.global.v4.b32", flat.ptr_to([at + n * UNIT]), *words[n : n + 4])


def _write_pairs(compute: Compute, row: Value, found: list[Value]) -> None:
    """Write the float32 elements of a row that this thread has."""
    kernel = compute.kernel
    flat = kernel.arguments[kernel.task.o].flat
    at = T.bind(row * kernel.dim + cast(compute.lane % 4 * 2, "int64"))
    for n in range(0, len(found), 2):
        ptx("st.global.v2.f32", flat.ptr_to([at + 4 * n]), *found[n : n + 2])


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
