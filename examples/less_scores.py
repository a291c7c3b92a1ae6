"""LESS from end to end on a toy: warm up adapters, keep two states with AdamW's moments, score a pool, choose from it.

    python examples/less_scores.py

A model of two layers learns copying and reversing; the target is reversing. Of 96 samples a third are reversed words,
of the 16 that LESS ranks first half: so short a warm-up tells the two apart, but not well. Takes seconds; with a real
model the warm-up is a run of `pyeff run` with `lora`, and the same scoring is `pyeff score` with `method: less`.
"""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import pyeff
from pyeff.data import EncodedSample, EncodedSamples, Sample, label_positions, pack_one
from pyeff.scoring import LESS, TrainingState
from pyeff.scoring.language_model import answer_logits
from pyeff.selection import top_k

VOCABULARY, WORD = 34, 4


def words(count: int, seed: int, kinds: tuple[str, ...]) -> EncodedSamples:
    """Prompts `kind word` whose answer is the word copied or reversed."""
    generator = torch.Generator().manual_seed(seed)
    samples, encoded = [], []
    for place in range(count):
        kind = kinds[place % len(kinds)]
        word = torch.randint(2, VOCABULARY, (WORD,), generator=generator).tolist()
        answer = word[::-1] if kind == "reverse" else word
        samples.append(Sample(f"{kind}-{seed}-{place}", str(word), str(answer), kind))
        encoded.append(EncodedSample([int(kind == "reverse"), *word, *answer], 1 + WORD, place))
    return EncodedSamples(samples, encoded)


def adapted() -> nn.Module:
    """A random Llama of two layers with adapters on every linear layer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
            initializer_range=0.2,
        )
    )
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, samples: list[EncodedSample]) -> None:
    """One step on the mean loss of the samples' answer tokens."""
    batch = pack_one(samples)
    where = label_positions(batch)
    optimizer.zero_grad()
    nn.functional.cross_entropy(answer_logits(model, batch, where), where.targets).backward()
    optimizer.step()


def main() -> None:
    """Warm up, score, choose, and say what was chosen and what it cost."""
    pool = words(96, seed=1, kinds=("copy", "reverse", "copy"))
    targets = words(8, seed=2, kinds=("reverse",))
    model = adapted()
    rate = 5e-3
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    warm_up = words(64, seed=3, kinds=("copy", "reverse"))
    states = []
    for epoch in range(1, 13):
        for first in range(0, len(warm_up), 16):
            step(model, adamw, list(warm_up)[first : first + 16])
        if epoch % 6:
            continue
        # Copied together: the optimizer's moments stay those of the copied parameters.
        states.append(TrainingState(f"epoch-{epoch}", rate, partial(copy.deepcopy, copy.deepcopy((model, adamw)))))
    scores = LESS(targets, sketch=pyeff.Sketch(1024)).score(states, pool, batch_tokens=128, progress=False)
    chosen = top_k(scores.values, 16)
    reverse = np.array([sample.source == "reverse" for sample in pool.samples])
    print(scores.method)
    print(f"{reverse.mean():.0%} of the pool reverse, and {reverse[chosen].mean():.0%} of the 16 best")
    print(f"{scores.flops / 1e9:.2f} GFLOP, {scores.seconds:.1f} s")


if __name__ == "__main__":
    main()
