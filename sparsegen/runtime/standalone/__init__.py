"""Run compiled plans with torch and tvm-ffi alone.

This package imports nothing else of sparsegen: every bundle holds a copy of it, word for word, so
a bundle checks, refuses and runs exactly as the kernel it was exported from.
"""

from .bundle import Bundle, open_bundle
from .errors import Errors, own_errors
from .load import load
from .runner import Runner
from .spec import Spec

__all__ = ["Bundle", "Errors", "Runner", "Spec", "load", "open_bundle", "own_errors"]
