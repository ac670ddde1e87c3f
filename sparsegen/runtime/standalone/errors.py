"""Name the errors of running a kernel; sparsegen passes its own, a bundle has these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Errors:
    """The exceptions to raise, each called with a message and `hint=`.

    input        a tensor at call time does not fit
    unsupported  a well-formed request that this kernel cannot serve
    bundle       a bundle that is damaged, foreign or of another version
    """

    input: Callable[..., Exception]
    unsupported: Callable[..., Exception]
    bundle: Callable[..., Exception]


class KernelError(Exception):
    """Say what is wrong and how to fix it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n  fix: {hint}")
        self.message = message
        self.hint = hint


class InputError(KernelError):
    """Refuse a tensor at call time: shape, dtype, stride, alignment or device."""


class UnsupportedError(KernelError):
    """Refuse a well-formed request that this kernel cannot serve."""


class BundleError(KernelError):
    """Refuse a bundle that is truncated, altered, foreign or of another version."""


def own_errors() -> Errors:
    """Return the exceptions of this package."""
    return Errors(input=InputError, unsupported=UnsupportedError, bundle=BundleError)
