"""How a run takes its steps within a given memory: with or without recomputation, in how large micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyeff.errors import UserError
from pyeff.memory.planned_model import Source
from pyeff.memory.planner import Planner
from pyeff.memory.plans import Plan, Settings, parse_size, size_text
from pyeff.memory.rates import Rates
from pyeff.memory.transformer import Checkpointing

if TYPE_CHECKING:
    from torch import nn

    from pyeff.data import EncodedSamples
    from pyeff.train.config import RunConfig

# Of two cores, for ranking alone: a run that is resumed elsewhere must choose the same way again.
_RATES = Rates(1e11, 1e10, "estimate", "cpu")


@dataclass(frozen=True)
class StepShape:
    """What was chosen, and the plan it was chosen by (None where no memory was given)."""

    checkpointing: Checkpointing
    micro_tokens: int
    plan: Plan | None = None

    def to_dict(self) -> dict[str, Any] | None:
        """Plain values for the run's events; None where nothing was planned."""
        if self.plan is None:
            return None
        peak = self.plan.peak
        return {
            "limit": self.plan.device_memory,
            "predicted_peak": peak.total,
            "peak_phase": peak.name,
            "by_component": {
                name: getattr(peak, name)
                for name in ("parameters", "states", "gradients", "activations", "working", "other")
            },
            "checkpointing": self.checkpointing,
            "micro_batch_tokens": self.micro_tokens,
        }


def step_shape(config: RunConfig, model: nn.Module, pool: EncodedSamples) -> StepShape:
    """Choose recomputation and micro-batches by `config.memory`; what the configuration names itself is kept.

    Of what fits, the fastest by the planner's estimate: recomputation costs FLOPs, small micro-batches read the
    weights more often, large ones multiply more of the mask between samples. Tensors of the training step are counted,
    averaged weights included; not the interpreter and torch's libraries.

    Raises `UserError` where nothing fits, with the nearest option.
    """
    if config.memory is None:
        return StepShape(config.checkpointing or "none", config.micro_tokens)
    limit = parse_size(config.memory)
    source = Source(model, config.dtype)
    averages = 4 * sum(p.numel() for p in model.parameters()) if config.lora is None else 0
    planner = Planner(source, other_bytes=averages, rates=_RATES, device_memory=limit)
    share = max(sample.answer_length / len(sample) for sample in pool.encoded)
    asked = config.checkpointing
    candidates = [
        (_settings(config, tokens, checkpointing, share), checkpointing, tokens)
        for checkpointing in (planner.checkpointings() if asked is None else (asked,))
        for tokens in _micro_tokens(config)
    ]
    if config.lora is not None:
        adapters = sum(p.elements for p in planner.parameters(candidates[0][0]) if p.trained)
        planner.other += 4 * adapters
    fitting = [item for item in candidates if planner.fits(item[0])]
    if not fitting:
        settings, checkpointing, tokens = min(candidates, key=lambda item: planner.peak(item[0]))
        raise UserError(
            f"memory: {size_text(limit)} do not hold a training step of {config.model}: the nearest option needs "
            f"{size_text(planner.peak(settings))} (checkpointing {checkpointing}, "
            f"micro_batch_tokens {tokens}); {_advice(config)}"
        )
    settings, checkpointing, tokens = min(fitting, key=lambda item: (planner.seconds(item[0]), -item[2]))
    return StepShape(checkpointing, tokens, planner.plan(settings, search=False))


def _settings(config: RunConfig, tokens: int, checkpointing: Checkpointing, answers: float) -> Settings:
    lora: dict[str, Any] = {}
    if config.lora is not None:
        wanted = config.lora.target_modules
        lora = {
            "lora_rank": config.lora.rank,
            "lora_targets": (wanted,) if isinstance(wanted, str) else tuple(wanted),
            "lora_dropout": config.lora.dropout,
        }
    return Settings(
        seq_len=tokens,
        packed=True,
        accumulation=-(-config.batch_tokens // tokens),
        dtype=config.dtype,
        optimizer="adamw8bit" if config.optimizer.states == "8bit" else "adamw",
        checkpointing=checkpointing,
        # Logits are computed where an answer is predicted; no micro-batch holds a larger share of them than a sample.
        head_tokens=min(tokens, round(answers * tokens + 0.5)),
        device="cpu",
        **lora,
    )


def _micro_tokens(config: RunConfig) -> list[int]:
    """Micro-batches to choose from: the whole batch, halves of it, and the longest sample."""
    if config.micro_batch_tokens is not None:
        return [config.micro_batch_tokens]
    found = [config.batch_tokens]
    while found[-1] > config.data.max_tokens:
        found.append(max(config.data.max_tokens, -(-found[-1] // 2)))
    return found


def _advice(config: RunConfig) -> str:
    tips = []
    if config.micro_batch_tokens is not None or config.checkpointing not in (None, "layer"):
        tips.append("leave micro_batch_tokens and checkpointing to the planner")
    if config.optimizer.states != "8bit":
        tips.append("take optimizer.states 8bit")
    if config.lora is None:
        tips.append("train adapters with lora")
    tips.append("lower data.max_tokens")
    return ", ".join(tips[:-1]) + (" or " if len(tips) > 1 else "") + tips[-1]
