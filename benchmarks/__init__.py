"""Measure sparsegen beside its peers."""
