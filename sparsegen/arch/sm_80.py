"""NVIDIA Ampere data centre: A100, A30."""

from sparsegen.arch import Arch

ARCH = Arch(
    name="sm_80",
    kind="cuda",
    features=frozenset({"cuda", "mma", "cp_async", "ldmatrix"}),
    # The widest load of a thread, and the registers of a multiprocessor (CUDA programming guide,
    # technical specifications per compute capability, as the limits below).
    vector_bytes=16,
    vector_registers=65536,
    # A100 SXM datasheet: 108 multiprocessors at 1.41 GHz, 312 TFLOP/s dense in half precision.
    peak_flops={"float32": 1.95e13, "float64": 9.7e12, "bfloat16": 3.12e14, "float16": 3.12e14},
    # A100 80 GB SXM: HBM2e.
    bandwidth=2.039e12,
    l1_bytes=192 << 10,
    l2_bytes=40 << 20,
    shared_bytes=163 << 10,
    shared_core_bytes=164 << 10,
    threads_per_core=2048,
    cores=108,
    target={
        "kind": "cuda",
        "arch": "sm_80",
        "max_shared_memory_per_block": 163 << 10,
        "max_threads_per_block": 1024,
        "thread_warp_size": 32,
        "host": {"kind": "cuda_host"},
    },
)
