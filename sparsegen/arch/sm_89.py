"""NVIDIA Ada: RTX 4090, L40, L4."""

from sparsegen.arch import Arch

ARCH = Arch(
    name="sm_89",
    kind="cuda",
    features=frozenset({"cuda", "mma", "cp_async", "ldmatrix", "fp8_mma"}),
    # The widest load of a thread, and the registers of a multiprocessor (CUDA programming guide,
    # technical specifications per compute capability, as the limits below).
    vector_bytes=16,
    vector_registers=65536,
    # Ada whitepaper, RTX 4090: 128 multiprocessors at 2.52 GHz, half precision with float32
    # accumulation.
    peak_flops={"float32": 8.26e13, "float64": 1.29e12, "bfloat16": 1.652e14, "float16": 1.652e14},
    # RTX 4090: GDDR6X.
    bandwidth=1.008e12,
    l1_bytes=128 << 10,
    l2_bytes=72 << 20,
    shared_bytes=99 << 10,
    shared_core_bytes=100 << 10,
    threads_per_core=1536,
    cores=128,
    target={
        "kind": "cuda",
        "arch": "sm_89",
        "max_shared_memory_per_block": 99 << 10,
        "max_threads_per_block": 1024,
        "thread_warp_size": 32,
        "host": {"kind": "cuda_host"},
    },
)
