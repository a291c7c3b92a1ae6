"""FLOPs a decoder-only transformer executes, from plain numbers.

A matrix product of [n, k] and [k, m] is 2 n k m FLOPs. Matrix products are all that is counted, as
``torch.utils.flop_counter`` counts them: norms, activations, rotary embeddings, softmax and the optimizer's
element-wise work are left out (of the order of one per cent of a step).

What is counted is what is *executed*. A batch of T packed tokens under a dense block-diagonal mask multiplies
all T x T pairs, masked or not; a variable-length kernel multiplies only the sum of the squared lengths. The
caller says which, as ``attention_pairs``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
Trainable = Literal["full", "lora"]


def attention_pairs(lengths: Iterable[int], *, causal: bool = False) -> int:
    """Return the query-key pairs of sequences attended one by one: sum of L^2, or of L (L + 1) / 2 if causal.

    The causal count is what the mathematics needs, and what a kernel that skips the masked half executes but for the
    tiles on the diagonal.

    >>> attention_pairs([3, 4]), attention_pairs([3, 4], causal=True)
    (25, 16)
    """
    if causal:
        return sum(length * (length + 1) // 2 for length in lengths)
    return sum(length * length for length in lengths)


@dataclass(frozen=True)
class Cost:
    """FLOPs as a linear function of the work: per token, per attention pair and per position with logits.

    Linear, so a batch costs exactly what its micro-batches cost together.
    """

    per_token: int
    per_pair: int
    per_head_token: int

    def __call__(self, tokens: int, pairs: int, head_tokens: int) -> int:
        """Return the FLOPs of this much work."""
        return self.per_token * tokens + self.per_pair * pairs + self.per_head_token * head_tokens


@dataclass(frozen=True)
class TransformerShape:
    """The matrix products of a decoder-only transformer.

    Args:
        layers: number of decoder layers L.
        hidden_size: width of the residual stream h.
        query_width: query heads x head dimension.
        kv_width: key-value heads x head dimension; equal to ``query_width`` without grouped queries.
        intermediate_size: width of the MLP; for a mixture of experts the sum over the experts active per
            token.
        gated_mlp: three MLP matrices (gate, up, down) instead of two (up, down).
        vocab_size: rows of the output head.
        tied_embeddings: input embedding and output head are one matrix.
        experts: of a mixture of experts, all of them: each layer's router is a product of h with as many outputs,
            trained with the rest. 0 is dense. Padding is not in these numbers: see `pyeff.governor.expert_rows`.

    Raises ValueError for a size that is not a positive integer.

    >>> llama = TransformerShape(layers=2, hidden_size=64, query_width=64, kv_width=32, intermediate_size=128,
    ...                          gated_mlp=True, vocab_size=256)
    >>> llama.forward(10)
    1853440
    >>> llama.train(10) == 3 * llama.forward(10)
    True
    """

    layers: int
    hidden_size: int
    query_width: int
    kv_width: int
    intermediate_size: int
    gated_mlp: bool
    vocab_size: int
    tied_embeddings: bool = False
    experts: int = 0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("gated_mlp", "tied_embeddings"):
                if not isinstance(value, bool):
                    raise TypeError(f"{item.name} must be True or False, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < (item.name != "experts"):
                raise ValueError(f"{item.name} must be a positive integer, got {value!r}")

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every matrix in a layer, in the order of execution."""
        h, q, kv, i = self.hidden_size, self.query_width, self.kv_width, self.intermediate_size
        matrices = {
            "q": (h, q),
            "k": (h, kv),
            "v": (h, kv),
            "o": (q, h),
            "gate": (h, i),
            "up": (h, i),
            "down": (i, h),
        }
        if not self.gated_mlp:
            del matrices["gate"]
        return matrices

    def forward(self, tokens: int, *, attention_pairs: int | None = None, head_tokens: int | None = None) -> int:
        """Return the FLOPs of a forward pass.

        F = L (2 T sum(in x out) + 4 P q) + 2 H h V, with T tokens, P pairs, H positions with logits.

        Args:
            tokens: input tokens T, padding included.
            attention_pairs: query-key pairs multiplied in one layer, P; None is T squared, one dense row.
            head_tokens: positions whose logits are computed, H; None is all, 0 is a pass without the head.
        """
        tokens, pairs, head_tokens = _work(tokens, attention_pairs, head_tokens)
        return self.forward_cost()(tokens, pairs, head_tokens)

    def forward_cost(self) -> Cost:
        """Return a forward pass's FLOPs as a function of the work."""
        return _forward_cost(self)

    def train(
        self,
        tokens: int,
        *,
        attention_pairs: int | None = None,
        head_tokens: int | None = None,
        trainable: Trainable = "full",
        lora_rank: int = 0,
        lora_targets: Iterable[str] = ("q", "v"),
        frozen_embedding: bool = False,
        input_requires_grad: bool = False,
        checkpointing: bool = False,
        keep_attention: bool = False,
        early_stop: bool = True,
    ) -> int:
        """Return the FLOPs of one forward and backward pass.

        Each product y = x W costs its forward again for the gradient of x where x needs one, and again for
        the gradient of W where W is trained. See :meth:`train_cost` for the options; the first three
        arguments are those of :meth:`forward`.
        """
        tokens, pairs, head_tokens = _work(tokens, attention_pairs, head_tokens)
        cost = self.train_cost(
            trainable=trainable,
            lora_rank=lora_rank,
            lora_targets=lora_targets,
            frozen_embedding=frozen_embedding,
            input_requires_grad=input_requires_grad,
            checkpointing=checkpointing,
            keep_attention=keep_attention,
            early_stop=early_stop,
        )
        return cost(tokens, pairs, head_tokens)

    def model_flops(
        self,
        lengths: Sequence[int],
        *,
        head_tokens: int | None = None,
        trainable: Trainable = "full",
        lora_rank: int = 0,
        lora_targets: Iterable[str] = ("q", "v"),
        frozen_embedding: bool = False,
    ) -> int:
        """Return what the mathematics of one step needs, however it is run: the numerator of model-FLOP utilisation.

        Causal pairs of each sequence alone, and no recomputation. What a run executes (:meth:`train`) is more by the
        masked pairs, the recomputation and the padding; the two belong in separate columns of the ledger.

        Args:
            lengths: tokens of each sequence.
            head_tokens: positions whose logits are needed; None is all.
            trainable, lora_rank, lora_targets, frozen_embedding: as in :meth:`train_cost`.
        """
        return self.train(
            sum(lengths),
            attention_pairs=attention_pairs(lengths, causal=True),
            head_tokens=head_tokens,
            trainable=trainable,
            lora_rank=lora_rank,
            lora_targets=lora_targets,
            frozen_embedding=frozen_embedding,
        )

    def train_cost(
        self,
        *,
        trainable: Trainable = "full",
        lora_rank: int = 0,
        lora_targets: Iterable[str] = ("q", "v"),
        frozen_embedding: bool = False,
        input_requires_grad: bool = False,
        checkpointing: bool = False,
        keep_attention: bool = False,
        early_stop: bool = True,
    ) -> Cost:
        """Return a training step's FLOPs as a function of the work.

        Args:
            trainable: ``"full"`` trains every matrix and norm; ``"lora"`` trains only the adapters.
            lora_rank: rank r of the adapters, used with ``"lora"``; an adapter adds r (in + out)
                multiply-adds a token to its matrix.
            lora_targets: matrices with an adapter, among q, k, v, o, gate, up, down.
            frozen_embedding: the input embedding (and a head tied to it) is not trained.
            input_requires_grad: gradients flow to the embedding's output although nothing there is trained,
                as under transformers' ``enable_input_require_grads``. Otherwise, with LoRA, the first layer's
                products owe no input gradient.
            checkpointing: every layer's forward is run again in the backward.
            keep_attention: but for attention, whose results `pyeff.checkpoint` keeps; used with ``checkpointing``.
            early_stop: recomputation ends once every saved tensor is back, so a layer's last product is not
                repeated (torch's non-reentrant checkpoint); False for the reentrant one, or where dropout
                follows.

        Raises ValueError for an unknown option, and for LoRA without a rank or a target.
        """
        targets = frozenset(lora_targets) if trainable == "lora" else frozenset()
        if trainable not in ("full", "lora"):
            raise ValueError(f"trainable must be 'full' or 'lora', got {trainable!r}")
        if trainable == "lora":
            if isinstance(lora_rank, bool) or not isinstance(lora_rank, int) or lora_rank < 1:
                raise ValueError(f"lora_rank must be a positive integer with trainable='lora', got {lora_rank!r}")
            if not targets or not targets <= set(self.linears):
                raise ValueError(f"lora_targets must name some of {', '.join(self.linears)}, got {sorted(targets)}")
        return _train_cost(
            self,
            trainable == "full",
            lora_rank if targets else 0,
            targets,
            trainable == "full" and not frozen_embedding,
            input_requires_grad,
            checkpointing,
            keep_attention,
            early_stop,
        )


@lru_cache(maxsize=64)
def _forward_cost(shape: TransformerShape) -> Cost:
    return Cost(
        per_token=shape.layers * (sum(2 * n * m for n, m in shape.linears.values()) + _router(shape)),
        per_pair=shape.layers * 4 * shape.query_width,
        per_head_token=2 * shape.hidden_size * shape.vocab_size,
    )


@lru_cache(maxsize=64)
def _train_cost(
    shape: TransformerShape,
    full: bool,
    rank: int,
    targets: frozenset[str],
    embedding_trained: bool,
    input_requires_grad: bool,
    checkpointing: bool,
    keep_attention: bool,
    early_stop: bool,
) -> Cost:
    forward = _forward_cost(shape)
    head_trained = full and (embedding_trained or not shape.tied_embeddings)
    per_token = per_pair = 0
    flows = embedding_trained or input_requires_grad
    for _ in range(shape.layers):
        layer_token, layer_pair, flows = _layer_backward(shape, full, rank, targets, flows)
        per_token += layer_token
        per_pair += layer_pair
    adapters = sum(2 * rank * sum(shape.linears[name]) for name in targets)
    per_token += forward.per_token + shape.layers * adapters
    per_pair += forward.per_pair
    if checkpointing:
        last = 0
        if early_stop:
            width_in, width_out = shape.linears["down"]
            # With an adapter on it, the frozen product is followed by the adapter's two, and the last saved
            # tensor is the second one's input.
            last = 2 * rank * width_out if "down" in targets else 2 * width_in * width_out
        per_token += forward.per_token + shape.layers * (adapters - last)
        per_pair += 0 if keep_attention else forward.per_pair
    per_head_token = forward.per_head_token * (1 + flows + head_trained)
    return Cost(per_token, per_pair, per_head_token)


def _layer_backward(
    shape: TransformerShape, full: bool, rank: int, targets: frozenset[str], flows: bool
) -> tuple[int, int, bool]:
    """Walk one layer: (backward FLOPs per token, per pair, whether its output needs a gradient)."""
    per_token = 0

    def linear(name: str, input_grad: bool) -> bool:
        nonlocal per_token
        width_in, width_out = shape.linears[name]
        per_token += 2 * width_in * width_out * (input_grad + full)
        if name in targets:
            per_token += 2 * rank * width_in * (1 + input_grad)  # A: its weight, and its input where that flows on
            per_token += 2 * rank * width_out * 2  # B: its weight, and its input, which A's gradient needs
        return input_grad or full or name in targets

    # A trained norm before the projections needs their input gradient even where nothing lies below it.
    needs = flows or full
    query, key, value = linear("q", needs), linear("k", needs), linear("v", needs)
    # S = Q K^T owes dQ and dK; O = P V owes dP (on the way to Q or K) and dV.
    per_pair = 2 * shape.query_width * (query + key + (query or key) + value)
    flows = linear("o", query or key or value) or flows
    needs = flows or full
    per_token += _router(shape) * (needs + full)
    if shape.gated_mlp:
        inner = linear("gate", needs) | linear("up", needs)
    else:
        inner = linear("up", needs)
    flows = linear("down", inner) or flows
    return per_token, per_pair, flows


def _router(shape: TransformerShape) -> int:
    return 2 * shape.hidden_size * shape.experts


def _work(tokens: int, pairs: int | None, head_tokens: int | None) -> tuple[int, int, int]:
    pairs = tokens * tokens if pairs is None else pairs
    head_tokens = tokens if head_tokens is None else head_tokens
    for name, value in (("tokens", tokens), ("attention_pairs", pairs), ("head_tokens", head_tokens)):
        if isinstance(value, bool) or value != int(value) or value < 0:
            raise ValueError(f"{name} must be a whole number and not negative, got {value!r}")
    return int(tokens), int(pairs), int(head_tokens)
