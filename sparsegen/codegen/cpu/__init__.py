"""Provide what kernels for CPUs share."""
