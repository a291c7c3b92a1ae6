"""Does training end where it would with 32-bit states? 20,000 steps of a small GPT under each optimizer, three seeds.

    OMP_NUM_THREADS=1 python benchmarks/long_run.py            # runs what is missing; two at a time share the work
    OMP_NUM_THREADS=1 python benchmarks/long_run.py --arms pyeff-fp32 --seeds 0
    python benchmarks/long_run.py --report                     # table and figure of what there is

A byte-level GPT (2 layers of width 64, 136 thousand parameters) reads the sources of Python's standard library; every
twentieth file is kept for validation. A *cell* is an optimizer and a seed. The seed draws the initial weights and the
order of the data, so that cells of one seed differ in the optimizer alone; arms with bf16 weights start from the same
weights rounded. Activations are fp32 everywhere: bf16 weights are converted in each forward pass, and their gradients
are rounded to bf16. A finished cell is a small JSON file in benchmarks/results/long_run; a cell that is killed goes on
from its last checkpoint (a minute or two), with the bits it would have had. bitsandbytes and torchao are optional:
their cells are left out, and named, where the library cannot be imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from long_run_model import GPT, Settings, Text, loss_of, standard_library, validation_loss, windows_at
from torch import Tensor

from pyeff._files import write_atomic, write_text_atomic
from pyeff.optim import AdamW8bit
from pyeff.train.checkpoint import join_tensors, split_tensors

RESULTS = Path(__file__).parent / "results" / "long_run"
CHECKPOINTS = Path(tempfile.gettempdir()) / "pyeff-long-run"
SEEDS = (0, 1, 2)


# ------------------------------------------------------------------------------------------------------ the optimizers


@dataclass(frozen=True)
class Arm:
    """An optimizer and the precision of the weights it is given."""

    name: str
    label: str
    build: Callable[..., torch.optim.Optimizer]
    weights: torch.dtype = torch.float32
    package: str = "torch"


def ours(**options: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda params, **common: AdamW8bit(params, **options, **common)


def bitsandbytes(params: Any, **common: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit as Peer

    return Peer(params, **common)


def torchao(params: Any, **common: Any) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit as Peer

    return Peer(params, bf16_stochastic_round=True, **common)


def without_decay(params: Any, **common: Any) -> torch.optim.Optimizer:
    """What an optimizer is that loses its decay to rounding."""
    return torch.optim.AdamW(params, **common | {"weight_decay": 0.0})


BF16 = torch.bfloat16
ARMS = [
    Arm("torch", "torch AdamW", torch.optim.AdamW),
    Arm("pyeff-states-fp32", "pyeff, fp32 states", ours(states="fp32")),
    Arm("pyeff-fp32", "pyeff AdamW8bit", ours()),
    Arm("pyeff-bf16-stochastic", "pyeff AdamW8bit, stochastic", ours(master="stochastic"), BF16),
    Arm("pyeff-bf16-ecc8", "pyeff AdamW8bit, ecc8", ours(master="ecc8"), BF16),
    Arm("pyeff-bf16-fp32", "pyeff AdamW8bit, fp32 master", ours(master="fp32"), BF16),
    Arm("pyeff-bf16-none", "pyeff AdamW8bit, none", ours(master="none"), BF16),
    Arm("torch-no-decay", "torch AdamW, no weight decay", without_decay),
    Arm("torch-bf16", "torch AdamW (bf16 states)", torch.optim.AdamW, BF16),
    Arm("bitsandbytes-fp32", "bitsandbytes AdamW8bit", bitsandbytes, package="bitsandbytes"),
    Arm("bitsandbytes-bf16", "bitsandbytes AdamW8bit", bitsandbytes, BF16, package="bitsandbytes"),
    Arm("torchao-fp32", "torchao AdamW8bit", torchao, package="torchao"),
    Arm("torchao-bf16", "torchao AdamW8bit, stochastic", torchao, BF16, package="torchao"),
]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao: another number would compile another step
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def lr_at(step: int, settings: Settings) -> float:
    """Linear up, half a cosine down."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.lr * (settings.last_lr + (1 - settings.last_lr) * (1 + math.cos(math.pi * done)) / 2)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of everything kept per block or element; the tables of 256 levels that peers share are left out."""
    total = 0
    for state in optimizer.state.values():
        for name, value in state.items():
            parts = [value.codes, value.scale] if hasattr(value, "codes") else [value]
            kept = [part for part in parts if isinstance(part, Tensor) and part.numel() > 1]
            total += sum(part.numel() * part.element_size() for part in kept if not name.startswith("qmap"))
    return total


# ---------------------------------------------------------------------------------------------------- a cell's state


def flattened(tree: Any) -> Any:
    """torchao's quantised tensors as their parts, so that a file holds plain tensors."""
    if hasattr(tree, "__tensor_flatten__"):
        names, (signed, dtype) = tree.__tensor_flatten__()
        return {"quantised": {n: getattr(tree, n) for n in names}, "signed": signed, "dtype": str(dtype)}
    if isinstance(tree, dict):
        return {key: flattened(value) for key, value in tree.items()}
    return [flattened(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def unflattened(tree: Any) -> Any:
    """The inverse of `flattened` (tuples come back as lists)."""
    if isinstance(tree, dict) and "quantised" in tree:
        from torchao.optim.subclass_8bit import OptimState8bit

        dtype = getattr(torch, tree["dtype"].removeprefix("torch."))
        return OptimState8bit.__tensor_unflatten__(tree["quantised"], (tree["signed"], dtype))
    if isinstance(tree, dict):
        return {key: unflattened(value) for key, value in tree.items()}
    return [unflattened(value) for value in tree] if isinstance(tree, list) else tree


def save_tree(path: Path, tree: dict[str, Any]) -> None:
    """Tensors and plain values in one safetensors file."""
    from safetensors.torch import save

    plain, tensors = split_tensors(flattened(tree))
    data = save({name: t.clone() for name, t in tensors.items()}, {"tree": json.dumps(plain)})
    write_atomic(path, lambda file: file.write(data))


def load_tree(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
        plain = json.loads(file.metadata()["tree"])
    tree: dict[str, Any] = unflattened(join_tensors(plain, tensors))
    return tree


class Cell:
    """One optimizer on one seed, from its start or its last checkpoint."""

    def __init__(self, arm: Arm, seed: int, text: Text, settings: Settings, checkpoint: Path) -> None:
        self.arm, self.seed, self.text, self.settings, self.checkpoint = arm, seed, text, settings, checkpoint
        self.identity = {"settings": asdict(settings), "text": text.digest, "arm": arm.name, "seed": seed}
        torch.manual_seed(seed)
        self.model = GPT(settings).to(arm.weights)
        decay = settings.weight_decay
        self.optimizer = arm.build(self.model.parameters(), lr=settings.lr, weight_decay=decay)
        last = len(text.train) - settings.context - 1
        order = torch.Generator().manual_seed(1000 + seed)
        self.starts = torch.randint(last, (settings.steps, settings.batch), generator=order)
        self.done, self.seconds = 0, 0.0
        self.curve: list[list[float]] = []
        if checkpoint.exists():
            self.resume()

    def save(self) -> None:
        tree = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),  # torchao rounds by it
            "done": self.done,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        save_tree(self.checkpoint, tree)

    def resume(self) -> None:
        tree = load_tree(self.checkpoint)
        if tree["identity"] != self.identity:
            raise SystemExit(f"{self.checkpoint} is of other settings or another Python's library: remove it")
        self.model.load_state_dict(tree["model"])
        self.optimizer.load_state_dict(tree["optimizer"])
        torch.set_rng_state(tree["random"])
        self.done, self.seconds, self.curve = tree["done"], tree["seconds"], tree["curve"]

    def run(self, until: int, *, save_every: float = 120.0) -> None:
        """Go on to this many steps, with a checkpoint every `save_every` seconds."""
        settings = self.settings
        mark = saved = time.monotonic()
        for step in range(self.done, until):
            set_lr(self.optimizer, lr_at(step, settings))
            loss = loss_of(self.model, windows_at(self.text.train, self.starts[step], settings.context))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.done = step + 1
            if self.done % settings.evaluate_every == 0:
                windows = settings.windows * (16 if self.done == settings.steps else 1)
                self.curve.append([self.done, validation_loss(self.model, self.text, settings, windows)])
            now = time.monotonic()
            self.seconds, mark = self.seconds + now - mark, now
            if now - saved > save_every:
                self.save()
                saved = now

    def result(self) -> dict[str, Any]:
        weights = torch.cat([p.detach().flatten() for p in self.model.parameters() if p.ndim > 1]).double()
        parameters = sum(p.numel() for p in self.model.parameters())
        return self.identity | {
            "weights": str(self.arm.weights).removeprefix("torch."),
            "curve": [[step, round(loss, 6)] for step, loss in self.curve],
            "validation_loss": self.curve[-1][1],
            "weight_rms": weights.square().mean().sqrt().item(),  # shows where decay was lost
            "largest_weight": weights.abs().max().item(),  # and this where a step was thrown far
            "parameters": parameters,
            "state_bytes_per_parameter": state_bytes(self.optimizer) / parameters,
            "seconds": round(self.seconds),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }


# ------------------------------------------------------------------------------------------------------ what is left


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may run the cell; the kernel frees the lock of a process that dies."""
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def run_missing(arms: list[Arm], seeds: list[int], results: Path, checkpoints: Path) -> None:
    """All arms of the first seed, then of the next."""
    settings, text = Settings(), standard_library()
    for folder in (results, checkpoints):
        folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for arm in arms:
            name = f"{arm.name}-{seed}"
            result, checkpoint = results / f"{name}.json", checkpoints / f"{name}.safetensors"
            if importlib.util.find_spec(arm.package) is None:
                print(f"{name}: {arm.package} is not installed", flush=True)
                continue
            with claimed(checkpoints / f"{name}.lock") as mine:
                if not mine or result.exists():
                    continue
                cell = Cell(arm, seed, text, settings, checkpoint)
                print(f"{name}: from step {cell.done}", flush=True)
                cell.run(settings.steps)
                write_text_atomic(result, json.dumps(cell.result()) + "\n")
                checkpoint.unlink(missing_ok=True)
                print(f"{name}: {cell.curve[-1][1]:.4f} after {cell.seconds:.0f} s", flush=True)


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--report", action="store_true", help="write docs/images/long_run.png and print the table")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    options = parser.parse_args()
    if options.report:
        from long_run_report import report

        report(options.results)
        return
    arms = [arm for arm in ARMS if not options.arms or arm.name in options.arms]
    run_missing(arms, options.seeds, options.results, options.checkpoints)


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # torchao compiles its step
    torch.set_num_threads(1)
    main()
