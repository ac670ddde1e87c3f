"""Compute with SIMD lanes: vectors that stay in registers, and functions that never call libm.

LLVM turns `exp` of a vector into one libm call per lane, so the pointwise functions here are
polynomials. They take scalars and vectors alike, and must be called inside a function frame of an
IRBuilder, since they bind their intermediate values (but never vectors of bool: TVM cannot analyse
a variable that holds one).
"""

from __future__ import annotations

import math

from sparsegen.arch import Arch
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    broadcast,
    cast,
    const,
    dtype_of,
    lanes_of,
    load,
    maximum,
    minimum,
    reinterpret,
    select,
    shuffle,
    store,
)

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

# Minimax fits; the comments give the largest relative error of the whole function.
# 2^f, |f| <= 1/2, exact at 0: 9.1e-8
_EXP2 = (
    0.00132647272527, 0.00967151278586, 0.0555073374447, 0.240222420831, 0.693146977598, 1.0,
)  # fmt: skip
# (log(1 + t) - t + t^2/2) / t^3, sqrt(1/2) <= 1 + t <= sqrt(2): 5.8e-9
_LOG = (
    -0.0763450072639, 0.127615821810, -0.131601832614, 0.142017573756, -0.166233571999,
    0.200012268973, -0.250008210385, 0.333333317075,
)  # fmt: skip
# (tanh(x) - x) / x^3 over x^2, |x| <= 0.625: 4.1e-9
_TANH = (-0.00571704359096, 0.0206505860742, -0.0537434977397, 0.133314912834, -0.333332839282)

_MASKED_ALL = -1  # every lane of a 16-lane mask
_NEAREST_EVEN = 4  # "current rounding direction" of the AVX-512 intrinsics


def float_lanes(arch: Arch) -> int:
    """Return how many float32 values one vector register of `arch` holds."""
    return arch.vector_bytes // 4


def alignment(dtype: str) -> int:
    """Return the alignment to declare for an argument: that of one element, never of a vector.

    TVM assumes 64 bytes and nobody checks; a view of a tensor has less.
    """
    return {"float32": 4, "int32": 4, "int64": 8}.get(dtype, 2)


def _like(value: float, x: Value) -> Value:
    return const(value, dtype_of(x), lanes_of(x))


def _horner(coefficients: tuple[float, ...], x: Value) -> Value:
    result = _like(coefficients[0], x)
    for c in coefficients[1:]:
        result = result * x + _like(c, x)
    return T.bind(result)


def exp2(x: Value, arch: Arch | None = None) -> Value:
    """Return 2^x of float32 values; exactly 0 below -126 or so, inf from 127.5 or so on.

    NaN stays NaN. With an `arch` that has AVX-512 and 16 lanes it takes nine instructions.
    """
    lanes = lanes_of(x)
    x = T.bind(x)
    if arch is not None and "avx512f" in arch.features and lanes == 16:
        n = T.bind(T.nearbyint(x))
        p = _horner(_EXP2, T.bind(x - n))
        return T.bind(
            T.call_llvm_pure_intrin(
                "float32x16",
                "llvm.x86.avx512.mask.scalef.ps.512",
                p,
                n,
                const(0.0, "float32", 16),
                const(_MASKED_ALL, "int16"),
                const(_NEAREST_EVEN, "int32"),
            )
        )
    clamped = T.bind(minimum(maximum(x, _like(-126.0, x)), _like(128.0, x)))
    # Truncation rounds because the biased exponent is positive.
    biased = T.bind(cast(clamped + _like(127.5, x), "int32"))
    # Of x, since `clamped` may lose NaN; beyond the bounds the factor or the select decides.
    p = _horner(_EXP2, T.bind(x - cast(biased - _like_int(127, x), "float32")))
    power = reinterpret(T.shift_left(biased, _like_int(23, x)), "float32")
    return T.bind(select(x < _like(-126.0, x), _like(0.0, x), p * power))


def is_number(x: Value) -> Value:
    """Tell whether float32 values are no NaN, in loops that are vectorized too.

    TVM does not vectorize isnan, and its simplifier takes `x == x` for true.
    """
    return x <= _like(math.inf, x)


def _like_int(value: int, x: Value) -> Value:
    return const(value, "int32", lanes_of(x))


def exp(x: Value) -> Value:
    """Return e^x of float32 values; NaN stays NaN."""
    x = T.bind(x)
    # The product with log2(e) is split in two, or its rounding would cost digits for large x.
    whole = T.bind(T.floor(x * _like(LOG2E, x) + _like(0.5, x)))
    rest = T.bind(x - whole * _like(0.693359375, x) + whole * _like(2.12194440e-4, x))
    bounded = minimum(maximum(whole, _like(-200.0, x)), _like(200.0, x))
    # 2^whole in two factors, so that neither over- nor underflows before the product does.
    half = T.bind(T.floor(bounded * _like(0.5, x)))
    fraction = minimum(maximum(rest * _like(LOG2E, x), _like(-1.0, x)), _like(1.0, x))
    result = exp2(fraction) * exp2(half) * exp2(bounded - half)
    return T.bind(select(is_number(x), result, x))


def log(x: Value) -> Value:
    """Return the natural logarithm of float32 values: -inf of 0, NaN below 0."""
    x = T.bind(x)
    tiny = x < _like(1.17549435e-38, x)
    scaled = select(tiny, x * _like(8388608.0, x), x)
    bits = T.bind(reinterpret(scaled, "int32"))
    # Exponent such that the mantissa lies in [sqrt(1/2), sqrt(2)).
    e = T.bind(T.shift_right(bits - _like_int(0x3F3504F3, x), _like_int(23, x)))
    mantissa = reinterpret(bits - T.shift_left(e, _like_int(23, x)), "float32")
    t = T.bind(mantissa - _like(1.0, x))
    power = T.bind(cast(e, "float32") - select(tiny, _like(23.0, x), _like(0.0, x)))
    tail = _horner(_LOG, t) * t * t * t - _like(0.5, x) * t * t
    # ln 2 in two parts: the first has few digits, so its product with the exponent is exact.
    near = t + (tail + power * _like(-2.12194440e-4, x)) + power * _like(0.693359375, x)
    result = select(x > _like(3.4028234e38, x), x, near)
    result = select(x < _like(0.0, x), _like(math.nan, x), result)
    result = select(
        x <= _like(0.0, x), select(x < _like(0.0, x), result, _like(-math.inf, x)), result
    )
    return T.bind(select(is_number(x), result, x))


def tanh(x: Value) -> Value:
    """Return the hyperbolic tangent of float32 values."""
    x = T.bind(x)
    square = T.bind(x * x)
    near = x + x * square * _horner(_TANH, square)
    far = _like(1.0, x) - _like(2.0, x) / (exp(x * _like(2.0, x)) + _like(1.0, x))
    return T.bind(select(square < _like(0.390625, x), near, far))


def sigmoid(x: Value) -> Value:
    """Return 1 / (1 + e^-x) of float32 values."""
    return T.bind(_like(1.0, x) / (exp(_like(0.0, x) - x) + _like(1.0, x)))


def load_f32(buffer: Memory, dtype: str, *index: Value, lanes: int = 1) -> Value:
    """Read consecutive elements of a float32, bfloat16 or float16 buffer as float32."""
    return widened(load(buffer, *index, lanes=lanes), dtype)


def widened(value: Value, dtype: str) -> Value:
    """Convert float32, bfloat16 or float16 values to float32."""
    if dtype != "bfloat16":
        return value if dtype == "float32" else cast(value, "float32")
    # TVM leaves a cast from bfloat16 alone inside T.bind, and then converts its bits as a number.
    bits = cast(reinterpret(value, "uint16"), "uint32")
    return reinterpret(T.shift_left(bits, const(16, "uint32", lanes_of(value))), "float32")


def store_f32(buffer: Memory, dtype: str, value: Value, *index: Value) -> None:
    """Write float32 values to consecutive elements, rounding to the nearest of `dtype`."""
    store(buffer, value if dtype == "float32" else cast(value, dtype), *index)


def accumulators(count: int, lanes: int, dtype: str = "float32") -> list[Memory]:
    """Return `count` vectors to accumulate in.

    Each is an array of its own: LLVM keeps those in registers, while TVM moves an array of more
    than 1024 bytes to the heap.
    """
    return [T.alloc_buffer((lanes,), dtype) for _ in range(count)]


def transpose(rows: list[Value]) -> list[Value]:
    """Transpose a square of `lanes` vectors of `lanes` lanes, in registers."""
    lanes = len(rows)
    step = 1
    while step < lanes:
        done = list(rows)
        for i in range(lanes):
            if i & step:
                continue
            a, b = rows[i], rows[i | step]
            low = [n if not n & step else lanes + (n ^ step) for n in range(lanes)]
            high = [n | step if not n & step else lanes + n for n in range(lanes)]
            done[i] = T.bind(shuffle(a, b, low))
            done[i | step] = T.bind(shuffle(a, b, high))
        rows = done
        step *= 2
    return rows


def spread(x: Value, lanes: int) -> Value:
    """Bind a scalar repeated in all lanes."""
    return T.bind(broadcast(x, lanes))


def total(x: Value) -> Value:
    """Return the sum of the lanes of a vector, halves by halves."""
    width = lanes_of(x)
    while width > 1:
        half = width // 2
        low = shuffle(x, x, list(range(half)))
        x = T.bind(low + shuffle(x, x, list(range(half, width))))
        width = half
    return x
