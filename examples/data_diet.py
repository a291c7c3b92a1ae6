"""Data Diet (Paul et al. 2021, arXiv:2107.07075) on Fashion-MNIST: is the half with the largest scores worth the whole?

    python examples/data_diet.py                    # train what is missing below --out, then write its results.json
    python examples/data_diet.py --label-noise 0.1  # the same and a second experiment, with wrong labels
    python examples/data_diet.py --report           # show examples/results/data_diet.json in docs/data_diet.md
    python examples/data_diet.py --report --check   # fail if the page does not show what the file holds

A small CNN is trained on all images, on a random half, and on the half with the largest EL2N after an early epoch or
the largest GraNd at initialisation; for equal epochs, and for equal total FLOPs, where the training of the networks
that score and their passes are charged to the arm that uses them. Every training leaves a file, so a stopped run goes
on where it was.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_diet_report import REGIMES, Report, report, write_atomically
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyeff.errors import UserError
from pyeff.scoring import EL2N, GraNd, average, read_scores
from pyeff.selection import top_k

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "data_diet.md"
FIGURE = ROOT / "docs" / "images" / "data_diet.png"
RESULTS = ROOT / "examples" / "results" / "data_diet.json"

DATA = Path("/usr/share/datasets/fashion-mnist")
MEAN, DEVIATION = 0.2860, 0.3530  # of the training images' pixels
CLASSES = 10

# The networks' training. Fixed on all images, before any arm was looked at.
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, WARMUP = 0.05, 0.9, 5e-4, 0.05


# Data


def read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """Read an IDX file of bytes, plain or gzipped: [samples, ...]."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise UserError(
            f"{folder} holds no {name}(.gz): install Fashion-MNIST with `apt-get install dataset-fashion-mnist`, or "
            "give the folder of its four IDX files with --data"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): it is damaged or not a gzip file") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise UserError(f"{path} is not an IDX file of bytes: it must begin with 00 00 08")
    dimensions = content[3]
    if len(content) < 4 + 4 * dimensions:
        raise UserError(f"{path} ends before its {dimensions} sizes")
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * dimensions], dtype=">u4").tolist())
    body = content[4 + 4 * dimensions :]
    if len(body) != math.prod(shape):
        raise UserError(f"{path} should hold {' x '.join(map(str, shape))} bytes, but holds {len(body)}")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


@dataclass(frozen=True)
class Images:
    """Pictures, fp32 [N, 1, 28, 28], standardised, and their classes, int64 [N]."""

    pixels: Tensor
    labels: Tensor


@functools.lru_cache(maxsize=2)
def read_images(folder: Path, part: str) -> Images:
    """The images of a part, ``train`` or ``t10k``."""
    pixels, labels = read_idx(folder, f"{part}-images-idx3-ubyte"), read_idx(folder, f"{part}-labels-idx1-ubyte")
    if pixels.ndim != 3 or pixels.shape[1:] != (28, 28) or labels.shape != pixels.shape[:1]:
        raise UserError(
            f"{folder}: {part} must be N images of 28 x 28 and N labels, got {pixels.shape}, {labels.shape}"
        )
    if labels.size == 0 or labels.max() >= CLASSES:
        raise UserError(f"{folder}: {part} must have images, with labels from 0 to {CLASSES - 1}")
    scaled = (torch.from_numpy(pixels.astype(np.float32)) / 255 - MEAN) / DEVIATION
    return Images(scaled.unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


def with_wrong_labels(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Give ``fraction`` of the samples another class, drawn evenly from the others."""
    generator = torch.Generator().manual_seed(stream("label noise", seed))
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    wrong = labels.clone()
    wrong[chosen] = (labels[chosen] + torch.randint(1, CLASSES, chosen.shape, generator=generator)) % CLASSES
    return wrong


# Training


def stream(*name: object) -> int:
    """A seed for one named use of randomness, independent of the others."""
    return int.from_bytes(hashlib.blake2b(repr(name).encode(), digest_size=8).digest(), "big") >> 1


def network(seed: int) -> nn.Sequential:
    """Three convolutions that halve the image and a linear layer, 34 thousand parameters; nothing mixes samples."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, CLASSES))
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
    return model


def step_flops(batch_size: int) -> int:
    """FLOPs of a forward and backward pass, matrix products and convolutions, 2 for a multiplication and addition."""
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(
            network(0)(torch.zeros(batch_size, 1, 28, 28)), torch.zeros(batch_size).long()
        ).backward()
    return int(counter.get_total_flops())


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = max(1.0, WARMUP * steps)
    if step < warmup:
        return LEARNING_RATE * (step + 1) / (warmup + 1)
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))


def train(
    model: nn.Module, data: Images, kept: Tensor, *, steps: int, of_steps: int, batch_size: int, seed: int, device: str
) -> None:
    """Take the first ``steps`` of a schedule of ``of_steps``, on the samples ``kept``, in an order of the seed."""
    model.to(device).train()
    pixels, labels = data.pixels.to(device), data.labels.to(device)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Tensor]:
        while True:  # an epoch leaves out its last, smaller batch
            order = kept[torch.randperm(len(kept), generator=generator)].to(device)
            yield from order[: len(order) // batch_size * batch_size].split(batch_size)

    for step, batch in zip(range(steps), batches(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, of_steps)
        loss = nn.functional.cross_entropy(model(pixels[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Images, device: str) -> float:
    """Share of images whose class is the largest output."""
    model.eval()
    right = 0
    for pixels, labels in zip(data.pixels.split(1000), data.labels.split(1000), strict=True):
        right += int((model(pixels.to(device)).argmax(1).cpu() == labels).sum())
    return right / len(data.labels)


# The experiment


@dataclass(frozen=True)
class Settings:
    """What decides the results; a directory holds results of one."""

    data: str
    train_images: int
    test_images: int
    epochs: int
    early_epochs: int
    replicates: int
    keep: float
    batch_size: int

    @property
    def kept(self) -> int:
        """Images that a selecting arm trains on."""
        return math.ceil(self.keep * self.train_images)

    @property
    def full_steps(self) -> int:
        """Steps of training on all images for all epochs: the whole budget."""
        return self.epochs * (self.train_images // self.batch_size)


@dataclass(frozen=True)
class Arm:
    """A way to choose the images; ``method`` scores with ``replicates`` networks each."""

    name: str
    title: str
    method: str | None
    replicates: int = 0


def arms(settings: Settings) -> list[Arm]:
    """All arms. EL2N by one network too, which leaves more of a budget to train with."""
    many = settings.replicates
    epoch = f"EL2N after {settings.early_epochs} epoch{'s' if settings.early_epochs > 1 else ''}"
    part = "half" if settings.keep == 0.5 else f"{settings.keep:.0%}"
    found = [
        Arm("full", "all images", None),
        Arm("random", f"random {part}", None),
        Arm("el2n-1", f"{epoch}, 1 network", "EL2N", 1),
        Arm(f"el2n-{many}", f"{epoch}, mean of {many}", "EL2N", many),
        Arm(f"grand-{many}", f"GraNd at init, mean of {many}", "GraNd", many),
    ]
    return list({arm.name: arm for arm in found}.values())


@dataclass(frozen=True)
class Scoring:
    """Score all images with one network."""

    method: str
    replicate: int
    seed: int
    label_noise: float

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"scores-{self.method.lower()}-noise{self.label_noise:g}-seed{self.seed}-network{self.replicate}"

    def needs(self) -> list[str]:
        """Tasks that must be done before."""
        return []

    def epochs(self, settings: Settings) -> float:
        """A guess of what it costs, for the progress bar."""
        return 2.0 if self.method == "GraNd" else settings.early_epochs + 0.3


@dataclass(frozen=True)
class Training:
    """Train one network on what an arm keeps, in a regime."""

    arm: Arm
    regime: str
    seed: int
    label_noise: float

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.arm.name}-{self.regime}-noise{self.label_noise:g}-seed{self.seed}"

    def scorings(self) -> list[Scoring]:
        """The scorings whose mean it ranks by."""
        method = self.arm.method
        if method is None:
            return []
        return [Scoring(method, replicate, self.seed, self.label_noise) for replicate in range(self.arm.replicates)]

    def needs(self) -> list[str]:
        """Tasks that must be done before."""
        return [scoring.name for scoring in self.scorings()]

    def epochs(self, settings: Settings) -> float:
        """A guess of what it costs, for the progress bar."""
        share = {"epochs": 1.0 if self.arm.name == "full" else settings.keep, "whole": 1.0, "half": 0.5}[self.regime]
        return max(
            0.0, settings.epochs * share - (self.regime != "epochs") * sum(s.epochs(settings) for s in self.scorings())
        )


Task = Scoring | Training


def plan(settings: Settings, *, seeds: int, label_noise: float) -> list[Task]:
    """All tasks, seed after seed, those that others wait for first.

    Trainings on all images for equal epochs spend the whole budget, and those on a random half, half of it: these are
    not done twice. With label noise, equal epochs alone are compared, with the mean of all scoring networks.
    """
    tasks: dict[str, Task] = {}
    noises = [0.0, label_noise] if label_noise else [0.0]
    for noise in noises:
        for seed in range(seeds):
            for arm in arms(settings):
                if noise and (arm.method == "GraNd" or arm.replicates not in (0, settings.replicates)):
                    continue
                for regime in ("epochs",) if noise else REGIMES:
                    if _same_as(settings, arm, regime) != regime:
                        continue
                    training = Training(arm, regime, seed, noise)
                    for task in (*training.scorings(), training):
                        tasks.setdefault(task.name, task)
    return list(tasks.values())


def _same_as(settings: Settings, arm: Arm, regime: str) -> str:
    # The regime whose training is the same one, step for step.
    if arm.method is None and regime != "epochs":
        own = settings.full_steps if arm.name == "full" else settings.epochs * (settings.kept // settings.batch_size)
        if own == {"whole": settings.full_steps, "half": settings.full_steps // 2}[regime]:
            return "epochs"
    return regime


@dataclass(frozen=True)
class Job:
    """Everything a worker needs."""

    settings: Settings
    folder: Path
    out: Path
    device: str


def execute(task: Task, job: Job) -> None:
    """Do a task and leave its result as ``<out>/<name>.json``."""
    started = time.perf_counter()
    if job.device.startswith("cuda"):
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    data = read_images(job.folder, "train")
    if task.label_noise:
        data = Images(data.pixels, with_wrong_labels(data.labels, task.label_noise, task.seed))
    result = _score(task, data, job) if isinstance(task, Scoring) else _train(task, data, job)
    result |= {"settings": asdict(job.settings), "seconds": round(time.perf_counter() - started, 1)}
    write_atomically(job.out / f"{task.name}.json", json.dumps(result, indent=1))


def _score(task: Scoring, data: Images, job: Job) -> dict[str, Any]:
    settings = job.settings
    model = network(stream("scoring network", task.seed, task.replicate)).to(job.device)
    steps = 0
    if task.method == "EL2N":
        steps = settings.early_epochs * (settings.train_images // settings.batch_size)
        everything = torch.arange(settings.train_images)
        order = stream("scoring order", task.seed, task.replicate)
        train(
            model,
            data,
            everything,
            steps=steps,
            of_steps=settings.full_steps,
            batch_size=settings.batch_size,
            seed=order,
            device=job.device,
        )
    method = EL2N() if task.method == "EL2N" else GraNd()
    checkpoint = f"epoch {settings.early_epochs}" if steps else "initialisation"
    scores = method.score(
        model,
        (data.pixels, data.labels),
        batch_size=2 * settings.batch_size,
        seed=task.replicate,
        checkpoint=checkpoint,
        progress=False,
    )
    scores.write(job.out / f"{task.name}.parquet")
    return {"flops_training": steps * step_flops(settings.batch_size), "flops_pass": scores.flops}


def _train(task: Training, data: Images, job: Job) -> dict[str, Any]:
    settings, arm = job.settings, task.arm
    per_step = step_flops(settings.batch_size)
    made = [json.loads((job.out / f"{name}.json").read_text()) for name in task.needs()]
    trained, passes = sum(m["flops_training"] for m in made), sum(m["flops_pass"] for m in made)
    result = {"flops_scoring_training": trained, "flops_scoring_passes": passes, "flops_training": 0, "accuracy": None}

    if arm.name == "full":
        kept = torch.arange(settings.train_images)
    elif arm.method is None:
        generator = torch.Generator().manual_seed(stream("random half", task.seed))
        kept = torch.randperm(settings.train_images, generator=generator)[: settings.kept].sort().values
    else:
        scores = average(read_scores(job.out / f"{name}.parquet") for name in task.needs()).values
        kept = torch.from_numpy(np.sort(top_k(scores, settings.kept)))
        norms = data.pixels.flatten(1).norm(dim=1).numpy()
        result["correlation_with_input_norm"] = float(stats.spearmanr(scores, norms).statistic)
        result["kept_digest"] = hashlib.blake2b(kept.numpy().tobytes(), digest_size=8).hexdigest()
    result["kept_by_class"] = torch.bincount(data.labels[kept], minlength=CLASSES).tolist()
    if task.label_noise:
        right = read_images(job.folder, "train").labels
        result["kept_wrong_labels"] = int((data.labels[kept] != right[kept]).sum())

    if task.regime == "epochs":
        steps = settings.epochs * (len(kept) // settings.batch_size)
    else:
        budget = settings.full_steps * per_step // (1 if task.regime == "whole" else 2)
        steps = (budget - trained - passes) // per_step
    if steps < 1:
        return result  # scoring alone costs more than there is to spend
    model = network(stream("network", task.seed))
    train(
        model,
        data,
        kept,
        steps=steps,
        of_steps=steps,
        batch_size=settings.batch_size,
        seed=stream("order", task.seed),
        device=job.device,
    )
    result["flops_training"] = steps * per_step
    result["epochs"] = steps * settings.batch_size / len(kept)
    result["accuracy"] = accuracy(model, read_images(job.folder, "t10k"), job.device)
    return result


# Doing it


def run(tasks: Sequence[Task], job: Job, *, workers: int) -> None:
    """Do the tasks that have no result yet, ``workers`` at a time; 0 does them in this process."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    pending = [task for task in tasks if not _is_done(task, job)]
    total = sum(task.epochs(job.settings) for task in tasks)
    done = total - sum(task.epochs(job.settings) for task in pending)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} epochs"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task("training", total=total, completed=done)

        def finished(task: Task) -> None:
            result = json.loads((job.out / f"{task.name}.json").read_text())
            shown = f", test accuracy {result['accuracy']:.2%}" if result.get("accuracy") is not None else ""
            progress.console.print(f"{task.name}: {result['seconds']:.0f} s{shown}", highlight=False)
            progress.update(bar, advance=task.epochs(job.settings))

        if workers == 0:
            for task in pending:
                execute(task, job)
                finished(task)
            return
        # Forked workers would share this process's OpenMP threads and CUDA state.
        with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as pool:
            running: dict[Future[None], Task] = {}
            while pending or running:
                for task in list(pending):
                    ready = all((job.out / f"{name}.json").exists() for name in task.needs())
                    if ready and len(running) < workers:
                        running[pool.submit(execute, task, job)] = task
                        pending.remove(task)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    try:
                        future.result()
                    except BrokenProcessPool as error:
                        raise UserError(
                            f"a process was ended from outside while it did {task.name}: if memory is short, take "
                            f"fewer --workers; the same command goes on with what is in {job.out}"
                        ) from error
                    finished(task)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback of its own


def _is_done(task: Task, job: Job) -> bool:
    path = job.out / f"{task.name}.json"
    if not path.exists():
        return False
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged: delete it to do it again") from error
    if settings != asdict(job.settings):
        raise UserError(f"{path} was made with other settings ({settings}): choose another --out")
    return True


def collect(tasks: Sequence[Task], job: Job) -> dict[str, Any]:
    """All results of the trainings as one document."""
    settings = job.settings
    runs = []
    for task in tasks:
        if isinstance(task, Scoring):
            continue
        result = json.loads((job.out / f"{task.name}.json").read_text())
        del result["settings"]
        for regime in REGIMES:
            if _same_as(settings, task.arm, regime) == task.regime and (regime == "epochs" or not task.label_noise):
                keys = {"arm": task.arm.name, "regime": regime, "seed": task.seed, "label_noise": task.label_noise}
                runs.append(keys | result)
    return {
        "settings": asdict(settings),
        "training": {
            "learning_rate": LEARNING_RATE,
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
            "warmup": WARMUP,
        },
        "arms": {arm.name: arm.title for arm in arms(settings)},
        "budget_flops": settings.full_steps * step_flops(settings.batch_size),
        "step_flops": step_flops(settings.batch_size),
        "made_with": {"torch": torch.__version__, "machine": platform.machine(), "device": job.device},
        "runs": runs,
    }


def as_json(results: dict[str, Any]) -> str:
    """The document with a line for each training."""
    head = json.dumps({key: value for key, value in results.items() if key != "runs"}, indent=1)
    return head.removesuffix("\n}") + ',\n "runs": [\n' + ",\n".join(map(json.dumps, results["runs"])) + "\n]}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, or report."""
    description, *rest = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX files, plain or gzipped")
    parser.add_argument("--out", type=Path, default=Path("runs/data_diet"), help="where results are kept")
    parser.add_argument("--seeds", type=int, default=5, help="initialisations and data orders, at least 2")
    parser.add_argument("--epochs", type=int, default=6, help="of training on all images: this is the whole budget")
    parser.add_argument("--early-epochs", type=int, default=1, help="after which EL2N scores")
    parser.add_argument("--replicates", type=int, default=4, help="networks whose scores are averaged")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the images to keep")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--label-noise", type=float, default=0.0, help="also compare with this share of wrong labels")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--workers", type=int, default=4 if gpu else os.cpu_count() or 1, help="processes; 0 for none")
    parser.add_argument(
        "--report", action="store_true", help="write --results into the page and the figure; no training"
    )
    parser.add_argument("--check", action="store_true", help="with --report: change nothing, fail if not current")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args(arguments)
    try:
        if args.report:
            return report(args.results, args.page, args.figure, check=args.check)
        return _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with what is in {args.out}", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    for name, least in (("seeds", 2), ("epochs", 1), ("early_epochs", 1), ("replicates", 1), ("workers", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if not 0 < args.keep < 1 or not 0 <= args.label_noise < 1:
        raise UserError(f"--keep must be in (0, 1), --label-noise in [0, 1), got {args.keep} and {args.label_noise}")
    train_set, test_set = read_images(args.data, "train"), read_images(args.data, "t10k")
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (train_set.pixels, train_set.labels, test_set.pixels, test_set.labels):
        digest.update(tensor.numpy().tobytes())
    settings = Settings(
        data=digest.hexdigest(),
        train_images=len(train_set.labels),
        test_images=len(test_set.labels),
        epochs=args.epochs,
        early_epochs=args.early_epochs,
        replicates=args.replicates,
        keep=args.keep,
        batch_size=args.batch_size,
    )
    if not 1 <= settings.batch_size <= settings.kept or args.early_epochs > args.epochs:
        raise UserError(f"--batch-size must be in 1..{settings.kept} and --early-epochs in 1..{args.epochs}")
    args.out.mkdir(parents=True, exist_ok=True)
    job = Job(settings, args.data, args.out, args.device)
    tasks = plan(settings, seeds=args.seeds, label_noise=args.label_noise)
    run(tasks, job, workers=args.workers)
    results = collect(tasks, job)
    write_atomically(args.out / "results.json", as_json(results))
    shown = Report(results)
    shown.figure(args.out / "data_diet.png")
    print(shown.markdown())
    print(f"\nresults in {args.out / 'results.json'}, figure in {args.out / 'data_diet.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
