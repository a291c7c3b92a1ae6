"""Small random models of transformers' own classes, and the truth about their samples' gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import pyeff

VOCABULARY = 61
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}


def _decoder(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**{**_DECODER, **options})
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return transformers.BertForMaskedLM(config)


_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _decoder("Llama", tie_word_embeddings=False),
    "llama tied": _decoder("Llama", tie_word_embeddings=True),
    "llama with biases": _decoder("Llama", attention_bias=True, mlp_bias=True),
    "qwen2": _decoder("Qwen2", tie_word_embeddings=True),
    "qwen3": _decoder("Qwen3", tie_word_embeddings=False),
    "gemma2": _decoder("Gemma2", sliding_window=4, query_pre_attn_scalar=8, tie_word_embeddings=True),
    "gpt2": _gpt2,
    "bert": _bert,
    "mixtral": _decoder("Mixtral", num_local_experts=4, **_EXPERTS),
    "qwen3 moe": _decoder("Qwen3Moe", num_experts=4, moe_intermediate_size=12, norm_topk_prob=True, **_EXPERTS),
}


def model_named(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(len(name))
    model = MODELS[name]().double()
    with torch.no_grad():
        # Gains of one and offsets of zero would hide mistakes.
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # grouped_mm knows no float64
    return model.to(dtype).train()


def padded_batch(samples: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Samples of different lengths, right-padded; the same tokens occur in several of them."""
    generator = torch.Generator().manual_seed(samples * 100 + length)
    ids = torch.randint(1, VOCABULARY // 2, (samples, length), generator=generator)
    mask = torch.ones_like(ids)
    for sample in range(samples):
        mask[sample, length - sample :] = 0
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def sample_of(batch: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    return {name: value[sample : sample + 1] for name, value in batch.items()}


def loss_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The summed cross entropy of a batch's labelled tokens, divided by a constant: a sum over samples."""
    labels = batch["labels"]
    # With a cache, transformers would not keep packed samples from each other.
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, **({} if model.config.model_type == "bert" else {"use_cache": False})).logits
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum") / 16


@dataclass
class Truth:
    """What one-sample-at-a-time gradients say: `norms_sq` [samples] of each parameter, and the gradient of all."""

    norms_sq: dict[str, Tensor]
    gradient: dict[str, Tensor]

    @property
    def grad_norms(self) -> Tensor:
        return torch.stack(list(self.norms_sq.values())).sum(0).sqrt()


def gradient_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return {name: found[name] for name, p in model.named_parameters() if p.requires_grad}


def truth_of(model: nn.Module, batch: dict[str, Tensor], loss: Callable[..., Tensor] = loss_sum) -> Truth:
    """The samples' gradients one by one, on a copy of the model."""
    model = copy.deepcopy(model)
    gradient = gradient_of(model, loss(model, batch))
    samples = [gradient_of(model, loss(model, sample_of(batch, s))) for s in range(next(iter(batch.values())).shape[0])]
    norms_sq = {name: torch.stack([s[name].double().square().sum() for s in samples]) for name in gradient}
    return Truth(norms_sq, gradient)


def observed(model: nn.Module, backward: Callable[[], None], **options: Any) -> tuple[pyeff.GradientObservation, Truth]:
    """What `observe` sees of a backward pass, and its numbers in the form of the truth."""
    model.zero_grad()
    with pyeff.observe(model, by_parameter=True, **options) as seen:
        backward()
    gradient = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return seen, Truth(dict(seen.by_parameter), gradient)
