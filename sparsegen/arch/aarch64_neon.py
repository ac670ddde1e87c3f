"""AArch64 with Advanced SIMD: every 64-bit Arm server, without its optional extensions."""

from sparsegen.arch import Arch

ARCH = Arch(
    name="aarch64_neon",
    kind="cpu",
    features=frozenset({"fp", "asimd"}),
    vector_bytes=16,
    vector_registers=32,
    # Two 128-bit fma pipes: 16 float32 FLOP per cycle (Arm Neoverse N1 optimisation guide), at the
    # 2.5 GHz of Graviton 2.
    peak_flops={"float32": 40e9, "float64": 20e9},
    # Eight channels of DDR4-3200, Graviton 2.
    bandwidth=205e9,
    core_bandwidth=14e9,
    l1_bytes=64 << 10,
    l2_bytes=1 << 20,
    l3_bytes=32 << 20,
    target={
        "kind": "llvm",
        "mtriple": "aarch64-linux-gnu",
        "mcpu": "generic",
        "mattr": ["+neon"],
    },
)
