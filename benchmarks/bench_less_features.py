"""LESS features of SmolLM2-135M with adapters of rank 16, against the same forward and backward pass without them.

    pytest benchmarks/bench_less_features.py --benchmark-only --long

32 packed samples of the lengths of reasoning-gym questions with a chat template; random weights, which cost the same.
The features are AdamW's steps of each sample's own loss gradient, sketched. As peer the usual way: a backward pass for
each sample, AdamW's step of its gradient in plain torch, and the stand-alone sketch of that (4 samples, times 8).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor, nn

import pyeff
from pyeff.data import EncodedSample, label_positions, pack_one
from pyeff.scoring.language_model import answer_logits

SAMPLES, RANK = 32, 16


def adapted(layers: int, *, tiny: bool) -> nn.Module:
    """SmolLM2-135M's shape with adapters on every linear layer but the head."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512 if tiny else 49152,
        hidden_size=36 if tiny else 576,
        intermediate_size=96 if tiny else 1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    lora = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora).train()


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with moments of the size of gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for group in optimizer.param_groups:
        for p in group["params"]:
            noise = [1e-3 * torch.randn_like(p) for _ in range(2)]
            optimizer.state[p] = {"step": torch.tensor(20.0), "exp_avg": noise[0], "exp_avg_sq": noise[1].square()}
    return optimizer


def samples(count: int, vocabulary: int) -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(36, 61, (count,), generator=generator).tolist()
    draw = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [EncodedSample(ids, len(ids) - 2 - i % 4, i) for i, ids in enumerate(draw)]


@pytest.mark.benchmark(group="less_features")
@pytest.mark.parametrize("dim", [2048, 8192])
def test_features_beside_a_backward_pass(
    contest: Callable[..., Any], request: pytest.FixtureRequest, device: str, tiny: bool, dim: int
) -> None:
    # A CPU without --long takes a few of the thirty layers: the ratio is nearly that of all.
    layers = 2 if tiny else 30 if device == "cuda" or request.config.getoption("--long") else 4
    model = adapted(layers, tiny=tiny).to(device)
    optimizer, sketch = stepped(model), pyeff.Sketch(dim)
    data = samples(SAMPLES, model.config.vocab_size)
    batch = pack_one(data).to(device)

    def backward(packed: Any) -> None:
        where = label_positions(packed)
        counts = where.cu_seqlens.diff().long()
        losses = nn.functional.cross_entropy(answer_logits(model, packed, where), where.targets, reduction="none")
        (losses * torch.repeat_interleave(1.0 / counts, counts)).sum().backward()

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        backward(batch)

    def features(**options: Any) -> Tensor:
        model.zero_grad(set_to_none=True)
        with pyeff.observe(model, norms=False, sketch=sketch, **options) as seen:
            seen.segments(batch.cu_seqlens, kept=label_positions(batch).cu_seqlens)
            backward(batch)
        return seen.sketches

    directions = pyeff.optimizer_directions(model, optimizer)

    def one_by_one(count: int = SAMPLES // 8) -> Tensor:
        found = []
        for sample in data[:count]:
            model.zero_grad(set_to_none=True)
            backward(pack_one([sample]).to(device))
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found.append(sketch(grads, directions=directions))
        return torch.stack(found)

    got, peer = features(optimizer=optimizer)[:4], one_by_one(4)
    if tiny:
        model.double()
        for state in optimizer.state.values():
            state.update(exp_avg=state["exp_avg"].double(), exp_avg_sq=state["exp_avg_sq"].double())
        directions = pyeff.optimizer_directions(model, optimizer)
        exact = one_by_one(4)
        model.float()
        for state in optimizer.state.values():
            state.update(exp_avg=state["exp_avg"].float(), exp_avg_sq=state["exp_avg_sq"].float())
        directions = pyeff.optimizer_directions(model, optimizer)
        assert_as_accurate(got, exact, peer, multiple=8.0, what="features")
    contest(
        "pyeff, LESS features",
        {
            "forward and backward": plain,
            "pyeff, LESS features": lambda: features(optimizer=optimizer),
            "pyeff, features without .grad": lambda: features(optimizer=optimizer, gradient=False),
            "pyeff, sketches of gradients": features,
            "one by one (an eighth)": one_by_one,
        },
        baseline="forward and backward",
        target=1.25,
        pairs=2 if layers == 30 and device == "cpu" else 5,
        enforced=False,
    )
