"""Is choosing worth its cost? SmolLM2-135M trained on a tenth of a pool, chosen at random and by four methods.

    OMP_NUM_THREADS=1 python examples/influence_worth.py            # runs what is missing; two at a time share the work
    OMP_NUM_THREADS=1 python examples/influence_worth.py --arms bm25 random --seeds 0 1
    python examples/influence_worth.py --report                     # table and figure of what there is

The pool are reasoning-gym questions, a fifth of them of the three families that the target is made of. A seed draws the
pool, the target samples that methods compare with, the validation samples that stop a training, the adapters' first
values and the order of the samples; the holdout is one for all. A *cell* is a choice or a training; finished, it is a
small JSON file in examples/results/influence_worth, and a scoring that is killed goes on where it stopped. Losses are
recorded along each training with the FLOPs spent, so that arms can be read at equal total FLOPs.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from influence_worth_training import Data, Settings, Training, fresh_model, trained
from torch import nn

import pyeff
from pyeff._files import OnlyProcess, write_text_atomic
from pyeff.data import DataOrder
from pyeff.errors import UserError
from pyeff.scoring import BM25, EL2N, LESS, RDSPlus, Scores, TargetSimilarities, TrainingState, read_features
from pyeff.selection import round_robin, top_k, uniform
from pyeff.train.build import own_memory

RESULTS = Path(__file__).parent / "results" / "influence_worth"
SCRATCH = Path(tempfile.gettempdir()) / "pyeff-influence-worth"
SEEDS = (0, 1, 2, 3, 4)

SELECTORS = {"bm25": "BM25", "rds_plus": "RDS+", "el2n": "EL2N", "less": "LESS"}
ARMS = {
    "random": "random tenth",
    **SELECTORS,
    "fresh": "whole pool, random order",
    "target": "the target samples themselves",
}
"""Those that choose stand against the random tenth and the whole pool; the last is for orientation."""


# ------------------------------------------------------------------------------------------------------------ choosing


def less_states(settings: Settings, data: Data, *, seed: int) -> tuple[list[TrainingState], int]:
    """Warm adapters up on a random part of the pool; its states after each epoch, and the FLOPs of the warm-up."""
    some = uniform(settings.pool, round(settings.less_share * settings.pool), seed=seed)
    an_epoch = len(some) // settings.batch
    training = Training(settings, fresh_model(), seed=seed + 1000, warmup=an_epoch)
    order = DataOrder(some.tolist(), seed)
    states = []
    for epoch in range(1, settings.less_epochs + 1):
        rates = [training.step(data.pool, order) for _ in range(an_epoch)]
        if epoch not in settings.less_states:
            continue
        weights = {name: p.detach().clone() for name, p in training.trained.items()}
        moments = copy.deepcopy(training.adamw.state_dict())

        def load(weights: dict[str, torch.Tensor] = weights, moments: Any = moments) -> Any:
            with torch.no_grad():
                for name, value in weights.items():
                    training.trained[name].copy_(value)
            training.adamw.load_state_dict(moments)
            return training.model, training.adamw

        states.append(TrainingState(f"epoch-{epoch}", float(np.mean(rates)), load))
    return states, training.flops


def selected(settings: Settings, arm: str, data: Data, scratch: Path, *, seed: int) -> dict[str, Any]:
    """The rows that a method chooses, and what that cost; each by the rule of its paper."""
    started, warmup, k = time.process_time(), 0, settings.kept
    options: dict[str, Any] = {"path": scratch, "batch_tokens": settings.batch_tokens, "progress": False}
    scores: Scores
    if arm == "bm25":
        scores = BM25(data.target).score(None, data.pool, progress=False)
        rows = top_k(scores.values, k)
    elif arm == "el2n":
        scores = EL2N().score(own_model(), data.pool, **options)
        rows = top_k(scores.values, k)
    elif arm == "rds_plus":
        scores = RDSPlus(data.target).score(own_model(), data.pool, **options)
        pool, targets = read_features(scratch / "pool"), read_features(scratch / "targets")
        rows = pool.index[round_robin(TargetSimilarities(pool, targets), k)]
    else:
        states, warmup = less_states(settings, data, seed=seed)
        less = LESS(data.target, sketch=pyeff.Sketch(settings.sketch_dim, seed=seed))
        scores = less.score(states, data.pool, **options)
        rows = top_k(scores.values, k)
    return {
        "rows": [int(row) for row in rows],
        "method": scores.method,
        "flops_warmup": warmup,
        "flops_scoring": scores.flops,
        "cpu_seconds": time.process_time() - started,
    }


def own_model() -> nn.Module:
    """The base model, as methods that need no training score it."""
    return own_memory(fresh_model().model)


# ----------------------------------------------------------------------------------------------------------- the cells


@dataclass(frozen=True)
class Cell:
    """A choice, or a training."""

    kind: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.kind}-{self.arm}-{self.seed}"


def cells(arms: Sequence[str], seeds: Sequence[int]) -> Iterator[Cell]:
    """A seed after the other, and of each the cheap ones first."""
    for seed in seeds:
        for arm in sorted(arms, key=["random", "bm25", "target", "rds_plus", "el2n", "fresh", "less"].index):
            if arm in SELECTORS:
                yield Cell("choice", arm, seed)
            yield Cell("training", arm, seed)


class Experiment:
    """What is there, and how to make what is not."""

    def __init__(self, settings: Settings, results: Path, scratch: Path) -> None:
        self.settings, self.results, self.scratch = settings, results, scratch
        for folder in (results, scratch):
            folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = fresh_model().tokenizer

    def path(self, cell: Cell) -> Path:
        """Where a finished cell lies."""
        return self.results / f"{cell.name}.json"

    def read(self, cell: Cell) -> dict[str, Any]:
        """A finished cell, of these settings."""
        found: dict[str, Any] = json.loads(self.path(cell).read_text(encoding="utf-8"))
        if found["settings"] != json.loads(json.dumps(asdict(self.settings))):
            raise SystemExit(f"{self.path(cell)} is of other settings: choose another directory with --results")
        return found

    def make(self, cell: Cell) -> dict[str, Any]:
        """The content of a cell; a training of a method's rows needs its choice."""
        data, settings = Data.draw(self.settings, cell.seed, self.tokenizer), self.settings
        if cell.kind == "choice":
            result = selected(settings, cell.arm, data, self.scratch / cell.name, seed=cell.seed)
            rows, source = result["rows"], data.pool
        else:
            source = data.target if cell.arm == "target" else data.pool
            rows = list(range(len(source)))
            if cell.arm == "random":
                rows = uniform(settings.pool, settings.kept, seed=cell.seed).tolist()
            elif cell.arm in SELECTORS:
                rows = self.read(Cell("choice", cell.arm, cell.seed))["rows"]
            result = trained(settings, data, source, rows, seed=cell.seed)
        families = [source.samples[row].source for row in rows]
        about = {
            "families": {name: families.count(name) for name in sorted(set(families))},
            "tokens": int(source.lengths[rows].sum()),
            "pool_tokens": data.pool.tokens,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        return {"settings": asdict(settings), **asdict(cell)} | result | about

    def run(self, arms: Sequence[str], seeds: Sequence[int]) -> None:
        """Make what is missing; what another process is at is left to it."""
        made = True
        while made:
            made = False
            for cell in cells(arms, seeds):
                choice = Cell("choice", cell.arm, cell.seed)
                waits = cell.kind == "training" and cell.arm in SELECTORS and not self.path(choice).exists()
                if self.path(cell).exists() or waits:
                    continue
                with ExitStack() as held:
                    try:
                        held.enter_context(OnlyProcess(self.scratch, f"{cell.name}.lock"))
                    except UserError:
                        continue
                    if self.path(cell).exists():
                        continue
                    started = time.monotonic()
                    result = self.make(cell)
                    write_text_atomic(self.path(cell), json.dumps(result) + "\n")
                    shutil.rmtree(self.scratch / cell.name, ignore_errors=True)
                    made = True
                    spent = f"{result['cpu_seconds']:.0f} s of CPU, {time.monotonic() - started:.0f} s"
                    print(f"{time.strftime('%H:%M:%S')} {cell.name}: {spent}; {shown(result)}", flush=True)


def shown(result: dict[str, Any]) -> str:
    """A line on a finished cell."""
    if result["kind"] == "choice":
        flops = result["flops_warmup"] + result["flops_scoring"]
        return f"{flops / 1e12:.2f} TFLOP; {result['families']}"
    read = {
        p["step"]: [round(p[name]["all"], 3) for name in ("validation", "holdout") if p[name]] for p in result["curve"]
    }
    return f"{result['curve'][-1]['flops'] / 1e12:.2f} TFLOP; {read}"


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--lr", type=float, default=Settings.lr, help="another one needs another --results")
    parser.add_argument("--report", action="store_true", help="write the table and figure of docs/influence_worth.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--scratch", type=Path, default=SCRATCH)
    options = parser.parse_args()
    if options.report:
        from influence_worth_report import report

        report(options.results)
        return
    torch.set_num_threads(1)
    Experiment(Settings(lr=options.lr), options.results, options.scratch).run(options.arms, options.seeds)


if __name__ == "__main__":
    main()
