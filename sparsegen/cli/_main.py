"""Find the verb that the command line names, run it, and print errors for people."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from sparsegen.errors import SparsegenError
from sparsegen.plugins import discover

# A verb may have the name of a builtin, as `list` does, so nothing runs in its own package.
VERBS = discover("sparsegen.cli", "verb")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done; 1: a fault of sparsegen itself; 2: a fault of the request, printed as `error:` and
    `fix:`; 130: interrupted. SPARSEGEN_TRACEBACK=1 lets every exception through.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if os.environ.get("SPARSEGEN_TRACEBACK") == "1":
        return _run(arguments)
    try:
        return _run(arguments)
    except SparsegenError as error:
        if error.at is not None and Path(error.at.file).resolve() == Path(sys.argv[0]).resolve():
            error.at = None  # the place is the command itself, which is no place to look
        return _report(str(error), None if error.hint else "`sparsegen doctor` may say more")
    except BrokenPipeError:
        # The reader of a pipe went away; what Python still flushes at exit must go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _report(what, "check that the path exists and may be used")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except Exception as error:
        fix = "a fault of sparsegen: report what it prints under SPARSEGEN_TRACEBACK=1"
        _report(f"{type(error).__name__}: {error}", fix)
        return 1


def _run(arguments: list[str]) -> int:
    named = next((word for word in arguments if not word.startswith("-")), None)
    if named is not None:
        VERBS.require(named)
    args = _parser(VERBS if named is None else [named]).parse_args(arguments)
    code: int = VERBS.require(args.verb).run(args)
    sys.stdout.flush()
    return code


def _report(what: str, fix: str | None) -> int:
    sys.stderr.write(f"error: {what}\n" + (f"  fix: {fix}\n" if fix else ""))
    return 2


class Parser(argparse.ArgumentParser):
    """Parse arguments; report a wrong one like every other error."""

    def error(self, message: str) -> NoReturn:
        """Print the message and where to find the usage, and leave with code 2."""
        self.exit(_report(message, f"`{self.prog} --help` shows the usage"))


def _parser(verbs: Iterable[str]) -> Parser:
    parser = Parser(
        prog="sparsegen",
        description="Generate kernels for sparse attention.",
        epilog="`sparsegen VERB --help` says more of a verb.",
    )
    parser.add_argument("--version", action=_Version, help="print the version and leave")
    below = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in verbs:
        module = VERBS.require(name)
        about = module.HELP[:1].upper() + module.HELP[1:] + "."
        module.add_arguments(below.add_parser(name, help=module.HELP, description=about))
    return parser


class _Version(argparse.Action):
    """Print the installed version; looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print and leave."""
        from importlib.metadata import version

        print(f"sparsegen {version('sparsegen')}")
        parser.exit()
