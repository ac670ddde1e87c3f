"""What the emulator makes of single instructions, against numpy, and what it refuses to run."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.emulator import INCLUDE, build, translate

Run = Callable[..., str]

# Kernels take an array of pointers; each stands before the test that runs it.
KERNELS = (INCLUDE.parent / "kernels.cu").read_text()
# What is written here, before the launcher.
SOURCES: list[str] = []


def kernel(text: str) -> str:
    """Remember the source of a kernel, and return its name."""
    SOURCES.append(text)
    return re.findall(r"__global__ void (\w+)\(", text)[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return what launches a kernel: run(name, threads, bytes of shared memory, *arrays)."""
    start, launcher = KERNELS.split("// Launches", 1)
    source = "\n".join([start, *SOURCES])
    cases = [
        f'if (name == "{k}") emu::launch({n}, threads, size, [=] {{ {k}(p); }}, {n});'
        for k in re.findall(r"__global__ void (\w+)\(", source)
        for n in [2 if k.startswith("pair_") else 1]
    ]
    library = tmp_path_factory.mktemp("emulator") / "kernels.so"
    build(translate(f"{source}//{launcher}".replace("CASES", "\n  ".join(cases))), library)
    function = ctypes.CDLL(str(library)).run
    function.restype = ctypes.c_char_p

    def call(name: str, threads: int, size: int, *arrays: Any, box: Any = None) -> str:
        pointers = (ctypes.c_void_p * 8)(*(a.ctypes.data for a in arrays))
        words = None if box is None else (ctypes.c_uint64 * len(box))(*box)
        failure: bytes = function(name.encode(), threads, ctypes.c_ulong(size), pointers, words)
        return failure.decode()

    return call


def random(*shape: int, dtype: str = "float16") -> Any:
    """Return numbers that 16 bits hold, and these bits."""
    x = np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)
    if dtype == "float16":
        half = x.astype(np.float16)
        return half.astype(np.float64), half.view(np.uint16)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64), bits


# --- products of warp groups ----------------------------------------------------------------------


def product(n: int, dtype: str, a: str, b: str) -> str:
    """Write a kernel of 64 x n x 64: `a` is "rows", "columns" or "registers", `b` one of the first.

    Operands come swizzled by tensor maps, as tiles of 64 columns of 128 bytes.
    """
    kind = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    name = f"product_{n}_{kind}_{a}_{b}"
    half = n // 2
    accumulators = ", ".join(f"%{i}" for i in range(half))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(half))
    if a == "registers":
        operand = "{" + ", ".join(f"%{half + i}" for i in range(4)) + f"}}, %{half + 4}"
        inputs = '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])'
        flags, given = f"{int(b == 'columns')}", 5
    else:
        operand, inputs = f"%{half}, %{half + 1}", '"l"(da)'
        flags, given = f"{int(a == 'columns')}, {int(b == 'columns')}", 2
    rows_b, tiles_b = (n, 1) if b == "rows" else (64, -(-n // 64))
    return kernel(f"""
__global__ void {name}(void** p) {{
  extern __shared__ __align__(64) unsigned char memory[];
  const uint16_t *from_a = (const uint16_t*)p[0], *from_b = (const uint16_t*)p[1];
  auto put = [&](unsigned to, int row, int column, uint16_t x) {{
    *(uint16_t*)(memory + to + row * 128 + ((column / 8) ^ (row % 8)) * 16 + column % 8 * 2) = x;
  }};
  for (int i = threadIdx.x; i < 64 * 64; i += 128) put(0, i / 64, i % 64, from_a[i]);
  for (int i = threadIdx.x; i < {rows_b} * {tiles_b} * 64; i += 128) {{
    int row = i / ({tiles_b} * 64), column = i % ({tiles_b} * 64);
    put(8192 + column / 64 * {rows_b * 128}, row, column % 64, from_b[i]);
  }}
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  float d[{half}];
  for (int i = 0; i < {half}; ++i) d[i] = 1e9f;
  uint64_t base = (1ull << 62) | (64ull << 32);
  uint64_t da = base | (1 << 16) | (shared_address(memory) >> 4);
  uint64_t db = base | ({1 if b == "rows" else rows_b * 128 >> 4}ull << 16);
  db |= shared_address(memory + 8192) >> 4;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  for (int k = 0; k < 4; ++k) {{
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) {{
      int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8;
      std::memcpy(&a[i], from_a + row * 64 + k * 16 + i / 2 * 8 + threadIdx.x % 4 * 2, 4);
    }}
    unsigned scale_d = k > 0;
    asm volatile(
        "{{ .reg .pred ps0; setp.ne.b32 ps0, %{half + given}, 0; "
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} "
        "{{{accumulators}}}, {operand}, ps0, 1, -1, {flags}; }}"
        : {outputs} : {inputs}, "l"(db), "r"(scale_d));
    da += {2 if a == "rows" else 128};
    db += {2 if b == "rows" else 128};
  }}
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  float* out = (float*)p[2];
  for (int i = 0; i < {half}; ++i) {{
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i % 4 / 2 * 8;
    out[row * {n} + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = d[i];
  }}
}}
""")


PRODUCTS = {
    args: product(*args)
    for args in [
        (8, "float16", "rows", "rows"),
        (24, "bfloat16", "registers", "rows"),
        (64, "float16", "columns", "rows"),
        (64, "bfloat16", "rows", "columns"),
        (96, "bfloat16", "columns", "columns"),
        (128, "float16", "registers", "columns"),
        (256, "bfloat16", "registers", "columns"),
        (256, "float16", "rows", "rows"),
    ]
}


@pytest.mark.parametrize("args", PRODUCTS, ids=lambda args: "-".join(map(str, args)))
def test_products_of_a_warp_group(run: Run, args: tuple[int, str, str, str]) -> None:
    n, dtype, in_a, in_b = args
    wide = -(-n // 64) * 64
    a, bits_a = random(64, 64, dtype=dtype)
    b, bits_b = random(*((n, 64) if in_b == "rows" else (64, wide)), dtype=dtype)
    out = np.full((64, n), np.nan, np.float32)
    assert run(PRODUCTS[args], 128, 8192 + 4 * 8192, bits_a, bits_b, out) == ""
    left = a.T if in_a == "columns" else a
    right = b.T if in_b == "rows" else b[:, :n]
    np.testing.assert_allclose(out, -left @ right, rtol=1e-5, atol=1e-4)


# --- tensor copies --------------------------------------------------------------------------------


def boxed(x: Any, box: tuple[int, ...], swizzle: int = 3) -> list[int]:
    """Describe a tensor of 16-bit numbers and boxes of it, outer dimension first, for `run`."""
    return [x.ndim, swizzle, *x.shape[::-1], *x.strides[::-1], *box[::-1]]


def copying(rank: int) -> str:
    """Write a kernel that brings a box at p[1] to p[2] as it lies in shared memory, and back."""
    places = ", ".join(f"%{i + 2}" for i in range(rank))
    given = ", ".join(f'"r"(at[{i}])' for i in range(rank))
    stored = ", ".join(f"%{i + 1}" for i in range(rank))
    return kernel(f"""
__global__ void copy_{rank}(void** p) {{
  extern __shared__ __align__(64) unsigned char memory[];
  const int* at = (const int*)p[1];
  int bytes = ((const int*)p[3])[0], tid = threadIdx.x;
  void* barrier = memory + bytes;
  if (tid == 0) {{
    init(barrier, 1);
    expect(barrier, bytes);
    asm volatile(
        "cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {{{places}}}], [%{rank + 2}], %{rank + 3};"
        :  : "r"(shared_address(memory)), "l"(p[7]), {given}, "r"(shared_address(barrier)),
        "l"(0x14F0000000000000ull) : "memory");
  }}
  __syncthreads();
  wait_for(barrier, 0);
  for (int i = tid; i < bytes; i += 64) ((unsigned char*)p[2])[i] = memory[i];
  __syncthreads();
  for (int i = tid; i < bytes / 2; i += 64) ((uint16_t*)memory)[i] ^= 0x8000;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (tid == 0) {{
    asm volatile(
        "cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group "
        "[%0, {{{stored}}}], [%{rank + 1}];"
        : : "l"(p[7]), {given}, "r"(shared_address(memory)) : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }}
}}
""")


COPIES = {rank: copying(rank) for rank in (2, 3, 4, 5)}


@pytest.mark.parametrize(
    ("shape", "box", "at", "swizzle"),
    [
        ((50, 80), (16, 64), (40, 16), 3),
        ((50, 80), (16, 64), (-3, 40), 3),
        ((9, 5, 192), (4, 2, 64), (6, 4, 128), 3),
        ((9, 5, 192), (4, 2, 32), (1, 2, 64), 2),
        ((3, 4, 5, 64), (2, 3, 2, 64), (2, -1, 1, 0), 3),
        ((2, 3, 4, 5, 16), (1, 2, 3, 4, 16), (1, 2, -1, 3, 8), 1),
        ((7, 40), (5, 24), (3, 32), 0),
    ],
)
def test_copies_of_boxes(
    run: Run, shape: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...], swizzle: int
) -> None:
    _, bits = random(*shape)
    before = bits.copy()
    size = 2 * int(np.prod(box))
    got = np.zeros(size // 2, np.uint16)
    place = np.array(at[::-1], np.int32)
    assert (
        run(
            COPIES[len(shape)], 64, size + 8, bits, place, got, np.array([size], np.int32),
            box=boxed(bits, box, swizzle),
        )
        == ""
    )  # fmt: skip
    want = np.zeros(box, np.uint16)
    seen = np.zeros(shape, bool)
    for n in np.ndindex(*box):
        source = tuple(a + i for a, i in zip(at, n, strict=True))
        if all(0 <= c < s for c, s in zip(source, shape, strict=True)):
            want[n] = before[source]
            seen[source] = True
    # Pieces of 16 bytes move by the number of the 128 bytes they lie in.
    pieces = np.arange(size // 16)
    there = pieces ^ (pieces // 8 % (1 << swizzle))
    np.testing.assert_array_equal(got.reshape(-1, 8)[there], want.reshape(-1, 8))
    np.testing.assert_array_equal(bits, np.where(seen, before ^ 0x8000, before))
    assert seen.any()


def test_blocks_of_a_cluster_share_boxes(run: Run) -> None:
    bits = np.random.default_rng(0).integers(0, 1000, (2, 64)).astype(np.uint16)
    got = np.zeros((2, 64), np.int32)
    assert run("pair_shares_boxes", 128, 2064, bits, got, box=boxed(bits, (1, 64))) == ""
    rows = bits.astype(np.int32)
    swizzled = rows.reshape(2, 8, 8)  # the first row of a tile lies as it is
    want = [swizzled[0] * (1 + r) + swizzled[1] * (2 + r) for r in range(2)]
    np.testing.assert_array_equal(got, np.reshape(want, (2, 64)))


@pytest.mark.parametrize(
    ("shape", "box", "swizzle", "why"),
    [
        ((50, 80), (300, 64), 3, "a box of 300 in dimension 1"),
        ((50, 80), (16, 128), 3, "256 bytes do not fit the swizzle"),
        ((50, 81), (16, 64), 3, "a stride of 162 bytes in dimension 1"),
        ((50, 80), (16, 4), 3, "8 bytes, no multiple of 16"),
    ],
)
def test_refuses_tensor_maps(
    run: Run, shape: tuple[int, ...], box: tuple[int, ...], swizzle: int, why: str
) -> None:
    _, bits = random(*shape)
    assert why in run(COPIES[2], 64, 0, bits, box=boxed(bits, box, swizzle))


# --- the rest -------------------------------------------------------------------------------------


def test_matrices(run: Run) -> None:
    _, bits = random(4, 8, 8)
    out = [np.zeros_like(bits) for _ in range(4)]
    assert run("moves_matrices", 32, 32 * 48, bits, *out) == ""
    for got, want in zip(out, (bits, bits.swapaxes(1, 2)) * 2, strict=True):
        np.testing.assert_array_equal(got, want)


def test_lanes(run: Run) -> None:
    x = np.random.default_rng(0).integers(-500, 500, 32).astype(np.int32)
    x[20] = 7
    out = np.zeros((32, 16), np.int32)
    assert run("asks_around", 32, 0, x, out) == ""
    lane = np.arange(32)
    bits = x.view(np.uint32).astype(object)
    ones = np.array([int(b).bit_count() for b in bits])
    first = np.array([(int(b) & -int(b)).bit_length() for b in bits])
    halves = np.repeat([x[:16].sum(), x[16:].sum()], 16)
    votes = int(((x > 0).astype(np.uint64) << lane.astype(np.uint64)).sum())
    want = [
        x.sum(), x.min(), x.max(), np.bitwise_or.reduce(x), np.bitwise_xor.reduce(x), lane == 0,
        halves, np.uint32(votes).astype(np.int32), np.where(lane < 16, (x[:16] == 7).any(), 1) + 2,
        x[lane * 5 % 32], x[lane ^ 9], x[np.where(lane >= 3, lane - 3, lane)],
        x[np.where(lane < 28, lane + 4, lane)], ones + 100 * first,
    ]  # fmt: skip
    for n, expected in enumerate(want):
        np.testing.assert_array_equal(out[:, n], np.broadcast_to(expected, 32), err_msg=str(n))


def test_powers_of_two(run: Run) -> None:
    x = np.array([0, 1.5, -3.25, -125.5, -126.5, -140, 127.9, 128, -np.inf, np.inf, np.nan])
    x = x.astype(np.float32)
    out = np.zeros_like(x)
    assert run("raises_two", len(x), 0, x, out) == ""
    with np.errstate(over="ignore"):
        want = np.exp2(x)
    want[want < np.finfo(np.float32).tiny] = 0
    np.testing.assert_allclose(out, want, rtol=2**-22)


def test_vectors(run: Run) -> None:
    _, bits = random(64, 8)
    out = np.zeros_like(bits)
    assert run("moves_vectors", 64, 1024, bits, out) == ""
    want = bits.copy()
    want[:, 0] = bits[:, 3]
    np.testing.assert_array_equal(out, want)


def test_copies_in_groups(run: Run) -> None:
    _, bits = random(4, 128, 8)
    out = np.zeros_like(bits)
    assert run("copies_in_groups", 128, 4 * 2048 + 8, bits, out) == ""
    bits[1, :, 3:] = 0
    np.testing.assert_array_equal(out, bits[:, np.arange(128) ^ 64])


def test_named_barriers(run: Run) -> None:
    out = np.zeros(1, np.int32)
    assert run("meets", 128, 64, np.array([5, 11, 128], np.int32), out) == ""
    want = 1
    for n in range(5):
        want = 2 * (want + 3 * (n > 0))
    assert out[0] == want


def test_threads_that_look_at_memory(run: Run) -> None:
    out = np.zeros(4, np.int32)
    assert run("spins_for_a_while", 128, 128, out) == ""
    assert out.tolist() == [1, 127 * 64, -1, 127]


@pytest.mark.parametrize("rows", [1, 2, 21])
def test_a_ring_of_buffers(run: Run, rows: int) -> None:
    x = np.random.default_rng(0).integers(0, 999, (rows, 64)).astype(np.uint16)
    out = np.zeros(64, np.int32)
    box = boxed(x, (1, 64))
    assert run("keeps_a_ring", 96, 4096, x, np.array([rows], np.int32), out, box=box) == ""
    np.testing.assert_array_equal(out, (x.astype(np.int32).T * np.arange(1, rows + 1)).sum(1))


def test_some_copies_are_late(run: Run) -> None:
    x = np.ones((16, 64), np.uint16)
    out = np.zeros(16, np.uint16)
    assert run("reads_too_early", 32, 4096, x, out, box=boxed(x, (1, 64))) == ""
    assert set(out.tolist()) == {1, 0xFFFF}


# --- what goes wrong ------------------------------------------------------------------------------

WRONG = {
    name: says for says, name in re.findall(r"// says: (.*)\n__global__ void (\w+)\(", KERNELS)
}


@pytest.mark.parametrize("name", WRONG)
def test_says_what_is_wrong(run: Run, name: str) -> None:
    assert WRONG[name] in run(name, 128, 10240)


def test_refuses_unknown_instructions() -> None:
    with pytest.raises(NotImplementedError, match="tcgen05"):
        translate('void f() { asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory"); }')
