"""A small decoder on bytes of source code, in a pool of which three in ten windows are source code.

The base has read names and tables, not code, and is given: its training is charged to nobody. The anchors, the target
that selectors compare with and the holdout are code from files that the pool does not have, and are disjoint.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyeff.governor import TransformerShape, attention_pairs
from pyeff.observation import observe

from . import text
from .task import Data, Task, cached, stream
from .training import Network, Weights

LENGTH, WIDTH, HEADS, LAYERS, BYTES = 32, 128, 4, 2, 256
SHARES = {"code": 0.3, "names": 0.2, "tables": 0.1, "shuffled": 0.2, "noisy": 0.2}
BASE_STEPS, BASE_BATCH, BASE_RATE = 600, 16, 3e-3
ADAPTED = ("o", "up", "down")
SHAPE = TransformerShape(
    layers=LAYERS,
    hidden_size=WIDTH,
    query_width=WIDTH,
    kv_width=WIDTH,
    intermediate_size=4 * WIDTH,
    gated_mlp=False,
    vocab_size=BYTES,
)


class Adapted(nn.Module):
    """A frozen matrix and a low-rank term: x W^T + x A^T B^T, B zero at first."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = nn.Linear(linear.in_features, rank, bias=False)
        self.b = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.b(self.a(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.o = nn.RMSNorm(WIDTH), _linear(WIDTH, 3 * WIDTH), _linear(WIDTH, WIDTH)
        self.inner, self.up, self.down = nn.RMSNorm(WIDTH), _linear(WIDTH, 4 * WIDTH), _linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(samples, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(samples, length, WIDTH))
        return x + self.down(functional.gelu(self.up(self.inner(x))))


class Decoder(nn.Module):
    """Two layers of width 128 on bytes, 0.46 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(BYTES, WIDTH), nn.Embedding(LENGTH - 1, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), _linear(WIDTH, BYTES)
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.places.weight
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=0.5 / math.sqrt(inputs))
    return linear


class Language(Task):
    """See the module. ``mode``: "full" trains everything, "lora" adapters of rank 8 on o, up and down."""

    name = "code"
    modes = ("full", "lora")
    batch, keep, pool = 8, 0.3, 3072
    rates = {"full": 2e-3, "lora": 1.2e-2}  # noqa: RUF012
    weight_decay = 0.1
    smallest_steps = 80
    anchors, target, held_out = (6, 12, 24, 48), 64, 512
    selectors = ("bytes", "loss", "align")

    def __init__(self, mode: str, cache: Path) -> None:
        super().__init__(mode, cache)
        self.pairs = attention_pairs([LENGTH - 1])
        cost = (
            SHAPE.train_cost()
            if mode == "full"
            else SHAPE.train_cost(trainable="lora", lora_rank=8, lora_targets=ADAPTED)
        )
        self.train_flops = cost(LENGTH - 1, self.pairs, LENGTH - 1)
        self.full_train_flops = SHAPE.train_cost()(LENGTH - 1, self.pairs, LENGTH - 1)
        self.forward_flops = SHAPE.forward(LENGTH - 1, attention_pairs=self.pairs)

    def data(self, seed: int, control: str) -> Data:
        rng = np.random.default_rng(stream(self.name, "data", seed))
        shares = {"code": 1.0} if control == "one-kind" else SHARES
        counts = {name: round(share * self.pool) for name, share in shares.items()}
        counts["code"] += self.pool - sum(counts.values())
        parts = [text.domain(name, count, LENGTH, rng) for name, count in counts.items()]
        kinds = np.repeat(np.arange(len(counts)), list(counts.values()))
        order = rng.permutation(self.pool)
        outside = self.anchors[-1] + self.target + self.held_out
        drawn = torch.from_numpy(text.domain("code", outside, LENGTH, rng, "held out")).long()
        anchors, target, held_out = drawn.split([self.anchors[-1], self.target, self.held_out])
        pool = torch.from_numpy(np.concatenate(parts)[order]).long()
        return Data(pool, anchors, target, held_out, tuple(counts), torch.from_numpy(kinds[order]))

    def network(self, seed: int) -> Network:
        module = Decoder()
        base = Network(module, self.weight_decay)
        vector = cached(self.cache / f"base-{seed}.npy", lambda: self._base(seed, base))
        for p, view in zip(base.trained, base._views(vector), strict=True):
            p.data, p.grad = view.clone(), None
        if self.mode == "full":
            return base
        torch.manual_seed(stream(self.name, "adapters", seed) % 2**31)
        module.requires_grad_(False)
        for layer in module.layers:
            for name in ADAPTED:
                setattr(layer, name, Adapted(getattr(layer, name), 8))
        return Network(module, 0.0)

    def _base(self, seed: int, network: Network) -> Tensor:
        torch.manual_seed(stream(self.name, "base", seed) % 2**31)
        rng = np.random.default_rng(stream(self.name, "base data", seed))
        weights = Weights.fresh(Network(Decoder(), self.weight_decay).flat())
        network.load(weights)
        for step in range(BASE_STEPS):
            parts = [text.domain(name, BASE_BATCH // 2, LENGTH, rng) for name in ("names", "tables")]
            tokens = torch.from_numpy(np.concatenate(parts)).long()
            rate = BASE_RATE * min(1.0, step / 50) * (1 - step / BASE_STEPS)
            weights = network.step(weights, self.losses(network.module, tokens), rate, 0.0)
        return weights.parameters

    def losses(self, module: nn.Module, samples: Tensor) -> Tensor:
        logits = module(samples[:, :-1])
        each = functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten(), reduction="none")
        return each.view(len(samples), -1).mean(1)

    def score_flops(self, selector: str) -> int:
        if selector == "bytes":  # a histogram's product with a vector
            return 2 * BYTES * self.pool
        if selector == "loss":
            return self.forward_flops * (self.pool + self.target)
        return self.train_flops * (self.pool + self.target)

    def scores(self, selector: str, network: Network, vector: Tensor, data: Data) -> Tensor:
        """Higher is nearer to the target [pool]."""
        with network.at(vector) as module:
            if selector == "bytes":
                return _byte_typicality(data.pool, data.target)
            if selector == "loss":
                # Windows about as hard as the target's: tables are easier, noise is harder.
                centre = self.evaluate(module, data.target).median()
                return -(self.evaluate(module, data.pool) - centre).abs()
            reference = self.mean_gradient(module, data.target)
            found = []
            for chunk in data.pool.split(64):
                with observe(module, gradient=False, reference=reference) as seen:
                    self.losses(module, chunk).sum().backward()
                found.append(seen.dots / seen.grad_norms)
            return torch.cat(found)


def _byte_typicality(pool: Tensor, target: Tensor) -> Tensor:
    """How near a window's mean log-likelihood ratio of bytes, target against pool, is to the target's median.

    The windows with the largest ratios are no use: they are mostly blanks.
    """
    counts = [torch.bincount(part.flatten(), minlength=BYTES).double() + 1 for part in (target, pool)]
    ratio = (counts[0] / counts[0].sum()).log() - (counts[1] / counts[1].sum()).log()
    return -(ratio[pool].mean(1) - ratio[target].mean(1).median()).abs().float()
