"""Hold the program: frozen nodes, their invariants, printing and canonical JSON."""
