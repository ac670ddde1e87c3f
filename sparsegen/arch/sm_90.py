"""NVIDIA Hopper: H100, H200."""

from sparsegen.arch import Arch

ARCH = Arch(
    name="sm_90",
    kind="cuda",
    features=frozenset(
        {
            "cuda",
            "mma",
            "cp_async",
            "ldmatrix",
            "fp8_mma",
            "wgmma",
            "tma",
            "mbarrier",
            "cluster",
            "setmaxnreg",
        }
    ),
    # The widest load of a thread, and the registers of a multiprocessor (CUDA programming guide,
    # technical specifications per compute capability, as the limits below).
    vector_bytes=16,
    vector_registers=65536,
    # H100 SXM datasheet: 132 multiprocessors at 1.83 GHz, dense; the H200 has the same processor.
    peak_flops={"float32": 6.69e13, "float64": 3.35e13, "bfloat16": 9.894e14, "float16": 9.894e14},
    # H100 SXM: HBM3 (H200: 4.8e12).
    bandwidth=3.35e12,
    l1_bytes=256 << 10,
    l2_bytes=50 << 20,
    shared_bytes=227 << 10,
    shared_core_bytes=228 << 10,
    threads_per_core=2048,
    cores=132,
    target={
        "kind": "cuda",
        "arch": "sm_90a",
        "max_shared_memory_per_block": 227 << 10,
        "max_threads_per_block": 1024,
        "thread_warp_size": 32,
        "host": {"kind": "cuda_host"},
    },
)
