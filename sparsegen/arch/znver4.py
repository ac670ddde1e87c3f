"""AMD Zen 4: AVX-512 with bfloat16 dot products, EPYC 9004 and Ryzen 7000."""

from sparsegen.arch import Arch

ARCH = Arch(
    name="znver4",
    kind="cpu",
    # x86-64-v4 and what else LLVM emits for znver4. sse4a keeps Intel's processors out.
    features=frozenset(
        {"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe", "xsave"}
        | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
        | {"avx512_bf16", "avx512_vnni", "avx512_vbmi2", "avx512_bitalg", "avx512_vpopcntdq"}
        | {"avx512ifma", "avx512vbmi", "gfni", "vaes", "vpclmulqdq", "sha_ni", "adx", "sse4a"}
    ),
    vector_bytes=64,
    vector_registers=32,
    # Two 256-bit fma pipes make one 512-bit fma per cycle (AMD 19h optimisation guide 57647), that
    # is 32 float32 FLOP, at 3.7 GHz (boost of EPYC 9654). vdpbf16ps issues at the same rate and
    # does twice the work. float16 is converted, not computed.
    peak_flops={"float32": 118.4e9, "float64": 59.2e9, "bfloat16": 236.8e9},
    # Twelve channels of DDR5-4800 per socket (EPYC 9004 datasheet). One core was measured at
    # 22 GB/s reading on a shared machine; its share of the die's fabric link allows a little more.
    bandwidth=460.8e9,
    core_bandwidth=25e9,
    l1_bytes=32 << 10,
    l2_bytes=1 << 20,
    # One core complex of eight cores.
    l3_bytes=32 << 20,
    target={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "znver4"},
)
