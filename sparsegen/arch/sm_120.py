"""NVIDIA Blackwell workstation: RTX 5090, RTX PRO 6000."""

from sparsegen.arch import Arch

ARCH = Arch(
    name="sm_120",
    kind="cuda",
    features=frozenset(
        {"cuda", "mma", "cp_async", "ldmatrix", "fp8_mma", "tma", "mbarrier", "cluster"}
    ),
    # The widest load of a thread, and the registers of a multiprocessor (CUDA programming guide,
    # technical specifications per compute capability, as the limits below).
    vector_bytes=16,
    vector_registers=65536,
    # RTX Blackwell whitepaper, RTX 5090: 170 multiprocessors at 2.41 GHz, half precision with
    # float32 accumulation.
    peak_flops={"float32": 1.048e14, "float64": 1.64e12, "bfloat16": 2.095e14, "float16": 2.095e14},
    # RTX 5090: GDDR7.
    bandwidth=1.792e12,
    l1_bytes=128 << 10,
    l2_bytes=96 << 20,
    shared_bytes=99 << 10,
    shared_core_bytes=100 << 10,
    threads_per_core=1536,
    cores=170,
    target={
        "kind": "cuda",
        "arch": "sm_120a",
        "max_shared_memory_per_block": 99 << 10,
        "max_threads_per_block": 1024,
        "thread_warp_size": 32,
        "host": {"kind": "cuda_host"},
    },
)
