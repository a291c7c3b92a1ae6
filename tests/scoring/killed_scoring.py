"""Score, die by SIGKILL at a chosen moment, score again; each attempt is a forked process.

Called as a script with one JSON argument, a list of {"path": ..., "kind": "classifier" or "language", "kills": ...}. A
kill is {"at": name, "n": k}: the k-th time ends the process, without a word. The last attempt is not killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401
import torch
import torch.utils.flop_counter
from torch import nn

from pyeff.data import EncodedSample, EncodedSamples, Sample
from pyeff.scoring import EL2N, GraNd, ScoreMethod, store


def work(kind: str) -> tuple[ScoreMethod, nn.Module, Any, dict[str, Any]]:
    """A method, a model, a data set and the options to score them with."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if kind == "classifier":
        x, y = torch.randn(40, 5, generator=generator), torch.randint(3, (40,), generator=generator)
        return EL2N(), nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), (x, y), {"batch_size": 8}
    from observed_models import MODELS, VOCABULARY

    encoded = []
    for i in range(24):
        ids = torch.randint(1, VOCABULARY, (3 + 5 * i % 9,), generator=generator).tolist()
        encoded.append(EncodedSample(ids, 1 + i % 3, i))
    names = [Sample(f"sample-{i}", "", "", "tokens") for i in range(24)]
    return GraNd(), MODELS["llama tied"](), EncodedSamples(names, encoded), {"batch_tokens": 20}


def arm(at: str, n: int) -> None:
    """Make the n-th of something end the process."""
    calls = 0

    def now() -> bool:
        nonlocal calls
        calls += 1
        return calls == n

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if at == "batch":  # a batch is scored and not yet taken in
        append = store.ScoreStore.append

        def killing(self: store.ScoreStore, *args: Any) -> None:
            if now():
                die()
            append(self, *args)

        store.ScoreStore.append = killing
    elif at == "rename":  # a part is complete under another name
        replace = Path.replace

        def not_renamed(self: Path, target: Any) -> Path:
            if Path(target).suffix == ".parquet" and now():
                die()
            return replace(self, target)

        Path.replace = not_renamed
    elif at == "half":  # a part is half-written
        write = store.write_atomic

        def half(path: Path, writing: Any, **options: Any) -> None:
            if now():
                path.with_name(f".partial-{path.name}").write_bytes(b"PAR1 half of it")
                die()
            write(path, writing, **options)

        store.write_atomic = half
    elif at == "header":
        original = store.write_text_atomic

        def no_header(path: Path, text: str) -> None:
            if now():
                die()
            original(path, text)

        store.write_text_atomic = no_header
    else:
        raise ValueError(at)


def main() -> None:
    # No thread may exist before a fork; what the children need is imported once for all.
    torch.set_num_threads(1)
    store.PART_SECONDS = 0.0
    for task in json.loads(sys.argv[1]):
        run(task["path"], task["kind"], task["kills"])


def run(path: str, kind: str, kills: list[dict[str, Any]]) -> None:
    """All attempts at one scoring."""
    method, model, data, options = work(kind)
    for kill in [*kills, None]:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if kill is not None:
                    arm(**kill)
                method.score(model, data, path=path, seed=7, progress=False, **options)
                status = 0
            finally:
                os._exit(status)
        status = os.waitpid(child, 0)[1]
        if (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL) != (kill is not None):
            sys.exit(f"{kill or 'no kill'}: got status {status}")


if __name__ == "__main__":
    main()
