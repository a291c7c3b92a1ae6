"""The small GPT of `long_run.py`, and the text it reads."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


@dataclass(frozen=True)
class Settings:
    """What all cells share; cells of other settings or another text are not mixed."""

    steps: int = 20_000
    batch: int = 4
    context: int = 64
    width: int = 64
    heads: int = 2
    layers: int = 2
    lr: float = 3e-3
    """Reached after `warmup` steps, then a half cosine down to `last_lr` of it."""
    warmup: int = 500
    last_lr: float = 0.05
    weight_decay: float = 0.1
    evaluate_every: int = 500
    windows: int = 256
    """Of the validation text in a point of the curve; the last one has sixteen times as many."""


# -------------------------------------------------------------------------------------------------------- the model


class Block(nn.Module):
    """Attention and MLP behind norms."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Logits of the next byte. All matrices have 4,096 elements or more, from where peers use 8 bits."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.token, self.place = nn.Embedding(BYTES, width), nn.Embedding(settings.context, width)
        self.blocks = nn.Sequential(*[Block(width, settings.heads) for _ in range(settings.layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES, bias=False)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                depth = (2 * settings.layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(p, std=0.02 * depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(x) + self.place.weight)))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross entropy of the bytes of [n, context + 1] windows, computed in fp32 whatever the weights are."""
    weights = {name: p.float() for name, p in model.named_parameters()}
    logits = torch.func.functional_call(model, weights, (windows[:, :-1],))
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


# --------------------------------------------------------------------------------------------------------- the text


@dataclass(frozen=True)
class Text:
    """Bytes to train on and to validate by, and what identifies them."""

    train: Tensor
    validation: Tensor
    digest: str


def standard_library() -> Text:
    """All modules that come with this Python, in order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f.read_bytes() for f in sorted(root.rglob("*.py")) if "site-packages" not in f.parts]
    train = b"".join(data for i, data in enumerate(files) if i % 20)
    validation = b"".join(files[::20])
    tensors = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, validation)]
    return Text(*tensors, hashlib.sha256(train + validation).hexdigest()[:16])


def windows_at(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """[n, context + 1] bytes from each start."""
    return text[starts[:, None] + torch.arange(context + 1)].long()


@torch.no_grad()
def validation_loss(model: nn.Module, text: Text, settings: Settings, windows: int) -> float:
    """Of windows spread evenly over the validation text, the same for everybody."""
    starts = torch.linspace(0, len(text.validation) - settings.context - 1, windows, dtype=torch.float64).long()
    parts = [windows_at(text.validation, part, settings.context) for part in starts.split(64)]
    return sum(loss_of(model, part).item() * len(part) for part in parts) / windows
