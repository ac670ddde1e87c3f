"""x86-64-v4: AVX-512, Intel servers since Skylake and AMD since Zen 4."""

from sparsegen.arch import Arch

ARCH = Arch(
    name="x86_64_v4",
    kind="cpu",
    # The level's definition in the x86-64 psABI, in the words of /proc/cpuinfo (lzcnt is "abm").
    features=frozenset(
        {"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe", "xsave"}
        | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    ),
    vector_bytes=64,
    vector_registers=32,
    # Two 512-bit fma units: 64 float32 FLOP per cycle (Intel optimisation manual, Skylake server,
    # ports 0+1 fused and 5), at the 2.5 GHz such a core holds under AVX-512 load.
    peak_flops={"float32": 160e9, "float64": 80e9},
    # Eight channels of DDR4-3200, Ice Lake server.
    bandwidth=205e9,
    core_bandwidth=14e9,
    l1_bytes=32 << 10,
    l2_bytes=1 << 20,
    l3_bytes=32 << 20,
    target={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v4"},
)
