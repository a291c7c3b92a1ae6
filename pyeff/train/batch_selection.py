"""Steps on the samples of a larger batch that GREATS, OPUS or CoLM choose by sketches of their gradients.

    candidates   forward and backward without weight gradients; a sketch of each sample's gradient
    target       the same for some samples of the target: what greats and opus compare with
    choice       which of the candidates to keep
    gradient     of the kept alone: formed from the activations kept until now (``defer``), or by passing them again

What a step would have cost on the kept samples alone is charged to ``train`` (or ``cooldown``), all else to ``score``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyeff.data import (
    DataOrder,
    EncodedSample,
    EncodedSamples,
    PackedBatch,
    encode,
    label_positions,
    load_samples,
    pack,
)
from pyeff.errors import UserError
from pyeff.governor import attention_pairs
from pyeff.observation import GradientObservation, UnobservableError, observe
from pyeff.ops import FactoredSketch, Sketch
from pyeff.scoring.language import PACKING_WINDOW
from pyeff.scoring.language_model import answer_logits
from pyeff.selection import colm, greats, opus
from pyeff.selection.online import BatchChoice
from pyeff.train.batches import Batches, StepBatch, StepDone, choice_seed, kept_count
from pyeff.train.select import refuse_overlap
from pyeff.train.sketched import SketchedMatrices

if TYPE_CHECKING:
    from pyeff.train.job import Job

# Modules that hold the value projection, alone or with others.
_VALUES = ("v_proj", "qkv_proj", "c_attn", "query_key_value")


class SelectedBatches(Batches):
    """Batches of which each step trains on the samples that a method chooses.

    Raises `UserError` for a target that shares a prompt with anchors or holdout, or a layer that is not there.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        assert job.config.batch_selection is not None
        self.config = job.config.batch_selection
        seed = job.config.seed
        self._matrices = SketchedMatrices(job.model)
        self._sketch: Sketch | FactoredSketch = (
            Sketch(self.config.sketch_dim, seed=seed)
            if self.config.method == "opus"
            else FactoredSketch(self.config.sketch_size, self.config.sketch_size, seed=seed)
        )
        self._layer = self._value_layer() if self.config.method == "colm" else ""
        self._target: EncodedSamples | None = None
        if self.config.method in ("greats", "opus"):
            self._target = job.task.target if self.config.target is None else self._declared_target()
            # Apart from the orders of the run and of its control batches.
            self._target_order = DataOrder(len(self._target), seed + 2**33, lengths=self._target.lengths)

    @property
    def name(self) -> str | None:
        """The method."""
        return self.config.method

    def _declared_target(self) -> EncodedSamples:
        job, data = self.job, self.job.config.data
        samples = load_samples(self.config.target or [])
        refuse_overlap(samples, job.task.holdout.samples)
        refuse_overlap(samples, job.task.anchors.samples, kind="anchor")
        return encode(
            samples,
            job.loaded.tokenizer,
            max_tokens=min(data.max_tokens, job.loaded.max_positions),
            chat_template=data.chat_template,
            drop_long=data.drop_long,
        )

    def _value_layer(self) -> str:
        names = [name for name, parameter in self.job.parameters.items() if parameter.ndim == 2]
        wanted = self.config.layer
        if wanted is None:
            found = [name for name in names if any(part in _VALUES for part in name.split("."))]
            if not found:
                raise UserError(
                    "batch_selection.layer must name a matrix: none that is trained is called "
                    f"{', '.join(_VALUES)}; such as {names[-1]}"
                )
            return found[-1]
        if wanted not in names:
            raise UserError(f"batch_selection.layer: {wanted!r} is no matrix that is trained; such as {names[-1]}")
        return wanted

    def check(self) -> None:
        """Pass two samples of a few tokens, as a step does; raises `UserError` where that cannot be observed."""
        job = self.job
        tokens = pack([EncodedSample([1] * n, 1, i) for i, n in enumerate((2, 3))], [0, 1], max_tokens=5)
        job.model.train()
        try:
            with self._observed(optimizer=None, defer=self.config.defer) as seen:
                self._pass(seen, tokens)
            assert len(self._rows(seen)) == 2
        except UnobservableError as error:
            reasons = " ".join(str(error).split())
            raise UserError(f"batch_selection {self.config.method} cannot observe this model: {reasons}") from error

    # ---- drawing and pricing

    def draw(self, order: DataOrder, step: int) -> StepBatch:
        """The candidates of a step; the price is that of the dearest choice among them."""
        micro_batches = self.packed(order.next_batch(round(self.job.config.batch_tokens / self.config.keep)))
        drawn = [index for batch in micro_batches for index in batch.sample_indices]
        kept = kept_count(len(drawn), self.config.keep)
        target = self._next_target()
        tokens, flops = self._dearest(drawn, kept)
        flops += sum(self._pass_flops(batch) + self._sketch_flops(batch) for batch in [*micro_batches, *target])
        flops += 2 * self._numbers * len(drawn) * (len(drawn) + 1)  # of the choice
        return StepBatch(micro_batches, flops, tokens, drawn, kept, target)

    def _next_target(self) -> list[PackedBatch]:
        if self._target is None:
            return []
        count = min(self.config.target_batch, len(self._target))
        indices: list[int] = []
        while len(indices) < count:  # where an epoch ends a sample may come again
            indices += {self._target_order.next_index()} - set(indices)
        return pack(self._target, indices, max_tokens=self.job.step_shape.micro_tokens, window=PACKING_WINDOW)

    @property
    def _numbers(self) -> int:
        """What the choice reads of each sample."""
        if isinstance(self._sketch, Sketch):
            return self._sketch.dim
        size = self._sketch.k_in * self._sketch.k_out
        return size if self._layer else size * self._matrices.parameters

    def _dearest(self, drawn: Sequence[int], kept: int) -> tuple[int, int]:
        """The most tokens that are trained on, and the most FLOPs that this adds to the pass over the candidates."""
        job, pool = self.job, self.job.task.pool
        lengths = [len(pool[index].ids) for index in drawn]
        answers = [pool[index].answer_length for index in drawn]
        tokens = sum(sorted(lengths)[-kept:])
        if self.config.defer:
            extra = sorted(job.weight_grads(n, 0, a) for n, a in zip(lengths, answers, strict=True))
            return tokens, sum(extra[-kept:]) + self._matrices.vector_flops(kept)
        return tokens, job.meter.train(tokens, tokens * job.step_shape.micro_tokens, sum(sorted(answers)[-kept:]))

    def _pass_flops(self, batch: PackedBatch) -> int:
        """Of a forward and backward pass without weight gradients."""
        answers = int(label_positions(batch).targets.numel())
        return self.job.train_flops(batch, observed=True) - self.job.weight_grads(batch.tokens, 0, answers)

    def _sketch_flops(self, batch: PackedBatch) -> int:
        lengths = batch.cu_seqlens.diff().tolist()
        answers = label_positions(batch).cu_seqlens.diff().tolist()
        if isinstance(self._sketch, Sketch):  # a product of the size of each weight gradient
            return self.job.weight_grads(sum(lengths), 0, sum(answers))
        return self._matrices.flops(self._sketch, lengths, answers)

    def flops_per_token(self) -> float:
        """Of a token that is trained on, as a mean over the pool: its candidates, its target samples and itself."""
        job, pool, keep = self.job, self.job.task.pool, self.config.keep
        epoch = self.epoch()
        answers = int(pool.answer_lengths.sum())
        own = job.weight_grads(pool.tokens, 0, answers) + self._matrices.vector_flops(len(pool))
        if not self.config.defer:
            own = sum(job.train_flops(batch) for batch in epoch)
        looked_at = sum(self._pass_flops(batch) + self._sketch_flops(batch) for batch in epoch)
        state = self.state_dict()
        target = sum(self._pass_flops(batch) + self._sketch_flops(batch) for batch in self._next_target())
        self.load_state_dict(state)
        return (own + looked_at / keep) / pool.tokens + target / job.config.batch_tokens

    # ---- a step

    def backward(self, batch: StepBatch, *, step: int, phase: str, lr: float) -> StepDone:
        """Choose, and leave the gradient of the chosen samples' mean loss in the parameters."""
        job, meter = self.job, self.job.meter
        before = meter.ledger.entry("score")
        # The moments that OPUS measures by come with the first step, which goes by plain gradients.
        optimizer = job.optimizer if self.config.method == "opus" and job.optimizer.state else None
        goal = self._goal(batch.target)
        with self._observed(optimizer=optimizer, defer=self.config.defer) as seen:
            losses, answers = self._pass(seen, batch.micro_batches, None if self.config.defer else "score")
        rows = self._rows(seen)
        usable = int(rows.isfinite().all(dim=1).sum())
        if usable < batch.kept:
            return StepDone(math.nan, 0)
        choice = self._choose(rows, goal, batch, step=step, lr=lr)
        places = np.sort(choice.indices).tolist()
        chosen = [batch.drawn[place] for place in places]
        if self.config.defer:
            count = sum(answers[place] for place in places)
            weights = torch.zeros(len(batch.drawn), dtype=torch.float64)
            # The pass was by the mean over all candidates' answers.
            weights[places] = sum(answers) / count
            seen.accumulate(weights)
            tokens = self._charge(batch, set(places), choice.flops, phase)
            loss = math.fsum(losses[place] for place in places) / count
        else:
            meter.charge("score", flops=choice.flops)
            micro_batches = self.packed(chosen)
            tokens = sum(part.tokens for part in micro_batches)
            loss = self.train_on(micro_batches, phase)
        after = meter.ledger.entry("score")
        self.tally.flops += after.flops - before.flops
        self.tally.seconds += after.seconds - before.seconds
        self.count(batch.drawn, chosen)
        return StepDone(loss, tokens, chosen)

    def _observed(self, *, optimizer: Any, defer: bool) -> AbstractContextManager[GradientObservation]:
        return observe(
            self.job.model,
            norms=False,
            gradient=defer,
            defer=defer,
            sketch=self._sketch,
            optimizer=optimizer,
            variant="adamw-frozen" if optimizer is not None else "adamw",
        )

    def _pass(
        self, seen: GradientObservation, micro_batches: Sequence[PackedBatch], field: str | None = None
    ) -> tuple[list[float], list[int]]:
        """Backpropagate the mean loss of all answer tokens; the summed loss and the answer tokens of each sample.

        With a ``field`` of the ledger each micro-batch is charged to it.
        """
        total = sum(int(label_positions(batch).targets.numel()) for batch in micro_batches)
        losses: list[float] = []
        answers: list[int] = []
        for batch in micro_batches:
            where = label_positions(batch)
            seen.segments(batch.cu_seqlens, kept=where.cu_seqlens)
            logits = answer_logits(self.job.model, batch, where)
            token_losses = cross_entropy(logits.float(), where.targets, reduction="none")
            (token_losses.sum() / total).backward()
            counts = where.cu_seqlens.diff().tolist()
            losses += [float(part.sum(dtype=torch.float64)) for part in token_losses.detach().split(counts)]
            answers += counts
            if field is not None:
                flops = self._pass_flops(batch) + self._sketch_flops(batch)
                self.job.meter.charge(field, flops=flops, tokens=batch.tokens)
        return losses, answers

    def _goal(self, target: Sequence[PackedBatch]) -> Tensor | None:
        """The sketch [1, D] of the gradient of the target samples' mean loss."""
        if not target:
            return None
        with self._observed(optimizer=None, defer=False) as seen:
            self._pass(seen, target, "score")
        return self._rows(seen).sum(dim=0, keepdim=True)

    def _rows(self, seen: GradientObservation) -> Tensor:
        """What is compared: [samples, D]."""
        return seen.layer_sketches[self._layer].flatten(1) if self._layer else seen.sketches

    def _choose(self, rows: Tensor, goal: Tensor | None, batch: StepBatch, *, step: int, lr: float) -> BatchChoice:
        config, k, count = self.config, batch.kept, len(batch.drawn)
        if config.method == "colm":
            samples = self.job.task.pool.samples
            sources = [samples[index].source for index in batch.drawn]
            return colm(rows, sources, k, keep_sources=self._kept_whole(sources, k))
        if not bool(goal.isfinite().all()):  # type: ignore[union-attr]  # there is one for the other methods
            raise UserError(f"batch_selection: the target's gradient is not finite at step {step + 1}")
        # Rows are shares of the mean over all candidates, and the step is by the mean over those that are kept. At the
        # very end of a cooldown the rate may be 0.
        rate = max(lr, np.finfo(np.float32).tiny) * count / k
        if config.method == "greats":
            return greats(rows, goal, k, lr=rate)
        seed = choice_seed(self.job.config.seed, step)
        return opus(rows, goal, k, lr=rate, temperature=config.temperature, seed=seed)

    def _kept_whole(self, sources: Sequence[str], k: int) -> list[str]:
        """The sources that are kept whole in this batch: those asked for, in turn, while they fit."""
        counts, kept, room = Counter(sources), [], k
        for source in self.config.keep_sources:
            if counts[source] <= room:
                kept.append(source)
                room -= counts[source]
        return kept

    def _charge(self, batch: StepBatch, places: set[int], choice_flops: int, phase: str) -> int:
        """Part the candidates' passes between what was kept and what was not; returns the tokens kept."""
        tokens = flops = 0
        everything = self._matrices.vector_flops(len(places))
        everything += sum(self._pass_flops(part) + self._sketch_flops(part) for part in batch.micro_batches)
        first = 0
        for part in batch.micro_batches:
            where = label_positions(part)
            lengths, answers = part.cu_seqlens.diff().tolist(), where.cu_seqlens.diff().tolist()
            own = [i for i in range(part.samples) if first + i in places]
            first += part.samples
            n, a = sum(lengths[i] for i in own), sum(answers[i] for i in own)
            # Of a dense mask, the rows of the kept tokens.
            pairs = n * part.tokens
            if self.job.step_shape.checkpointing == "attention":
                pairs = attention_pairs([lengths[i] for i in own], causal=True)
            flops += self.job.meter.train(n, pairs, a)
            everything += self.job.weight_grads(n, 0, a)
            tokens += n
        drawn = sum(part.tokens for part in batch.micro_batches)
        score = (everything - flops + choice_flops, drawn - tokens)
        self.job.meter.charge_parts(**{phase: (flops, tokens), "score": score})
        return tokens

    def state_dict(self) -> dict[str, Any]:
        """The tally, and which samples of the target come next."""
        target = {} if self._target is None else {"target": self._target_order.state_dict()}
        return {**super().state_dict(), **target}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        super().load_state_dict(state)
        if self._target is not None:
            self._target_order.load_state_dict(state["target"])
