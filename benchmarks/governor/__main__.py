"""python -m benchmarks.governor --tier sim | actions | t1 | replay"""

from __future__ import annotations

import importlib
import sys

TIERS = {"sim": "sim", "actions": "actions", "t1": "t1", "replay": "replay"}


def main(arguments: list[str]) -> int:
    """Hand the arguments after ``--tier NAME`` to that tier's module."""
    if len(arguments) < 2 or arguments[0] != "--tier" or arguments[1] not in TIERS:
        print(f"usage: python -m benchmarks.governor --tier {{{','.join(TIERS)}}} [options]", file=sys.stderr)
        return 2
    module = importlib.import_module(f".{TIERS[arguments[1]]}", __package__)
    return int(module.main(arguments[2:]) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
