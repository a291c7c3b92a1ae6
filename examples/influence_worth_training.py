"""The data, the model and the training of `influence_worth.py`: what all of its arms share."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pyeff.data import DataOrder, EncodedSamples, ReasoningGymSource, Sample, encode, load_samples, pack, pack_one
from pyeff.data import label_positions as answers_of
from pyeff.governor import Cost
from pyeff.train.build import lora_linears, own_memory, with_lora
from pyeff.train.config import LoRAConfig
from pyeff.train.evaluate import sample_losses, summed_loss
from pyeff.train.model import LoadedModel, load_model


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
