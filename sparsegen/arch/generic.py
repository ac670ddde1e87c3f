"""Any 64-bit CPU: what LLVM assumes when it is told nothing."""

from sparsegen.arch import Arch

ARCH = Arch(
    name="generic",
    kind="cpu",
    features=frozenset(),
    # SSE2 and Advanced SIMD, the baselines of x86-64 and AArch64, both have 16 bytes.
    vector_bytes=16,
    vector_registers=16,
    # One multiply and one add of 4 lanes per cycle at 2.5 GHz; no half-precision arithmetic.
    peak_flops={"float32": 20e9, "float64": 10e9},
    # Two channels of DDR4-2666.
    bandwidth=42e9,
    core_bandwidth=10e9,
    l1_bytes=32 << 10,
    l2_bytes=256 << 10,
    l3_bytes=8 << 20,
    # No triple and no mcpu: LLVM takes the machine it runs on and its baseline.
    target={"kind": "llvm"},
)
