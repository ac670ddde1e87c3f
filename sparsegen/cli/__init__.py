"""Run sparsegen from the command line, one verb per file."""
