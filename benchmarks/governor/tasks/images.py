"""A small network on Fashion-MNIST, labelled by four sources, from careful to careless.

Anchors, the target that selectors compare with and the holdout have right labels and are disjoint test images. Needs
the data set's files (`apt-get install dataset-fashion-mnist`, see examples/data_diet.py).
"""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyeff.observation import observe

from .task import Data, Task, stream
from .training import Network

CLASSES, SIDE, WIDTHS = 10, 14, (196, 128, 64, 10)
# Share of wrong labels of each source; a quarter of the pool comes from each.
WRONG = {"expert": 0.0, "crowd": 0.2, "rushed": 0.5, "machine": 0.8}


@functools.lru_cache(maxsize=1)
def images() -> dict[str, tuple[Tensor, Tensor]]:
    """Images halved to 14 x 14, fp32 [N, 196], and classes, by part."""
    examples = str(Path(__file__).resolve().parents[3] / "examples")
    if examples not in sys.path:
        sys.path.append(examples)
    import data_diet

    found = {}
    for part in ("train", "t10k"):
        read = data_diet.read_images(data_diet.DATA, part)
        found[part] = (functional.avg_pool2d(read.pixels, 2).flatten(1), read.labels)
    return found


class Images(Task):
    """See the module: 196-128-64-10, 34 thousand parameters, from scratch."""

    name = "images"
    modes = ("full",)
    batch, keep, pool = 32, 0.65, 8000
    rates = {"full": 4e-3}  # noqa: RUF012
    weight_decay = 0.01
    smallest_steps = 400
    anchors, target, held_out = (16, 32, 64, 128), 256, 4000
    selectors = ("centroid", "el2n", "grand")

    def __init__(self, mode: str, cache: Path) -> None:
        super().__init__(mode, cache)
        self.forward_flops = 2 * sum(a * b for a, b in itertools.pairwise(WIDTHS))
        # Nothing below the first layer needs a gradient.
        self.full_train_flops = self.train_flops = 3 * self.forward_flops - 2 * WIDTHS[0] * WIDTHS[1]

    def data(self, seed: int, control: str) -> Data:
        rng = np.random.default_rng(stream(self.name, "data", seed))
        x, y = images()["train"]
        drawn = torch.from_numpy(rng.permutation(len(x))[: self.pool].copy())
        wrong = {"expert": 0.0} if control == "one-kind" else WRONG
        source = torch.from_numpy(rng.permutation(np.arange(self.pool) % len(wrong)))
        labels = y[drawn].clone()
        spoilt = torch.from_numpy(rng.random(self.pool)) < torch.tensor(list(wrong.values()))[source]
        shift = torch.from_numpy(rng.integers(1, CLASSES, self.pool))
        labels[spoilt] = (labels[spoilt] + shift[spoilt]) % CLASSES
        tx, ty = images()["t10k"]
        outside = torch.from_numpy(rng.permutation(len(tx)).copy())
        ends = np.cumsum([0, self.anchors[-1], self.target, self.held_out])
        rows = [_rows(tx[outside[a:b]], ty[outside[a:b]]) for a, b in itertools.pairwise(ends)]
        return Data(_rows(x[drawn], labels), *rows, tuple(wrong), source)

    def network(self, seed: int) -> Network:
        torch.manual_seed(stream(self.name, "weights", seed) % 2**31)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(WIDTHS):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return Network(nn.Sequential(*layers[:-1]), self.weight_decay)

    def losses(self, module: nn.Module, samples: Tensor) -> Tensor:
        return functional.cross_entropy(module(samples[:, :-1]), samples[:, -1].long(), reduction="none")

    def score_flops(self, selector: str) -> int:
        if selector == "centroid":  # a distance to the mean image of the sample's class
            return 3 * WIDTHS[0] * (self.pool + self.target)
        per_sample = self.forward_flops if selector == "el2n" else self.train_flops
        return per_sample * self.pool

    def scores(self, selector: str, network: Network, vector: Tensor, data: Data) -> Tensor:
        """Higher is more likely labelled right [pool]: what the network or the target's mean images agree with."""
        x, y = data.pool[:, :-1], data.pool[:, -1].long()
        with network.at(vector) as module:
            if selector == "centroid":
                tx, ty = data.target[:, :-1], data.target[:, -1].long()
                means = torch.stack([tx[ty == c].mean(0) if (ty == c).any() else tx.mean(0) for c in range(CLASSES)])
                return -(x - means[y]).square().sum(1)
            if selector == "el2n":
                with torch.no_grad():
                    errors = module(x).softmax(1) - functional.one_hot(y, CLASSES)
                return -errors.norm(dim=1)
            norms: list[Any] = []
            for chunk in data.pool.split(500):
                with observe(module, gradient=False) as seen:
                    self.losses(module, chunk).sum().backward()
                norms.append(seen.grad_norms)
            return -torch.cat(norms)


def _rows(x: Tensor, y: Tensor) -> Tensor:
    """Images with their class as a last column."""
    return torch.cat([x, y[:, None].to(x.dtype)], dim=1)
