"""Build, cache, load and call kernels."""
