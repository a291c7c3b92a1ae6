"""The batch of each step: all that was drawn, or some of a larger draw at random; and its gradient.

`pyeff.train.batch_selection` has those that look at the samples before they choose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pyeff.data import DataOrder, PackedBatch, label_positions, pack
from pyeff.scoring.language import PACKING_WINDOW
from pyeff.selection import uniform
from pyeff.train.evaluate import summed_loss

if TYPE_CHECKING:
    from pyeff.train.job import Job


@dataclass(frozen=True)
class StepBatch:
    """What a step passes through the model, and what it costs at most: FLOPs, and tokens that are trained on.

    ``kept`` of the samples ``drawn``, indices of the pool, are trained on; ``target`` are what these are compared with.
    """

    micro_batches: list[PackedBatch]
    flops: int
    tokens: int
    drawn: list[int]
    kept: int
    target: list[PackedBatch] = field(default_factory=list)


@dataclass(frozen=True)
class StepDone:
    """A batch whose gradient stands in the parameters: the loss and tokens of what is trained on.

    ``chosen`` are the pool's indices, where not all candidates are trained on.
    """

    loss: float
    tokens: int
    chosen: list[int] | None = None


@dataclass
class Tally:
    """What was chosen among the candidates so far, and the FLOPs and seconds that choosing took; JSON."""

    candidates: int = 0
    kept: int = 0
    flops: int = 0
    seconds: float = 0.0
    # Source -> kept, candidates
    by_source: dict[str, list[int]] = field(default_factory=dict)

    def spent(self, unit: str) -> float:
        """What choosing took of a budget in this unit: training tokens are all that one in tokens counts."""
        return {"flops": float(self.flops), "seconds": self.seconds, "tokens": 0.0}[unit]


def choice_seed(seed: int, step: int) -> int:
    """Of what is drawn at a step; apart from the seeds of the orders."""
    return 2**63 + seed * 2**32 + step


def kept_count(candidates: int, keep: float) -> int:
    """How many of the candidates are kept; at least one.

    >>> [kept_count(n, 0.5) for n in (1, 4, 7)]
    [1, 2, 4]
    """
    return min(candidates, max(1, int(keep * candidates + 0.5)))


class Batches:
    """The batches of a run's steps, each all that was drawn."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tally = Tally()

    @property
    def name(self) -> str | None:
        """How samples of a batch are chosen; None where all are taken."""
        return None

    def check(self) -> None:
        """Raise `UserError` where this model's batches cannot be chosen; before anything is spent."""

    def draw(self, order: DataOrder, step: int) -> StepBatch:
        """The next batch of an order; the same after a resume."""
        indices = order.next_batch(self.job.config.batch_tokens)
        return self._all_of(indices, drawn=indices)

    def backward(self, batch: StepBatch, *, step: int, phase: str, lr: float) -> StepDone:
        """Leave the gradient of a batch's mean loss in the parameters, whose gradients are None; charges the meter."""
        return StepDone(self.train_on(batch.micro_batches, phase), batch.tokens)

    def flops_per_token(self) -> float:
        """Of a token that is trained on, choosing included, as a mean over the pool."""
        job, pool = self.job, self.job.task.pool
        return sum(job.train_flops(batch) for batch in self.epoch()) / pool.tokens

    def epoch(self) -> list[PackedBatch]:
        """The whole pool in micro-batches."""
        return self.packed(range(len(self.job.task.pool)))

    def packed(self, indices: Sequence[int]) -> list[PackedBatch]:
        """Samples of the pool in micro-batches."""
        job = self.job
        return pack(job.task.pool, indices, max_tokens=job.step_shape.micro_tokens, window=PACKING_WINDOW)

    def train_on(self, micro_batches: Sequence[PackedBatch], phase: str) -> float:
        """The mean loss of the answer tokens, with its gradient."""
        answers = sum(int(label_positions(batch).targets.numel()) for batch in micro_batches)
        loss = 0.0
        for batch in micro_batches:
            part = summed_loss(self.job.model, batch, label_positions(batch)) / answers
            part.backward()
            loss += float(part.detach())
            self.job.meter.charge(phase, flops=self.job.train_flops(batch), tokens=batch.tokens)
        return loss

    def _all_of(self, indices: Sequence[int], *, drawn: list[int]) -> StepBatch:
        micro_batches = self.packed(indices)
        flops = sum(self.job.train_flops(batch) for batch in micro_batches)
        return StepBatch(micro_batches, flops, sum(b.tokens for b in micro_batches), drawn, len(indices))

    def count(self, candidates: Sequence[int], chosen: Sequence[int]) -> None:
        """Add the candidates of a step and what was kept of them, indices of the pool, to the tally."""
        samples, by_source = self.job.task.pool.samples, self.tally.by_source
        for place, group in enumerate((chosen, candidates)):
            for source, number in sorted(Counter(samples[i].source for i in group).items()):
                by_source.setdefault(source, [0, 0])[place] += number
        self.tally.candidates += len(candidates)
        self.tally.kept += len(chosen)

    def report(self) -> dict[str, Any] | None:
        """What was kept and what choosing took so far, for the events of a run; None where all is taken."""
        if self.name is None:
            return None
        known = {name: value for name, value in asdict(self.tally).items() if name != "seconds"}
        return {"method": self.name, **known, "spent": self.tally.spent(self.job.meter.unit)}

    def state_dict(self) -> dict[str, Any]:
        """What decides the coming batches beside the order of the samples, and the tally; JSON."""
        return {"tally": asdict(self.tally)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.tally = Tally(**state["tally"])


class RandomBatches(Batches):
    """Of a larger draw as many samples as another method would keep, at random: what choosing must beat."""

    @property
    def name(self) -> str | None:
        """Without a variant: a uniform draw."""
        return "random"

    def draw(self, order: DataOrder, step: int) -> StepBatch:
        """The samples that are kept; no pass is spent on the others."""
        config = self.job.config
        assert config.batch_selection is not None
        keep = config.batch_selection.keep
        indices = order.next_batch(round(config.batch_tokens / keep))
        chosen = uniform(len(indices), kept_count(len(indices), keep), seed=choice_seed(config.seed, step))
        return self._all_of([indices[i] for i in np.sort(chosen)], drawn=indices)

    def backward(self, batch: StepBatch, *, step: int, phase: str, lr: float) -> StepDone:
        """As of any batch."""
        chosen = [index for part in batch.micro_batches for index in part.sample_indices]
        loss = self.train_on(batch.micro_batches, phase)
        self.count(batch.drawn, chosen)
        return StepDone(loss, batch.tokens, chosen)


def make_batches(job: Job) -> Batches:
    """The batches that a configuration asks for."""
    chosen = job.config.batch_selection
    if chosen is None or chosen.keep == 1:
        return Batches(job)
    if chosen.method == "random":
        return RandomBatches(job)
    from pyeff.train.batch_selection import SelectedBatches

    return SelectedBatches(job)
