"""Judge a model: losses of samples, and answers in words. Forward passes only, each charged by its caller."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyeff.data import label_positions
from pyeff.scoring.language_model import answer_logits

if TYPE_CHECKING:
    from pyeff.data import LabelPositions, PackedBatch

Charge = Callable[[int, int, int], None]
"""Called after a forward pass with its tokens, attention pairs and positions with logits."""


@dataclass(frozen=True)
class LossSummary:
    """Mean of per-sample losses in nats per token, and the standard error of that mean over samples."""

    loss: float
    standard_error: float


def summarize_losses(losses: Sequence[float]) -> LossSummary:
    """Mean and standard error of the finite losses; NaN where there are none, or one for the error.

    >>> summarize_losses([1.0, 3.0])
    LossSummary(loss=2.0, standard_error=1.0)
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return LossSummary(math.nan, math.nan)
    mean = math.fsum(finite) / len(finite)
    if len(finite) == 1:
        return LossSummary(mean, math.nan)
    variance = math.fsum((loss - mean) ** 2 for loss in finite) / (len(finite) - 1)
    return LossSummary(mean, math.sqrt(variance / len(finite)))


def summed_loss(model: Any, batch: PackedBatch, where: LabelPositions) -> Tensor:
    """Sum of the answer tokens' losses, float32: micro-batches add up to the batch."""
    logits = answer_logits(model, batch, where)
    return cross_entropy(logits.float(), where.targets, reduction="sum")


@torch.no_grad()
def sample_losses(
    model: Any, batches: Iterable[PackedBatch], samples: int, *, charge: Charge | None = None
) -> list[float]:
    """Mean loss over the answer tokens of each of N samples, by sample index, in nats per token."""
    losses = [math.nan] * samples
    for batch in batches:
        where = label_positions(batch)
        token_losses = cross_entropy(answer_logits(model, batch, where).float(), where.targets, reduction="none")
        borders = where.cu_seqlens.tolist()
        for i, index in enumerate(batch.sample_indices):
            own = token_losses[borders[i] : borders[i + 1]]
            losses[index] = float(own.mean()) if own.numel() else math.nan
        if charge is not None:
            charge(batch.tokens, batch.tokens**2, int(where.targets.numel()))
    return losses


def generation_work(prompt_lengths: Sequence[int], max_new_tokens: int) -> tuple[int, int, int]:
    """The most `greedy_answers` can do for one batch: tokens, attention pairs, positions with logits."""
    rows, width = len(prompt_lengths), max(prompt_lengths)
    steps = max_new_tokens - 1
    pairs = rows * (width**2 + sum(width + step for step in range(1, steps + 1)))
    return rows * (width + steps), pairs, rows * max_new_tokens


@torch.no_grad()
def greedy_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: frozenset[int],
    pad_token: int,
    charge: Charge | None = None,
) -> list[list[int]]:
    """The most likely continuation of each prompt, token by token, up to an end token (left out).

    Prompts are padded on the left to one length; the padding is computed and charged like any token.
    """
    device = next(model.parameters()).device
    rows, width = len(prompts), max(len(prompt) for prompt in prompts)
    ids = torch.full((rows, width), pad_token, dtype=torch.int64)
    mask = torch.zeros((rows, width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(rows))
    cache = None
    for step in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if charge is not None:
            charge(ids.numel(), ids.numel() * (width + step), rows)
        cache = output.past_key_values
        chosen = output.logits[:, -1].argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            if row in open_rows:
                if token in end_tokens:
                    open_rows.discard(row)
                else:
                    answers[row].append(token)
        if not open_rows:
            break
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
        positions = positions[:, -1:] + 1
    return answers


def same_answer(given: str, expected: str) -> bool:
    """Whether two answers are equal but for surrounding white space.

    >>> same_answer(" 12\\n", "12"), same_answer("12.", "12")
    (True, False)
    """
    return given.strip() == expected.strip()
