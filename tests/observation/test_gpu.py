"""On a GPU, where autograd computes in a thread of its own."""

from __future__ import annotations

import pytest
import torch
from observed_models import loss_sum, model_named, observed, padded_batch, truth_of

EPS = torch.finfo(torch.float32).eps


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "re-entrant", "not re-entrant"])
@pytest.mark.parametrize("name", ["llama tied", "gpt2", "mixtral"])
def test_norms_are_those_of_single_samples(name: str, reentrant: bool | None) -> None:
    batch = padded_batch()
    exact = truth_of(model_named(name), batch)
    model = model_named(name, torch.float32).cuda()
    batch = {key: value.cuda() for key, value in batch.items()}
    peer = truth_of(model, batch).grad_norms.cpu()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    seen, actual = observed(model, lambda: loss_sum(model, batch).backward())
    assert seen.unobserved == {}
    budget = 4 * (peer - exact.grad_norms).abs().max() + 8 * EPS * exact.grad_norms.max()
    assert (seen.grad_norms.cpu().double() - exact.grad_norms).abs().max() <= budget
    assert all(norms_sq.is_cuda for norms_sq in actual.norms_sq.values())
