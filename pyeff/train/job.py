"""Everything a run needs before it spends anything: model, samples, prices; and the passes that look at the model.

Losses, answers and scores are always those of the averaged weights, and each pass charges the meter as it
goes. Nothing here writes to the run's directory but the heartbeat.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyeff.data import EncodedSamples, PackedBatch, label_positions, pack
from pyeff.errors import UserError
from pyeff.governor import Cost, attention_pairs, format_amount
from pyeff.scoring import PoolScores, score_batches
from pyeff.scoring.language import PACKING_WINDOW
from pyeff.scoring.language_model import check_head, check_packing, head_weight, last_hidden_state
from pyeff.train import checkpoint as checkpoints
from pyeff.train.build import (
    keep_attention,
    lora_linears,
    make_optimizer,
    own_memory,
    recompute_activations,
    with_lora,
)
from pyeff.train.config import RunConfig
from pyeff.train.ema import EMA
from pyeff.train.evaluate import generation_work, greedy_answers, same_answer, sample_losses
from pyeff.train.memory import step_shape
from pyeff.train.meter import Meter
from pyeff.train.model import load_model
from pyeff.train.task import Task, encode_task, read_task


class Job:
    """A model made ready, the samples, and what everything costs.

    Raises `UserError` for whatever makes the run impossible; nothing has been spent by then.
    """

    def __init__(self, config: RunConfig, out: Path) -> None:
        self.config, self.out = config, out
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        raw = read_task(config.data, seed=config.seed)
        torch.manual_seed(config.seed)
        self.loaded = load_model(config.model, dtype=config.dtype)
        self.model: Any = own_memory(self.loaded.model)
        self.task: Task = encode_task(
            raw,
            config.data,
            self.loaded.tokenizer,
            max_tokens=min(config.data.max_tokens, self.loaded.max_positions),
        )
        self._refuse_long_answers()
        check_packing(self.model)
        if config.policy == "governor" and not check_head(self.model):
            raise UserError(
                f"{config.model} changes its logits after the output head in a way that scoring does not know: "
                "use policy: uniform"
            )
        shape = self.loaded.shape
        self.step_shape = step_shape(config, self.model, self.task.pool)
        checkpointing = self.step_shape.checkpointing
        recomputation: dict[str, Any] = {
            "checkpointing": checkpointing != "none",
            "keep_attention": checkpointing == "attention",
        }
        options: dict[str, Any] = recomputation
        adapters = 0
        last_observed = True
        if config.lora is not None:
            self.model = with_lora(self.model, config.lora, seed=config.seed)
            targets = lora_linears(self.model, shape)
            options = {
                "trainable": "lora",
                "lora_rank": config.lora.rank,
                "lora_targets": targets,
                **recomputation,
                # transformers lets the embedding's output require a gradient when it recomputes layers with adapters.
                "input_requires_grad": checkpointing == "layer",
            }
            last_observed = "down" in targets
            adapters = shape.layers * sum(2 * config.lora.rank * sum(shape.linears[t]) for t in targets)
        if checkpointing == "layer":
            recompute_activations(self.model)
        elif checkpointing == "attention":
            keep_attention(self.model)
        forward = shape.forward_cost()
        forward = replace(forward, per_token=forward.per_token + adapters)
        train_cost = shape.train_cost(**options)
        # `pyeff.observe` keeps what a layer's last matrix is given once that has been multiplied: no early end.
        self.observed_cost = shape.train_cost(**options, early_stop=not last_observed)
        # Of a training step, the part that forms gradients of parameters.
        self.weight_grads = (
            Cost(forward.per_token, 0, forward.per_head_token) if config.lora is None else Cost(adapters, 0, 0)
        )
        self.meter = Meter(config.parsed_budget, forward=forward, train=train_cost, heartbeat=out / "heartbeat.json")
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }
        self.optimizer = make_optimizer(config.optimizer, list(self.parameters.values()))
        self.ema = EMA(self.parameters, decay=config.ema_decay)
        self.batches = {
            name: pack(part, range(len(part)), max_tokens=self.step_shape.micro_tokens, window=PACKING_WINDOW)
            for name, part in self.parts().items()
        }
        self.flops = {
            name: sum(self._batch_flops(batch, forward) for batch in part) for name, part in self.batches.items()
        }
        self.generation_flops = self._generation_flops()

    def parts(self) -> dict[str, EncodedSamples]:
        """The four sets of samples by name."""
        task = self.task
        return {"pool": task.pool, "anchors": task.anchors, "holdout": task.holdout, "target": task.target}

    def _refuse_long_answers(self) -> None:
        """Raise where answering in words would go beyond the positions that the model was made for."""
        data, holdout = self.config.data, self.task.holdout
        answered = [holdout[i].prompt_length for i in range(min(data.exact_match, len(holdout)))]
        longest = max(answered, default=0) + data.max_new_tokens - 1  # the last token is never fed back
        if answered and longest > self.loaded.max_positions:
            raise UserError(
                f"data.max_new_tokens ({data.max_new_tokens}) after the longest prompt needs {longest} positions, and "
                f"{self.config.model} has {self.loaded.max_positions}: lower it"
            )

    @staticmethod
    def _batch_flops(batch: PackedBatch, cost: Cost) -> int:
        answers = int(label_positions(batch).targets.numel())
        return cost(batch.tokens, batch.tokens**2, answers)

    def train_flops(self, batch: PackedBatch, *, observed: bool = False) -> int:
        """Of training on one micro-batch: all pairs of its tokens, or each sample's own where attention is kept.

        ``observed``: by `pyeff.observe`, which leaves recomputation a product more.
        """
        pairs = batch.tokens**2
        if self.step_shape.checkpointing == "attention":
            pairs = attention_pairs(batch.cu_seqlens.diff().tolist(), causal=True)
        cost = self.observed_cost if observed else self.meter.train
        return cost(batch.tokens, pairs, int(label_positions(batch).targets.numel()))

    def evaluation_flops(self) -> int:
        """Of judging the model once, before or after training."""
        return self.flops["anchors"] + self.flops["holdout"] + self.generation_flops

    def refresh_flops(self) -> int:
        """Of scoring the pool and the samples of the target it is compared with."""
        return self.flops["pool"] + self.flops["target"]

    def _generation_flops(self) -> int:
        total = 0
        for group in self._generation_groups():
            prompts = [self.task.holdout[i].prompt_length for i in group]
            total += self.meter.forward(*generation_work(prompts, self.config.data.max_new_tokens))
        return total

    def _generation_groups(self) -> list[list[int]]:
        """Samples answered together: similar prompt lengths, so that little padding is computed."""
        count = min(self.config.data.exact_match, len(self.task.holdout))
        by_length = sorted(range(count), key=lambda i: (self.task.holdout[i].prompt_length, i))
        groups: list[list[int]] = []
        for index in by_length:
            width = self.task.holdout[index].prompt_length + self.config.data.max_new_tokens
            if groups and (len(groups[-1]) + 1) * width <= self.step_shape.micro_tokens:
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups

    def refuse_small_budget(self, *, flops: int, tokens: int) -> None:
        """Raise unless a first step of this price fits beside the evaluations; one in seconds is checked later."""
        budget = self.meter.budget
        least = self.meter.price("eval", flops=2 * self.evaluation_flops())
        least += self.meter.price("train", flops=flops, tokens=tokens)
        if least > budget.amount:
            amount = format_amount(least, budget.unit)
            raise UserError(
                f"the budget {budget} is too small for one step: a step of batch_tokens = "
                f"{self.config.batch_tokens} and evaluating before and after it cost {amount}"
            )

    def _checkpoint_bytes(self) -> int:
        size = checkpoints.tensor_bytes({"weights": self.parameters, "ema": self.ema.averages})
        # Moments: two numbers a parameter, of one byte or of the parameter's own size.
        small = self.config.optimizer.states == "8bit"
        return size + sum(2 * p.numel() * (1 if small else p.element_size()) for p in self.parameters.values())

    def refuse_full_disk(self) -> None:
        """Raise unless a checkpoint fits beside what is on the disk already."""
        needed, free = self._checkpoint_bytes(), checkpoints.free_bytes(self.out)
        if free < needed:
            raise UserError(
                f"{self.out} has {free / 1e9:.2f} GB free, and a checkpoint of this run needs "
                f"{needed / 1e9:.2f} GB: free some space or choose another out"
            )

    def estimates(self, per_token: float) -> dict[str, Any]:
        """What things will cost, in FLOPs, and about how many steps that leaves (None for a time budget).

        ``per_token`` are the FLOPs of a token that is trained on.
        """
        budget = self.meter.budget
        checks = math.floor((1 - self.config.cooldown) / self.config.governor_config.check_every)
        steps = {
            "flops": (budget.amount - 2 * self.evaluation_flops() - checks * self.flops["anchors"])
            / (per_token * self.config.batch_tokens),
            "tokens": budget.amount / self.config.batch_tokens,
            "seconds": None,
        }[budget.unit]
        return {
            "train_flops_per_token": per_token,
            "score_pool_flops": self.refresh_flops(),
            "check_flops": self.flops["anchors"],
            "evaluation_flops": self.evaluation_flops(),
            "cooldown_reserve": self.config.cooldown * budget.amount,
            "steps": None if steps is None else max(1, math.floor(steps)),
            "checkpoint_bytes": self._checkpoint_bytes(),
        }

    def score(self, name: str) -> PoolScores:
        """Scores of one set of samples."""

        def charge(batch: PackedBatch, answers: int) -> None:
            self.meter.charge(
                "score",
                flops=self.meter.forward(batch.tokens, batch.tokens**2, answers),
                tokens=batch.tokens,
            )

        self.model.eval()
        with self.ema.applied():
            weight, bias, softcap = head_weight(self.model)
            return score_batches(
                self.batches[name],
                lambda batch: last_hidden_state(self.model, batch),
                weight,
                samples=len(self.parts()[name]),
                bias=bias,
                softcap=softcap,
                after_batch=charge,
            )

    def losses(self, name: str) -> list[float]:
        """Mean loss of each sample of one set."""
        self.model.eval()
        with self.ema.applied():
            return sample_losses(self.model, self.batches[name], len(self.parts()[name]), charge=self._charge_eval)

    def _charge_eval(self, tokens: int, pairs: int, answers: int) -> None:
        self.meter.charge("eval", flops=self.meter.forward(tokens, pairs, answers), tokens=tokens)

    def exact_match(self) -> dict[str, Any] | None:
        """Holdout samples answered word for word: correct, total, by_source; None when none is asked."""
        groups = self._generation_groups()
        if not groups:
            return None
        tokenizer, holdout = self.loaded.tokenizer, self.task.holdout
        configured: Any = self.loaded.model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        by_source: dict[str, list[int]] = {}
        self.model.eval()
        with self.ema.applied():
            for group in groups:
                answers = greedy_answers(
                    self.model,
                    [holdout[i].ids[: holdout[i].prompt_length] for i in group],
                    max_new_tokens=self.config.data.max_new_tokens,
                    end_tokens=frozenset(token for token in ends if token is not None),
                    pad_token=int(tokenizer.pad_token_id),
                    charge=self._charge_eval,
                )
                for i, answer in zip(group, answers, strict=True):
                    sample = holdout.samples[i]
                    given = str(tokenizer.decode(answer, skip_special_tokens=True))
                    row = by_source.setdefault(sample.source, [0, 0])
                    row[0] += same_answer(given, sample.answer)
                    row[1] += 1
        return {
            "correct": sum(row[0] for row in by_source.values()),
            "total": sum(row[1] for row in by_source.values()),
            "by_source": dict(sorted(by_source.items())),
        }
