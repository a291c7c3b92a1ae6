"""The `pyeff` command: train under a budget, score samples, report, compare, and say what is installed."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process and exit with its code.

    0: done. 1: a defect of pyeff, with its traceback. 2: something the user gave cannot be used, said in one sentence.
    130: interrupted.
    """
    try:
        from pyeff.cli.app import run_app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "pyeff":
            raise
        sys.exit(_needs(error.name))
    sys.exit(run_app(sys.argv[1:]))


def _needs(package: str | None) -> int:
    print(f"pyeff: the command line needs {package}: pip install 'pyeff[run]'", file=sys.stderr)
    return 2
