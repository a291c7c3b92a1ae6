"""A causal language model small enough for any test: random weights, two layers, one token a byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(*, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with ids 0 to 255 for the bytes, then <bos> and <eos>; any text goes in and comes out again."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = chat_template
    return fast


def tiny_config(**overrides: Any) -> LlamaConfig:
    """Two layers, 32 wide, grouped queries, tied embeddings; 128 positions."""
    options: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
        # The usual 0.02 leaves so narrow a model's attention without effect; 0.2 makes tokens matter.
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**options, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A model of `tiny_config`, always the same for a seed; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**overrides)).eval()


def write_tiny_model(directory: Path, *, chat_template: str | None = None, **overrides: Any) -> Path:
    """Save model and tokenizer so that `load_model(str(directory))` reads them."""
    tiny_model(**overrides).save_pretrained(directory)
    byte_tokenizer(chat_template=chat_template).save_pretrained(directory)
    return directory
