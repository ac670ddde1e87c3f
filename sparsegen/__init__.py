"""Generate sparse attention kernels from a few lines that say what a variant is."""
