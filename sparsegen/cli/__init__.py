"""Run sparsegen from the command line, one verb per file.

A verb is a file of this folder with `HELP` (one line), `add_arguments(parser)` and
`run(args) -> int`. Only the verb at hand is imported.
"""

from sparsegen.cli._main import VERBS, main

__all__ = ["VERBS", "main"]
