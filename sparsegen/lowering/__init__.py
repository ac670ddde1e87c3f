"""Partition a bound program into tasks and print expressions as TIR."""
