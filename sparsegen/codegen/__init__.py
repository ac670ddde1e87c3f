"""Provide what the kernels of one target share, and the one door to TVM."""
