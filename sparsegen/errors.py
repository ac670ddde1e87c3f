"""Every error sparsegen raises: what is wrong, where it was written, how to fix it.

SparsegenError
├── PatternError        the pattern is ill-formed: bool() of an index, mismatched axes, ...
├── BindingError        compile() was given a layout, dtype, name or value that does not fit
├── UnsupportedError    a well-formed request that no schedule takes; holds the reasons
├── InputError          a tensor at call time has the wrong shape, dtype, stride or device
├── CompileError        TVM, LLVM or nvcc failed on generated code
├── TuningError         no candidate could be measured, or a record does not fit
├── BundleError         an exported bundle is truncated, altered, foreign or of another version
└── CacheError          the kernel cache cannot be read, locked or written
"""

import difflib
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_PACKAGE = __name__.partition(".")[0]
_STDLIB = sysconfig.get_path("stdlib")
_SITE_PACKAGES = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))


def _is_user_code(frame: FrameType) -> bool:
    """Tell whether a frame is the user's: neither sparsegen's own nor the standard library's."""
    module = str(frame.f_globals.get("__name__", ""))
    if module.startswith(f"{_PACKAGE}.patterns."):
        return True
    if module == _PACKAGE or module.startswith(f"{_PACKAGE}."):
        return False
    # functools and contextlib put frames of their own between the user and us.
    file = frame.f_code.co_filename
    in_stdlib = file.startswith((_STDLIB, "<frozen ")) and not file.startswith(_SITE_PACKAGES)
    return not in_stdlib


@dataclass(frozen=True)
class Site:
    """Name a place in the user's source: `file`, 1-based `line`, enclosing `function`."""

    file: str
    line: int
    function: str

    @classmethod
    def caller(cls) -> "Site":
        """Return the innermost place on the stack outside sparsegen's own code.

        The shipped patterns, `sparsegen/patterns/*`, count as a user's code.
        """
        frame = sys._getframe(1)
        while not _is_user_code(frame) and frame.f_back is not None:
            frame = frame.f_back
        return cls(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)

    def __str__(self) -> str:
        """Return `file.py:LINE`, relative to the working directory for a file below it."""
        path = Path(self.file)
        cwd = Path.cwd()
        return f"{path.relative_to(cwd) if path.is_relative_to(cwd) else path}:{self.line}"


class SparsegenError(Exception):
    """Say what is wrong, where, and how to fix it.

    Args:
        message: what is wrong, in the user's terms, without a final full stop.
        at: the place in the user's source that caused it.
        hint: what to write or run instead.
    """

    def __init__(self, message: str, *, at: Site | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.at = at
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message if self.at is None else f"{self.at}: {self.message}"]
        lines += [f"  - {detail}" for detail in self.details]
        if self.hint is not None:
            lines.append(f"  fix: {self.hint}")
        return "\n".join(lines)

    @property
    def details(self) -> tuple[str, ...]:
        """Return the lines printed between the message and the fix."""
        return ()


class PatternError(SparsegenError):
    """Refuse an ill-formed pattern."""


class BindingError(SparsegenError):
    """Refuse a binding, target or name that does not fit the pattern."""


class UnsupportedError(SparsegenError):
    """Refuse a well-formed request that no schedule takes.

    The message names the limit; `reasons` says of each schedule why it declined, one line each.
    """

    def __init__(
        self,
        message: str,
        *,
        at: Site | None = None,
        hint: str | None = None,
        reasons: Sequence[str] = (),
    ) -> None:
        super().__init__(message, at=at, hint=hint)
        self.reasons = tuple(reasons)

    @property
    def details(self) -> tuple[str, ...]:
        """Return the reasons."""
        return self.reasons


class InputError(SparsegenError):
    """Refuse a tensor at call time: shape, dtype, stride, alignment or device."""


class CompileError(SparsegenError):
    """Report that TVM, LLVM or nvcc failed on generated code."""


class TuningError(SparsegenError):
    """Report a search without a result, or a record that does not fit."""


class BundleError(SparsegenError):
    """Refuse a bundle that is truncated, altered, foreign or of another version."""


class CacheError(SparsegenError):
    """Report a kernel cache that cannot be read, locked or written."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a hint: the choice closest to `name`, or all of them when none is close."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose one of: {', '.join(known)}" if known else "there is nothing to choose from"
