"""NVIDIA Blackwell data centre: B200, GB200."""

from sparsegen.arch import Arch

ARCH = Arch(
    name="sm_100",
    kind="cuda",
    features=frozenset(
        {
            "cuda",
            "mma",
            "cp_async",
            "ldmatrix",
            "fp8_mma",
            "tma",
            "mbarrier",
            "cluster",
            "setmaxnreg",
            "tcgen05",
        }
    ),
    # The widest load of a thread, and the registers of a multiprocessor (CUDA programming guide,
    # technical specifications per compute capability, as the limits below).
    vector_bytes=16,
    vector_registers=65536,
    # B200 datasheet (HGX, per GPU), dense: 148 multiprocessors.
    peak_flops={"float32": 8e13, "float64": 4e13, "bfloat16": 2.25e15, "float16": 2.25e15},
    # B200: HBM3e.
    bandwidth=8e12,
    l1_bytes=256 << 10,
    l2_bytes=126 << 20,
    shared_bytes=227 << 10,
    shared_core_bytes=228 << 10,
    threads_per_core=2048,
    cores=148,
    target={
        "kind": "cuda",
        "arch": "sm_100a",
        "max_shared_memory_per_block": 227 << 10,
        "max_threads_per_block": 1024,
        "thread_warp_size": 32,
        "host": {"kind": "cuda_host"},
    },
)
