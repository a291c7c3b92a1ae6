"""Add features batch by batch, die by SIGKILL at chosen ones, and go on: a path, then the numbers of those batches."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np

from pyeff.scoring import FeatureStore, store

BATCHES, DIM = 9, 20


def batch(number: int) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(number)
    return [f"s{number}-{i}" for i in range(1 + number % 3)], rng.normal(size=(1 + number % 3, DIM))


def attempt(path: str, until: int | None) -> None:
    header = {"method": "noise", "samples": sum(len(batch(n)[0]) for n in range(BATCHES))}
    with FeatureStore(path, header, dim=DIM, dtype="int8") as features:
        for number in range(BATCHES):
            if number not in features.done:
                if number == until:
                    os.kill(os.getpid(), signal.SIGKILL)
                features.append(number, *batch(number))


def main() -> None:
    store.PART_SECONDS = 0.0
    path, *kills = sys.argv[1:]
    for until in [*map(int, kills), None]:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                attempt(path, until)
                status = 0
            finally:
                os._exit(status)
        status = os.waitpid(child, 0)[1]
        if (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL) != (until is not None):
            sys.exit(f"until {until}: got status {status}")


if __name__ == "__main__":
    main()
