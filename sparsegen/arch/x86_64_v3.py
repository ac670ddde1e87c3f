"""x86-64-v3: AVX2 and FMA, any Intel since Haswell and any AMD since Zen."""

from sparsegen.arch import Arch

ARCH = Arch(
    name="x86_64_v3",
    kind="cpu",
    # The level's definition in the x86-64 psABI, in the words of /proc/cpuinfo (lzcnt is "abm").
    features=frozenset({"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe", "xsave"}),
    vector_bytes=32,
    vector_registers=16,
    # Two 256-bit fma units: 32 float32 FLOP per cycle (Intel optimisation manual, Haswell ports
    # 0 and 1; AMD 17h guide, Zen 2 and later), at an all-core 3.0 GHz.
    peak_flops={"float32": 96e9, "float64": 48e9},
    # Eight channels of DDR4-2933, the servers of that generation.
    bandwidth=188e9,
    core_bandwidth=14e9,
    l1_bytes=32 << 10,
    l2_bytes=256 << 10,
    l3_bytes=16 << 20,
    target={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"},
)
