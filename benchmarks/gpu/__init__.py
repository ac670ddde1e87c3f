"""Time attention kernels on a GPU beside other people's, and beside what the GPU does at most.

    python -m benchmarks.gpu build FOLDER      compile kernels; needs sparsegen and nvcc, no GPU
    python -m benchmarks.gpu time FOLDER OUT   check and time them; needs a GPU, torch and tvm-ffi
    python -m benchmarks.gpu run OUT           both

Several ways to compile a kernel are timed in turns, each under its own label; those of several
trees too, if each builds its label into one folder:

    build FOLDER --variant default --variant "decode-*=wide:attend_mma:warps=8,keys=32" --only W3

A kernel is the attend task of a pattern, alone: selections and compressed keys are given. It is
compared with float64 before it is timed, on small problems of odd shapes and on rows of the
workload itself, and its repeats with each other, bit by bit. What is wrong is reported and never
timed.

Times are medians over rounds in which kernels, peers and ceilings take turns, each for a stretch of
its own whose first third is left out, with the L2 cache overwritten before every call. The ceilings
are torch's product of two 8192 x 8192 bfloat16 matrices and a copy within the memory of the device.
FLOPs count the pairs that a query sees, bytes count every tensor once.
"""
