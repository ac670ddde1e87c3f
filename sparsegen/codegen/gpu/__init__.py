"""What GPU kernels share: the build, launches, fragments, copies, reductions."""
