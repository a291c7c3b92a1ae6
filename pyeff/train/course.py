"""All that changes while a run goes on: what a checkpoint holds, and how it is taken up again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyeff.data import DataOrder
from pyeff.governor import Ledger
from pyeff.governor.policy import GovernorPolicy, Policy, UniformPolicy
from pyeff.train import checkpoint as checkpoints
from pyeff.train.batches import make_batches
from pyeff.train.control import ControlArm
from pyeff.train.job import Job
from pyeff.train.state import State


class Course:
    """Where a run stands: weights and optimizer of the job, the order of the samples, the policy and its control."""

    def __init__(self, job: Job) -> None:
        config, pool = job.config, job.task.pool
        self.job = job
        self.order = DataOrder(len(pool), config.seed, lengths=pool.lengths)
        kind = GovernorPolicy if config.policy == "governor" else UniformPolicy
        self.policy: Policy = kind(config.governor_config)
        self.control = ControlArm(job)
        self.batches = make_batches(job)
        self.state = State()

    def first_price(self) -> tuple[int, int]:
        """FLOPs and tokens of the first step, at most; what comes next stays as it is."""
        pool, batches = self.job.task.pool, self.batches
        before = batches.state_dict()
        first = batches.draw(DataOrder(len(pool), self.job.config.seed, lengths=pool.lengths), 0)
        batches.load_state_dict(before)
        return first.flops, first.tokens

    def is_finite(self) -> bool:
        """Whether every weight is a number."""
        return all(math.isfinite(float(p.detach().sum(dtype=torch.float32))) for p in self.job.parameters.values())

    def save(self, directory: Path, *, events: int) -> int:
        """Write a checkpoint that points at ``events`` bytes of the event log; returns its size in bytes.

        Raises `pyeff.train.checkpoint.NoSpaceError` where it does not fit.
        """
        job, state = self.job, self.state
        optimizer, moments = checkpoints.split_tensors(job.optimizer.state_dict())
        groups: dict[str, dict[str, Tensor]] = {
            "weights": {name: parameter.data for name, parameter in job.parameters.items()},
            "ema": job.ema.averages,
            "optimizer": moments,
            "control": self.control.tensors(),
        }
        content = {
            "format": 1,
            "state": state.to_dict(),
            "ledger": job.meter.ledger.state_dict(),
            "order": self.order.state_dict(),
            "policy": self.policy.state_dict(),
            "control": self.control.state_dict(),
            "batches": self.batches.state_dict(),
            "optimizer": optimizer,
            "ema_steps": job.ema.steps,
            "events": events,
            "decisions": sum(state.decisions.values()),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        keep = job.config.keep_checkpoints
        return checkpoints.save_checkpoint(directory, state.steps, groups, content, keep=keep)

    def load(self, path: Path, content: dict[str, Any]) -> Ledger:
        """Go on from a checkpoint; returns its ledger.

        Raises `UserError`, ValueError, LookupError or what safetensors raises for one that does not fit this run.
        """
        job = self.job
        checkpoints.load_into(path / "weights.safetensors", {name: p.data for name, p in job.parameters.items()})
        checkpoints.load_into(path / "ema.safetensors", job.ema.averages)
        checkpoints.load_optimizer(job.optimizer, path, content)
        job.ema.steps = content["ema_steps"]
        self.order.load_state_dict(content["order"])
        self.policy.load_state_dict(content["policy"])
        self.control.load(content["control"], checkpoints.load_tensors(path / "control.safetensors"))
        if "batches" in content:  # not in those of older versions
            self.batches.load_state_dict(content["batches"])
        self.state = State.from_dict(content["state"])
        ledger = Ledger()
        ledger.load_state_dict(content["ledger"])
        return ledger
