"""NVIDIA Ampere workstation: RTX 3090, A40, A10."""

from sparsegen.arch import Arch

ARCH = Arch(
    name="sm_86",
    kind="cuda",
    features=frozenset({"cuda", "mma", "cp_async", "ldmatrix"}),
    # The widest load of a thread, and the registers of a multiprocessor (CUDA programming guide,
    # technical specifications per compute capability, as the limits below).
    vector_bytes=16,
    vector_registers=65536,
    # GA102 whitepaper, RTX 3090: 82 multiprocessors at 1.695 GHz; half precision halves with
    # float32 accumulation.
    peak_flops={"float32": 3.56e13, "float64": 5.56e11, "bfloat16": 7.1e13, "float16": 7.1e13},
    # RTX 3090: GDDR6X.
    bandwidth=936e9,
    l1_bytes=128 << 10,
    l2_bytes=6 << 20,
    shared_bytes=99 << 10,
    shared_core_bytes=100 << 10,
    threads_per_core=1536,
    cores=82,
    target={
        "kind": "cuda",
        "arch": "sm_86",
        "max_shared_memory_per_block": 99 << 10,
        "max_threads_per_block": 1024,
        "thread_warp_size": 32,
        "host": {"kind": "cuda_host"},
    },
)
