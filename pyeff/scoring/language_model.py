"""What scoring and training rely on in a causal language model of transformers: its head, packing and matrices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pyeff.data.packing import LabelPositions, PackedBatch, pack_one
from pyeff.data.samples import EncodedSample
from pyeff.errors import UserError
from pyeff.governor.flops import TransformerShape
from pyeff.scoring.work import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def head_weight(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """Return weight [V, D], bias [V] or None, and the logit softcap or None of a model's output head.

    Raises:
        UserError: the head is not one plain linear layer (for one, an adapter sits on it).
    """
    core = without_adapters(model)
    head = core.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"the output head of {type(core).__name__} is {type(head).__name__}, not a plain linear layer: "
            "it cannot be scored"
        )
    softcap = getattr(core.config.get_text_config(), "final_logit_softcapping", None)
    return head.weight, head.bias, None if softcap is None else float(softcap)


def layer_matrices(model: nn.Module) -> list[tuple[int, int]]:
    """Shapes of the matrices between embedding and head, as the model holds them: fused ones as one."""
    head = without_adapters(model).get_output_embeddings().weight
    modules = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    parameters = [p for module in modules for p in module.parameters(recurse=False) if p.ndim == 2 and p is not head]
    return [(p.shape[0], p.shape[1]) for p in parameters]


def packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Return the keyword arguments with which a transformers model keeps the samples of a packed batch apart."""
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}


def answer_logits(model: Any, batch: PackedBatch, where: LabelPositions) -> torch.Tensor:
    """Logits [A, V] of a packed batch at the positions that predict answer tokens, and only there."""
    logits: torch.Tensor = model(**packed_inputs(batch), logits_to_keep=where.positions).logits[0]
    return logits


def last_hidden_state(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Return what enters the output head at every token of a packed batch, [T, D], without running the head."""
    core = without_adapters(model)
    body = getattr(core, core.base_model_prefix)
    hidden: torch.Tensor = body(**packed_inputs(batch)).last_hidden_state
    return hidden[0]


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Make sure that samples packed in one batch do not see each other, on a few tokens.

    Two laws: what stands in one sample must not change a bit of another's logits, and a sample must get the
    logits it gets alone, up to the square root of its type's rounding unit. Experts get as many tokens as the
    neighbour leaves them, and products of other shapes round otherwise: for a mixture the first law holds up to
    the rounding that packing makes.

    Raises:
        UserError: they do, so this model cannot be trained on packed batches.

    Cost: five forward passes of at most 12 tokens.
    """
    core = without_adapters(model)
    vocabulary = core.get_input_embeddings().num_embeddings
    first, other, second = (
        [(start + 7 * i) % vocabulary for i in range(length)] for start, length in ((1, 5), (3, 5), (2, 7))
    )
    device = next(model.parameters()).device

    def logits(*samples: list[int]) -> torch.Tensor:
        batch = pack_one([EncodedSample(ids, 1, i) for i, ids in enumerate(samples)]).to(device)
        return core(**packed_inputs(batch)).logits[0].float()

    with evaluating(model):
        packed = logits(first, second)[len(first) :]
        leak = (packed - logits(other, second)[len(first) :]).abs().max().item()
        # A device whose kernels do not repeat themselves bitwise gets that much allowance.
        repeat = (packed - logits(first, second)[len(first) :]).abs().max().item()
        alone = logits(second)
    difference = (packed - alone).abs().max().item()
    if not math.isfinite(difference):
        raise UserError(f"{type(core).__name__} computes logits that are not finite: its weights may hold NaN")
    allowed = math.sqrt(torch.finfo(core.dtype).eps) * alone.abs().max().item()
    mixture = any(getattr(core.config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    if not (leak <= max(repeat, 4 * difference if mixture else 0.0) and difference <= allowed):
        raise UserError(
            f"{type(core).__name__} does not keep packed samples apart (a neighbour changes logits by "
            f"{leak:.2g}, packing by {difference:.2g}): it cannot be trained on packed batches"
        )


@torch.no_grad()
def check_head(model: nn.Module) -> bool:
    """Tell whether the head alone, applied to the last hidden state, gives the model's own loss.

    False for models that scale or shift their logits after the head: scores computed from hidden states would
    be those of another model. The tolerance is the rounding of a D-term product in the model's type.

    Cost: two forward passes of 12 tokens.
    """
    weight, bias, softcap = head_weight(model)
    core = without_adapters(model)
    vocabulary = weight.shape[0]
    device = weight.device
    batch = pack_one(
        [EncodedSample([(start + 11 * i) % vocabulary for i in range(6)], 1, n) for n, start in enumerate((1, 4))]
    ).to(device)
    with evaluating(model):
        logits = core(**packed_inputs(batch)).logits[0].float()
        hidden = last_hidden_state(model, batch)
    # The likeliest token moves most under a scale, a random one may not move at all.
    targets = logits.argmax(dim=-1)
    expected = nn.functional.cross_entropy(logits, targets, reduction="none")
    got = _head_nll(hidden, weight, targets, bias, softcap)
    norm = hidden.float().norm(dim=-1).max() * weight[targets].float().norm(dim=-1).max()
    rounding = 8 * torch.finfo(core.dtype).eps * max(norm.item(), logits.abs().max().item(), 1.0)
    return bool(((got - expected).abs() <= rounding).all())


def _head_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    from pyeff import linear_cross_entropy_scores

    return linear_cross_entropy_scores(hidden, weight, targets, bias=bias, softcap=softcap).nll


def without_adapters(model: nn.Module) -> Any:
    """Return the transformers model inside a peft wrapper; its layers keep their adapters."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model is not None else model


def shape_of_model(model: PreTrainedModel) -> TransformerShape:
    """Describe the matrix products of a model.

    Raises:
        UserError: it is not a plain dense decoder-only transformer: its matrices are not those of any description.
    """
    config: Any = model.config.get_text_config()
    refusal = UserError(
        f"{type(model).__name__} is not a plain dense decoder-only transformer, so its FLOPs cannot be counted"
    )
    try:
        layers = int(config.num_hidden_layers)
        hidden = int(config.hidden_size)
        heads = int(config.num_attention_heads)
    except (AttributeError, TypeError) as error:
        raise refusal from error
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    # Three names for the MLP's width; GPT-2's may be None and then means four times the hidden size.
    widths = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    intermediate = next((width for width in widths if width), 4 * hidden)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    head = model.get_output_embeddings()
    if not isinstance(intermediate, int) or not stacks or head is None:
        raise refusal
    # Matrices only: norms, biases, adapters and the like are not counted.
    matrices = {
        sum(p.numel() for name, p in stack.named_parameters() if p.ndim >= 2 and ".lora_" not in name)
        for stack in stacks
    }
    for gated in (True, False):
        shape = TransformerShape(
            layers=layers,
            hidden_size=hidden,
            query_width=heads * head_dim,
            kv_width=kv_heads * head_dim,
            intermediate_size=intermediate,
            gated_mlp=gated,
            vocab_size=int(head.weight.shape[0]),
            tied_embeddings=bool(model.config.tie_word_embeddings),
        )
        if layers * sum(n * m for n, m in shape.linears.values()) in matrices:
            return shape
    raise refusal
