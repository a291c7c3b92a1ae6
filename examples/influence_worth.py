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
import math
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
from torch import nn

import pyeff
from pyeff._files import OnlyProcess, write_text_atomic
from pyeff.data import DataOrder, EncodedSamples, ReasoningGymSource, Sample, encode, load_samples, pack, pack_one
from pyeff.data import label_positions as answers_of
from pyeff.errors import UserError
from pyeff.governor import Cost
from pyeff.scoring import BM25, EL2N, LESS, RDSPlus, Scores, TargetSimilarities, TrainingState, read_features
from pyeff.selection import round_robin, top_k, uniform
from pyeff.train.build import lora_linears, own_memory, with_lora
from pyeff.train.config import LoRAConfig
from pyeff.train.evaluate import sample_losses, summed_loss
from pyeff.train.model import LoadedModel, load_model

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


@dataclass(frozen=True)
class Settings:
    """Everything that all cells share."""

    target_families: tuple[str, ...] = ("chain_sum", "count_bits", "lcm")
    other_families: tuple[str, ...] = (
        "basic_arithmetic",
        "count_primes",
        "letter_counting",
        "simple_equations",
        "spell_backward",
    )
    pool_of_target: int = 40  # of each family
    pool_of_other: int = 104
    target: int = 36
    validation: int = 30
    holdout: int = 90
    holdout_seed: int = 9000
    max_tokens: int = 48
    keep: float = 0.1
    rank: int = 16
    adapted: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    lr: float = 1e-3
    warmup: int = 8  # steps; constant afterwards, so that a training may be read anywhere
    batch: int = 8  # samples of a step
    points: tuple[int, ...] = (8, 16, 24, 32, 48, 64, 96, 128, 176, 224)  # steps after which losses are read
    equal_steps: int = 32  # four epochs of a tenth: where arms are compared after equal epochs
    patience: int = 2  # points without a lower validation loss that end a training ...
    least_steps: int = 48  # ... but not before
    less_share: float = 0.05  # of the pool, which LESS warms up on
    less_epochs: int = 4
    less_states: tuple[int, ...] = (2, 4)  # epochs whose states LESS scores by; the paper takes all four, at twice this
    sketch_dim: int = 8192
    batch_tokens: int = 256  # of scoring and evaluation

    @property
    def kept(self) -> int:
        """Samples of a tenth."""
        return round(self.keep * self.pool)

    @property
    def pool(self) -> int:
        """Samples of the pool."""
        return self.pool_of_target * len(self.target_families) + self.pool_of_other * len(self.other_families)

    def rate(self, step: int, warmup: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.lr * min(1.0, (step + 1) / warmup)


# ------------------------------------------------------------------------------------------------------------ the data

OPTIONS = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "count_bits": {"min_n": 1, "max_n": 4096},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 3},
    "simple_equations": {"max_terms": 2, "max_value": 50},
}


def questions(families: Sequence[str], each: int, *, seed: int, without: set[str]) -> list[Sample]:
    """So many questions of each family whose prompt is not among ``without``."""
    tasks = [{"name": name, "count": 2 * each + 16, "config": OPTIONS.get(name, {})} for name in families]
    source = ReasoningGymSource(seed=seed, size=len(tasks) * (2 * each + 16), max_characters=90, tasks=tasks)
    found: list[Sample] = []
    for family in families:
        own = [s for s in load_samples([source]) if s.source == family and s.prompt not in without]
        found += own[:each]
    return found


@dataclass(frozen=True)
class Data:
    """The samples of a seed; no prompt stands in two of these."""

    pool: EncodedSamples
    target: EncodedSamples
    validation: EncodedSamples
    holdout: EncodedSamples

    @classmethod
    def draw(cls, settings: Settings, seed: int, tokenizer: Any) -> Data:
        """The samples of a seed, deterministic; the holdout is that of every seed."""
        used: set[str] = set()

        def drawn(families: Sequence[str], each: int, own: int) -> list[Sample]:
            found = questions(families, each, seed=own, without=used)
            used.update(sample.prompt for sample in found)
            return found

        def encoded(samples: list[Sample]) -> EncodedSamples:
            return encode(samples, tokenizer, max_tokens=settings.max_tokens, chat_template=False)

        wanted, others = settings.target_families, settings.other_families
        each = [n // len(wanted) for n in (settings.holdout, settings.target, settings.validation)]
        holdout = drawn(wanted, each[0], settings.holdout_seed)
        target = drawn(wanted, each[1], 10 * seed + 1)
        validation = drawn(wanted, each[2], 10 * seed + 2)
        pool = drawn(wanted, settings.pool_of_target, 10 * seed + 3) + drawn(
            others, settings.pool_of_other, 10 * seed + 4
        )
        return cls(encoded(pool), encoded(target), encoded(validation), encoded(holdout))


# ------------------------------------------------------------------------------------------------------------ training


class Training:
    """Adapters on a model, their optimizer, and the FLOPs of its steps."""

    def __init__(self, settings: Settings, loaded: LoadedModel, *, seed: int, warmup: int) -> None:
        lora = LoRAConfig(rank=settings.rank, alpha=2.0 * settings.rank, target_modules=list(settings.adapted))
        self.settings, self.warmup = settings, warmup
        self.model = with_lora(own_memory(loaded.model), lora, seed=seed)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.adamw = torch.optim.AdamW(self.trained.values(), lr=settings.lr, weight_decay=0.0)
        self.cost: Cost = loaded.shape.train_cost(
            trainable="lora", lora_rank=settings.rank, lora_targets=lora_linears(self.model, loaded.shape)
        )
        self.steps = self.flops = 0

    def step(self, data: EncodedSamples, order: DataOrder) -> float:
        """One step on the mean loss of the answer tokens of the next samples; the rate it took."""
        batch = pack_one([data[order.next_index()] for _ in range(self.settings.batch)])
        where = answers_of(batch)
        rate = self.settings.rate(self.steps, self.warmup)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.zero_grad()
        (summed_loss(self.model, batch, where) / where.targets.numel()).backward()
        self.adamw.step()
        self.steps += 1
        self.flops += self.cost(batch.tokens, batch.tokens**2, where.targets.numel())
        return rate

    def loss(self, data: EncodedSamples) -> dict[str, float]:
        """Mean over samples of the loss of their answer tokens, nats a token: of all, and of each family."""
        batches = pack(data, range(len(data)), max_tokens=self.settings.batch_tokens, window=16)
        losses = np.array(sample_losses(self.model, batches, len(data)))
        families = np.array([sample.source for sample in data.samples])
        parts = {name: float(losses[families == name].mean()) for name in sorted(set(families.tolist()))}
        return {"all": float(losses.mean())} | parts


def trained(
    settings: Settings, data: Data, rows: EncodedSamples, chosen: Sequence[int], *, seed: int
) -> dict[str, Any]:
    """Train on the chosen rows; points of the curve hold steps, FLOPs and the losses of validation and holdout.

    The holdout is read where the validation's loss is the lowest so far, which is where one would stop, and at
    ``equal_steps``.
    """
    training = Training(settings, fresh_model(), seed=seed, warmup=settings.warmup)
    order = DataOrder(chosen, seed)
    curve: list[dict[str, Any]] = []
    best, since = math.inf, 0
    started = time.process_time()
    for point in (0, *settings.points):
        while training.steps < point:
            training.step(rows, order)
        validation = training.loss(data.validation)
        since = 0 if validation["all"] < best else since + 1
        best = min(best, validation["all"])
        wanted = since == 0 or point == settings.equal_steps
        holdout = training.loss(data.holdout) if wanted else None
        curve.append({"step": point, "flops": training.flops, "validation": validation, "holdout": holdout})
        if since >= settings.patience and point >= settings.least_steps:
            break
    return {"curve": curve, "cpu_seconds": time.process_time() - started}


def fresh_model() -> LoadedModel:
    """SmolLM2-135M in bfloat16."""
    # bf16 halves the bytes, and where the processor multiplies it, a step takes a quarter of the time; the adapters and
    # what AdamW keeps of them are float32.
    return load_model("smollm2", dtype="bfloat16")


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
