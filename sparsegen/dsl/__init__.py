"""Trace a pattern function over lazy values and index expressions into a program."""
