"""The governor in Hugging Face's Trainer: a callback that counts, decides, anneals and ends, and a sampler it steers.

Use::

    sampler = GovernedSampler(len(dataset), seed=0)
    governor = pyeff.Governor("2 PF", anchors=anchor_losses, flops_per_token=8e8, selectors=[Selector("loss", 1e14)])

    class GovernedTrainer(SamplerMixin, transformers.Trainer):
        train_sampler = sampler

    trainer = GovernedTrainer(model, args, train_dataset=dataset)
    trainer.add_callback(GovernorCallback(governor, refresh=choose, sampler=sampler))
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyeff._files import write_text_atomic
from pyeff.governor import Action, Decision, Governor, format_amount

_STATE = "governor.json"


@dataclass
class _Epoch:
    """What an epoch began with, how many indices were drawn, and each selection made with how many there were then."""

    passes: int = 0
    selected: list[int] | None = None
    drawn: int = 0
    changes: list[tuple[int, list[int] | None]] = field(default_factory=list)


class GovernedSampler(Sampler[int]):
    """Shuffled indices of a dataset, or of the part of it that was selected last.

    A selection takes effect at the next index drawn; batches that the data loader has already fetched (and those of
    its worker processes, ``prefetch_factor`` each) are still the old ones. The order is a function of the seed and of
    how many indices were drawn under which selections.

    Args:
        size: of the dataset, >= 1.
        seed: of the order.
    """

    def __init__(self, size: int, *, seed: int = 0) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be a positive integer, got {size!r}")
        self.size = size
        self.seed = seed
        self.selected: list[int] | None = None
        self._passes = 0
        self._epoch = _Epoch()
        self._again = False

    def select(self, indices: Sequence[int] | None) -> None:
        """Draw from these indices from now on (repeats weigh more); None draws from all again."""
        if indices is not None:
            chosen = [int(index) for index in indices]
            if not chosen:
                raise ValueError("indices must not be empty")
            if not all(0 <= index < self.size for index in chosen):
                raise ValueError(f"indices must lie between 0 and {self.size - 1}")
        self.selected = None if indices is None else chosen
        self._epoch.changes.append((self._epoch.drawn, self.selected))

    def __len__(self) -> int:
        """The length of an epoch: always that of the dataset, so that the Trainer's count of steps stands."""
        return self.size

    def __iter__(self) -> Iterator[int]:
        if not self._again:
            self._epoch = _Epoch(self._passes, self.selected)
        epoch, self._again = self._epoch, False
        self._passes, epoch.drawn = epoch.passes, 0
        selected, seen = epoch.selected, 0
        while epoch.drawn < self.size:
            pool: Sequence[int] = selected if selected is not None else range(self.size)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._passes)
            self._passes += 1
            for at in torch.randperm(len(pool), generator=generator).tolist():
                made = sum(when <= epoch.drawn for when, _ in epoch.changes)
                if epoch.drawn == self.size or made > seen:
                    break
                epoch.drawn += 1
                yield pool[at]
            made = sum(when <= epoch.drawn for when, _ in epoch.changes)
            if made > seen:
                selected, seen = epoch.changes[made - 1][1], made

    def state_dict(self) -> dict[str, Any]:
        """Return the selection and how the epoch went so far, JSON-able."""
        return {
            "size": self.size,
            "seed": self.seed,
            "selected": self.selected,
            "passes": self._passes,
            "epoch": asdict(self._epoch),
        }

    def load_state_dict(self, state: dict[str, Any], *, inside_epoch: bool = False) -> None:
        """Take up a saved selection; ValueError when it is of another dataset.

        Args:
            state: of :meth:`state_dict`.
            inside_epoch: whether the epoch that was under way is drawn again from its start, every selection at the
                index where it was made: for loops that skip what was trained on, as the Trainer does. Otherwise a new
                epoch begins.
        """
        missing = {"size", "seed", "passes", "selected"} - set(state)
        if missing:
            raise ValueError(f"state must be what state_dict returned, it lacks {', '.join(sorted(missing))}")
        if state["size"] != self.size:
            raise ValueError(f"state belongs to a dataset of {state['size']} samples, this one has {self.size}")
        self.seed, self._passes, self.selected = state["seed"], state["passes"], state["selected"]
        # Checkpoints written before epochs were kept have none.
        self._again = inside_epoch and "epoch" in state
        if self._again:
            try:
                saved = state["epoch"]
                changes = [(when, selected) for when, selected in saved["changes"]]
                self._epoch = _Epoch(saved["passes"], saved["selected"], saved["drawn"], changes)
            except (TypeError, ValueError, LookupError) as error:
                raise ValueError(f"state must be what state_dict returned, its epoch is not: {error!r}") from error


class SamplerMixin:
    """Put before a Trainer class to give it ``train_sampler``."""

    train_sampler: GovernedSampler | None = None

    def _get_train_sampler(self, *args: Any, **options: Any) -> Any:
        if self.train_sampler is not None:
            return self.train_sampler
        return super()._get_train_sampler(*args, **options)  # type: ignore[misc]


class GovernorCallback(TrainerCallback):
    """Let a governor watch a Trainer, scale its learning rate, steer its sampler and end it.

    The Trainer's own schedule should be constant (``lr_scheduler_type="constant"`` or with warm-up) and its
    ``max_steps`` larger than the budget can buy. Each checkpoint of the Trainer gets a ``governor.json``;
    ``resume_from_checkpoint`` goes on from it.

    Args:
        governor: with its budget and anchors.
        refresh: called as ``refresh(model, decision)`` on REFRESH and on SWITCH; returns the indices to train on, or
            None for all. Required where the governor was given selectors.
        sampler: the Trainer's sampler, which gets these indices.
        act: called as ``act(model, decision)`` on every other action that changes something (BATCH, PROBE, MEMORY).
        tokens_per_step: None takes them from the Trainer, which counts them under
            ``include_num_input_tokens_seen="all"``.
        refresh_flops: of one scoring, charged to the ledger with its seconds.

    One process only: decisions of several would differ. Raises ValueError at the beginning of training for more than
    one, for tokens that nobody counts, and for selectors without ``refresh``.
    """

    def __init__(
        self,
        governor: Governor,
        *,
        refresh: Callable[[Any, Decision], Sequence[int] | None] | None = None,
        sampler: GovernedSampler | None = None,
        act: Callable[[Any, Decision], None] | None = None,
        tokens_per_step: int | None = None,
        refresh_flops: float = 0.0,
    ) -> None:
        if refresh is not None and sampler is None:
            raise ValueError("sampler must be given with refresh, or its indices go nowhere")
        self.governor = governor
        self.decisions: list[Decision] = []
        self._refresh, self._sampler, self._act = refresh, sampler, act
        self._tokens_per_step, self._refresh_flops = tokens_per_step, refresh_flops
        self._tokens_seen = 0
        self._loss: float | None = None
        self._scheduled: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Check that everything needed is counted, and take up the state of a checkpoint."""
        if args.world_size > 1:
            raise ValueError(f"GovernorCallback works in one process, got world_size {args.world_size}")
        counted = args.include_num_input_tokens_seen not in (False, "no")
        if self.governor.budget.unit != "seconds" and self._tokens_per_step is None and not counted:
            raise ValueError(
                "tokens are not counted: give tokens_per_step, or set include_num_input_tokens_seen='all' in the "
                "training arguments"
            )
        if self.governor.has_selectors and self._refresh is None:
            raise ValueError("refresh must be given where the governor has selectors")
        if state.global_step:
            path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _STATE
            self._load(path, inside_epoch=float(state.epoch or 0.0) % 1 > 0 and not args.ignore_data_skip)
        self._tokens_seen = int(state.num_input_tokens_seen)
        self.governor.start_clock()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **objects: Any,
    ) -> None:
        """Remember the last logged loss: the Trainer hands out no other."""
        if logs and "loss" in logs:
            self._loss = logs["loss"]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Scale the scheduled learning rate for this step."""
        groups = objects["optimizer"].param_groups
        self._scheduled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= self.governor.lr_factor

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Give the scheduler its own rate back: some schedules go on from what they find."""
        for group, lr in zip(objects["optimizer"].param_groups, self._scheduled, strict=True):
            group["lr"] = lr

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> TrainerControl:
        """Charge the step, do what a decision asks, and end when the budget is spent."""
        tokens = self._tokens_per_step
        if tokens is None:
            tokens, self._tokens_seen = (
                int(state.num_input_tokens_seen) - self._tokens_seen,
                state.num_input_tokens_seen,
            )
        decision = self.governor.step(tokens=tokens, loss=self._loss)
        self._loss = None
        if decision is not None:
            self.decisions.append(decision)
            self._follow(objects["model"], decision)
        if self.governor.done:
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Warn where the Trainer's own limit of steps came before the budget's end: the anneal is then missing."""
        governor = self.governor
        if state.global_step >= state.max_steps and not governor.done:
            spent = format_amount(governor.spent, governor.budget.unit)
            warnings.warn(
                f"the Trainer ended after {state.max_steps} steps with {spent} spent of a budget of {governor.budget}, "
                "so the learning rate was not annealed to the end: give it more max_steps or a smaller budget",
                stacklevel=2,
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        """Write the governor's state into the checkpoint."""
        content = {
            "governor": self.governor.state_dict(),
            "sampler": None if self._sampler is None else self._sampler.state_dict(),
        }
        path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _STATE
        write_text_atomic(path, json.dumps(content, allow_nan=False))

    def _follow(self, model: Any, decision: Decision) -> None:
        if decision.action in (Action.REFRESH, Action.SWITCH):
            if self._refresh is not None and self._sampler is not None:
                self._sampler.select(self._refresh(model, decision))
            if decision.action is Action.REFRESH:
                self.governor.scored(decision.argument, flops=self._refresh_flops)
        elif decision.action not in (Action.CONTINUE, Action.COOLDOWN) and self._act is not None:
            self._act(model, decision)

    def _load(self, path: Path, *, inside_epoch: bool) -> None:
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: the checkpoint was written without this governor, or lies in another directory "
                "than output_dir"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            governor, sampler = content["governor"], content["sampler"]
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{path} is damaged: resume from another checkpoint ({error!r})") from error
        self.governor.load_state_dict(governor)
        if self._sampler is not None and sampler is not None:
            self._sampler.load_state_dict(sampler, inside_epoch=inside_epoch)
