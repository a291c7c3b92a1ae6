"""How well sketched LESS scores agree with those by whole gradients as the sketch grows, on SmolLM2 with adapters.

    python benchmarks/influence_agreement.py OUT          # resumable: kill it at any moment and start it again
    python benchmarks/influence_agreement.py OUT --table  # the table of what is there

Pool and targets are reasoning-gym questions. Adapters are warmed up for a few steps of AdamW on samples outside the
pool; then, at that state, AdamW's step of every pool sample and the gradient of every target are formed one at a time
and kept whole (float32: 4 bytes a trained parameter and sample), and sketched to every dimension by three seeds. Scores
are LESS's, with one state. Agreement is the part of the exact top 10 % that the sketched top 10 % holds, and Spearman's
correlation of all scores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor, nn

import pyeff
from pyeff._files import write_text_atomic
from pyeff.data import (
    EncodedSample,
    EncodedSamples,
    ReasoningGymSource,
    encode,
    label_positions,
    load_samples,
    pack_one,
)
from pyeff.scoring.language_model import answer_logits
from pyeff.train.build import own_memory, with_lora
from pyeff.train.config import LoRAConfig
from pyeff.train.model import load_model

DIMS = (256, 512, 1024, 2048, 4096, 8192, 16384)
SEEDS = (0, 1, 2)
TASKS = ["count_bits", "chain_sum", "spell_backward", "count_primes", "lcm", "letter_counting", "simple_equations"]


def questions(seed: int, count: int, tokenizer: Any, tasks: list[str], *, longest: int) -> EncodedSamples:
    """Encoded questions of these tasks, none longer than ``longest`` tokens."""
    source = ReasoningGymSource(seed=seed, size=count, tasks=tasks, max_characters=120)
    return encode(load_samples([source]), tokenizer, max_tokens=longest, drop_long=True)


def backward(model: nn.Module, samples: list[EncodedSample]) -> None:
    """The gradient of the mean loss of the samples' answer tokens."""
    model.zero_grad(set_to_none=True)
    batch = pack_one(samples)
    where = label_positions(batch)
    nn.functional.cross_entropy(answer_logits(model, batch, where), where.targets).backward()


class Experiment:
    """The model after its warm-up, the samples, and one file for each sample's vector."""

    def __init__(self, out: Path, *, pool: int, rank: int, steps: int) -> None:
        settings = {"pool": pool, "rank": rank, "steps": steps, "format": 1}
        out.mkdir(parents=True, exist_ok=True)
        known = out / "settings.json"
        if known.exists() and json.loads(known.read_text()) != settings:
            raise SystemExit(f"{out} holds an experiment of other settings: choose another directory")
        write_text_atomic(known, json.dumps(settings))
        loaded = load_model("smollm2", notify=print)
        self.out = out
        self.pool = questions(11, pool, loaded.tokenizer, TASKS, longest=72)
        self.targets = questions(12, 16, loaded.tokenizer, TASKS[:2], longest=72)
        adapters = LoRAConfig(rank=rank, alpha=2.0 * rank, target_modules=["q_proj", "v_proj"])
        self.model = with_lora(own_memory(loaded.model), adapters, seed=0)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.adamw = torch.optim.AdamW(self.trained.values(), lr=1e-3)
        self._warm_up(questions(13, 4 * steps, loaded.tokenizer, TASKS, longest=72), steps)
        self.directions = pyeff.optimizer_directions(self.model, self.adamw)

    def _warm_up(self, samples: EncodedSamples, steps: int) -> None:
        file = self.out / "state.safetensors"
        if not file.exists():
            for first in range(0, 4 * steps, 4):
                backward(self.model, list(samples)[first : first + 4])
                self.adamw.step()
            self._save(file, {f"{k}|{n}": v for n, p in self.trained.items() for k, v in self._state(p).items()})
        stored = load_file(file)
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(stored[f"weight|{name}"])
                moments = {k: stored[f"{k}|{name}"] for k in ("exp_avg", "exp_avg_sq")}
                self.adamw.state[p] = {"step": torch.tensor(float(steps)), **moments}

    def _state(self, p: nn.Parameter) -> dict[str, Tensor]:
        own = self.adamw.state[p]
        return {"weight": p.detach(), "exp_avg": own["exp_avg"], "exp_avg_sq": own["exp_avg_sq"]}

    def _save(self, file: Path, tensors: dict[str, Tensor]) -> None:
        partial = file.with_suffix(".partial")
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial)
        partial.replace(file)

    def vectors(self, name: str) -> list[Path]:
        """A file for each sample: AdamW's step for the pool's, the gradient for the targets'; made where missing."""
        files = []
        samples = self.pool if name == "pool" else self.targets
        for place, sample in enumerate(samples):
            file = self.out / f"{name}-{place:05d}.safetensors"
            files.append(file)
            if file.exists():
                continue
            backward(self.model, [sample])
            found = {n: p.grad for n, p in self.trained.items() if p.grad is not None}
            if name == "pool":
                found = {n: self.directions[n](g) for n, g in found.items()}
            self._save(file, found)
        return files

    def scores(self, pool: list[Path], targets: list[Path], sketch: pyeff.Sketch | None) -> np.ndarray:
        """Mean cosine of each pool vector with the targets', whole or sketched."""

        def row(file: Path) -> Tensor:
            tensors = load_file(file)
            if sketch is not None:
                return sketch(tensors)
            return torch.cat([tensors[name].flatten() for name in sorted(tensors)])

        goals = nn.functional.normalize(torch.stack([row(file) for file in targets]), dim=1)
        return np.array([float((goals @ nn.functional.normalize(row(file), dim=0)).mean()) for file in pool])

    def run(self) -> None:
        """Make what is missing, one dimension and seed at a time."""
        pool, targets = self.vectors("pool"), self.vectors("targets")
        exact = self.out / "exact.json"
        if not exact.exists():
            write_text_atomic(exact, json.dumps(self.scores(pool, targets, None).tolist()))
        truth = np.array(json.loads(exact.read_text()))
        best = set(np.argsort(-truth, kind="stable")[: max(1, len(truth) // 10)].tolist())
        for dim in DIMS:
            for seed in SEEDS:
                cell = self.out / f"cell-{dim}-{seed}.json"
                if cell.exists():
                    continue
                found = self.scores(pool, targets, pyeff.Sketch(dim, seed=seed))
                top = set(np.argsort(-found, kind="stable")[: len(best)].tolist())
                result = {
                    "dim": dim,
                    "seed": seed,
                    "samples": len(truth),
                    "parameters": sum(p.numel() for p in self.trained.values()),
                    "overlap": len(best & top) / len(best),
                    "spearman": float(spearmanr(truth, found)[0]),
                }
                write_text_atomic(cell, json.dumps(result))
                print(result, flush=True)


def table(out: Path) -> str:
    """The mean and range over seeds of every dimension that is there, in Markdown."""
    cells = [json.loads(file.read_text()) for file in sorted(out.glob("cell-*.json"))]
    lines = ["| dim | top-10 % overlap | Spearman | seeds |", "|---|---|---|---|"]
    for dim in sorted({cell["dim"] for cell in cells}):
        own = [cell for cell in cells if cell["dim"] == dim]

        def shown(key: str, own: list[dict[str, Any]] = own) -> str:
            values = [cell[key] for cell in own]
            return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

        lines.append(f"| {dim} | {shown('overlap')} | {shown('spearman')} | {len(own)} |")
    return "\n".join(lines)


def main() -> None:
    """Run or show the experiment."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--pool", type=int, default=200, help="samples")
    parser.add_argument("--rank", type=int, default=4, help="of the adapters")
    parser.add_argument("--steps", type=int, default=12, help="of the warm-up")
    options = parser.parse_args()
    if not options.table:
        Experiment(options.out, pool=options.pool, rank=options.rank, steps=options.steps).run()
    print(table(options.out))


if __name__ == "__main__":
    main()
