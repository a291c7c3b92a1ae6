"""What the planner needs to know of a model: sizes, parameters by layer, and what its layers are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyeff.errors import UserError
from pyeff.governor.flops import TransformerShape

if TYPE_CHECKING:
    from torch import nn

Family = Literal["llama", "gpt2"]

# model_type -> how a layer computes. Each is checked against what torch saves (tests/memory/test_activations.py).
FAMILIES: dict[str, Family] = {"llama": "llama", "mistral": "llama", "qwen2": "llama", "gpt2": "gpt2"}

# The matrices of a layer by the names that modules have in transformers.
LINEARS = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "c_attn": ("q", "k", "v"),
    "c_fc": ("up",),
    "c_proj": ("o", "down"),
}


@dataclass(frozen=True)
class Parameter:
    """A parameter tensor: where it belongs, its shape, bytes per element, and whether it is trained."""

    name: str
    layer: str
    shape: tuple[int, ...]
    itemsize: int
    trained: bool

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter."""
        return self.elements * self.itemsize


@dataclass(frozen=True)
class Adapters:
    """LoRA: rank, the modules that carry one (by the last part of their name), dropout, bytes per element."""

    rank: int
    modules: frozenset[str]
    dropout: float = 0.0
    itemsize: int = 4


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer of a family whose layers the planner knows tensor by tensor."""

    name: str
    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    activation: str
    tied: bool
    positions: int
    biases: Mapping[str, bool] = field(default_factory=dict)
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    eager: bool = False

    @property
    def shape(self) -> TransformerShape:
        """The matrix products, for their FLOPs."""
        return TransformerShape(
            layers=self.layers,
            hidden_size=self.hidden,
            query_width=self.heads * self.head_dim,
            kv_width=self.kv_heads * self.head_dim,
            intermediate_size=self.intermediate,
            gated_mlp=self.family == "llama",
            vocab_size=self.vocab,
            tied_embeddings=self.tied,
        )


def architecture_of(config: Any) -> Architecture | None:
    """Read a transformers configuration; None where the family is not one the planner knows tensor by tensor."""
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None:
        return None
    if family == "llama" and not _plain_llama(config):
        return None
    if family == "gpt2" and (config.add_cross_attention or config.reorder_and_upcast_attn):
        return None
    heads = int(config.num_attention_heads)
    qwen = config.model_type == "qwen2"
    attention_bias = qwen or bool(getattr(config, "attention_bias", False))
    common: dict[str, Any] = {
        "name": str(config.model_type),
        "family": family,
        "layers": int(config.num_hidden_layers),
        "hidden": int(config.hidden_size),
        "heads": heads,
        "vocab": int(config.vocab_size),
        "tied": bool(config.tie_word_embeddings),
        "positions": int(config.max_position_embeddings),
        "eager": getattr(config, "_attn_implementation", None) == "eager",
    }
    if family == "gpt2":
        return Architecture(
            **common,
            kv_heads=heads,
            head_dim=config.hidden_size // heads,
            intermediate=int(config.n_inner or 4 * config.hidden_size),
            activation=str(config.activation_function),
            biases=dict.fromkeys(("q", "k", "v", "o", "up", "down"), True),
            attention_dropout=float(config.attn_pdrop),
            residual_dropout=float(config.resid_pdrop),
            embedding_dropout=float(config.embd_pdrop),
        )
    mlp_bias = bool(getattr(config, "mlp_bias", False))
    return Architecture(
        **common,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        intermediate=int(config.intermediate_size),
        activation=str(config.hidden_act),
        biases={
            **dict.fromkeys(("q", "k", "v"), attention_bias),
            "o": attention_bias and not qwen,
            **dict.fromkeys(("gate", "up", "down"), mlp_bias),
        },
        attention_dropout=float(getattr(config, "attention_dropout", 0.0) or 0.0),
    )


def _plain_llama(config: Any) -> bool:
    # A sliding window brings a mask of its own, and other kernels with it.
    window = getattr(config, "sliding_window", None)
    return not (window is not None and getattr(config, "use_sliding_window", True))


def read_config(source: str | Path) -> Any:
    """The transformers configuration of a model directory, a config.json, a GGUF file, or a name on the hub.

    Raises `UserError` where there is none to read.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise UserError("planning for a named model needs transformers: pip install 'pyeff[run]'") from error
    path = Path(source).expanduser()
    if not path.exists() and (str(source).startswith((".", "~", "/")) or str(source).count("/") > 1):
        raise UserError(f"there is no model directory or configuration {source}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{source} holds no config.json")
    try:
        if path.suffix == ".gguf" and path.is_file():
            return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoConfig.from_pretrained(str(path) if path.exists() else str(source), trust_remote_code=False)
    except Exception as error:  # transformers, the hub and json each raise their own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the configuration of {source} cannot be read: {first}") from error


def empty_model(config: Any, dtype: Any) -> nn.Module:
    """The model of a configuration on the meta device: every shape, no memory.

    Raises `UserError` where transformers has no causal language model for it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        name = getattr(config, "model_type", type(config).__name__)
        raise UserError(f"no causal language model can be made of this {name!r} configuration: {first}") from error
    return model.train()


_LAYER = re.compile(r"^(.*?\b(?:layers|h|blocks|block|layer)\.(\d+))\.")


def layer_of(name: str) -> str:
    """The layer a parameter belongs to, from its name.

    >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight"), layer_of("model.embed_tokens.weight")
    ('layer 3', 'head', 'embedding')
    """
    found = _LAYER.match(name)
    if found:
        return f"layer {int(found.group(2))}"
    if any(part in name for part in ("lm_head", "embed_out", "ln_f", "final_layer_norm")) or ".norm." in f".{name}":
        return "head"
    if "embed" in name or "wte" in name or "wpe" in name:
        return "embedding"
    return "other"


def parameters_of(model: nn.Module) -> list[Parameter]:
    """Every parameter once; a tied matrix belongs to the embedding."""
    return [
        Parameter(name, layer_of(name), tuple(p.shape), p.element_size(), p.requires_grad)
        for name, p in model.named_parameters()
    ]


def with_adapters(model: nn.Module, parameters: Iterable[Parameter], adapters: Adapters) -> list[Parameter]:
    """The parameters of the model under LoRA: all frozen, two matrices beside each named linear layer.

    Raises ValueError when no linear layer has one of the names.
    """
    frozen = [Parameter(p.name, p.layer, p.shape, p.itemsize, False) for p in parameters]
    added = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.rsplit(".", 1)[-1] not in adapters.modules or weight is None or weight.ndim != 2:
            continue
        size_in, size_out = linear_sizes(module)
        layer = layer_of(f"{name}.weight")
        for part, shape in (("lora_A", (adapters.rank, size_in)), ("lora_B", (size_out, adapters.rank))):
            added.append(Parameter(f"{name}.{part}.weight", layer, shape, adapters.itemsize, True))
    if not added:
        raise ValueError(f"lora_targets: no linear layer is called {' or '.join(sorted(adapters.modules))}")
    return frozen + added


def linear_sizes(module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, or of GPT-2's transposed one."""
    rows, columns = module.weight.shape
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)
