"""The codes of `optimizer_state_codes.py` on the gradients of a language model, SmolLM2-135M on Python's sources.

    python benchmarks/optimizer_state_gradients.py --capture 64   # 64 more steps' gradients; again until there are 128
    python benchmarks/optimizer_state_gradients.py                # Adam in every code over them; writes JSON
    python benchmarks/optimizer_state_gradients.py --report       # the table of docs/optimizer_states.md

Gradients are of the mean loss, taken at the model's own weights, from batches of 2 windows of 64 tokens, and only
some rows of some matrices are kept: 128 steps fill 0.3 GB of the directory given by --gradients, and can be removed
afterwards. Adam passes over them four times, each time in another order: 128 steps are too few to see whether a code
follows what moves by a thousandth a step. The model's input and output embedding are one matrix. Each row of it
receives a small gradient in every step, as a wrong answer, and a large one when its token occurs; a model that does
not tie them has the large part alone in its input embedding, and exact zeros between. Rows are drawn from tokens that
are frequent in the text, that occur once or twice in all of it, and that never occur.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from optimizer_state_codes import BETA2, BLOCK, FP32, PAIRS, Result, compare, print_table
from torch import Tensor

from pyeff._files import write_atomic, write_text_atomic

RESULTS = Path(__file__).parent / "results" / "optimizer_state_codes" / "smollm2.json"
GRADIENTS = Path(tempfile.gettempdir()) / "pyeff-gradients"
STEPS, WINDOWS, CONTEXT = 128, 2, 64
PASSES = 4
ROWS = 128
LAYER_ROWS = 64
# Whole blocks of a row of 576 or 1536 elements: the last 64 of 576 would be a block of their own.
COLUMNS = {576: 512, 1536: 1536}
# What a user would have: both moments in a code.
CODED = [pair for pair in PAIRS if FP32 not in pair]


@dataclass(frozen=True)
class Sample:
    """The token ids of each step, [STEPS, WINDOWS, CONTEXT + 1], and rows of the embedding by how often they occur."""

    windows: Tensor
    frequent: Tensor
    rare: Tensor
    unseen: Tensor


def sample(tokenizer: Any) -> Sample:
    """Windows from all over the library, and rows by how often their token is an input of one of them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(f.parts)]
    generator = torch.Generator().manual_seed(0)
    windows: list[Tensor] = []
    for i in torch.randperm(len(files), generator=generator).tolist():
        # Eight windows of a file at most, so that there are many authors.
        ids = torch.tensor(tokenizer(files[i].read_text(errors="replace")[:40_000])["input_ids"])
        parts = ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
        windows += list(parts[torch.randperm(len(parts), generator=generator)[:8]])
        if len(windows) >= STEPS * WINDOWS:
            break
    chosen = torch.stack(windows[: STEPS * WINDOWS])[torch.randperm(STEPS * WINDOWS, generator=generator)]
    counts = chosen[:, :-1].flatten().bincount(minlength=len(tokenizer))
    order = torch.randperm(len(tokenizer), generator=generator)  # ties are broken at random
    rare = order[(counts[order] == 1) | (counts[order] == 2)][:ROWS]
    frequent = order[counts[order].argsort(descending=True, stable=True)][:ROWS]
    windows_by_step = chosen.view(STEPS, WINDOWS, CONTEXT + 1)
    return Sample(windows_by_step, frequent, rare, order[counts[order] == 0][:ROWS])


def part(grad: Tensor, rows: Tensor) -> Tensor:
    return grad[rows][:, : COLUMNS[grad.shape[1]]].flatten()


def gradients_of(model: Any, drawn: Sample, steps: range) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """The loss and the kept gradients of each of these steps."""
    model.requires_grad_(False)
    table, layers = model.get_input_embeddings().weight, model.model.layers
    watched = {}
    for layer in (0, len(layers) - 1):
        watched[f"{layer} q"] = layers[layer].self_attn.q_proj.weight.requires_grad_()
        watched[f"{layer} down"] = layers[layer].mlp.down_proj.weight.requires_grad_()
    every = torch.arange(LAYER_ROWS)
    kept = torch.cat([drawn.frequent, drawn.rare, drawn.unseen])
    width = COLUMNS[table.shape[1]]
    for step in steps:
        ids = drawn.windows[step]
        # The embedding's two gradients, by hand and in the kept rows alone: the whole table has 28 million elements.
        inputs = F.embedding(ids[:, :-1], table).requires_grad_()
        hidden = model.model(inputs_embeds=inputs).last_hidden_state
        logits = hidden @ table.T
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        d_logits, d_inputs, *rest = torch.autograd.grad(loss, [logits, inputs, *watched.values()])
        grads = dict(zip(watched, rest, strict=True))
        output = d_logits.flatten(0, 1)[:, kept].T @ hidden.detach().flatten(0, 1)
        alone = (kept[:, None] == ids[:, :-1].flatten()).to(d_inputs.dtype) @ d_inputs.flatten(0, 1)
        groups = [len(drawn.frequent), len(drawn.rare), len(drawn.unseen)]
        frequent, rare, unseen = (alone + output)[:, :width].split(groups)
        yield (
            loss.item(),
            {
                "embedding, frequent": frequent.flatten(),
                "embedding, rare": rare.flatten(),
                "embedding, unseen": unseen.flatten(),
                "untied, rare": alone.split(groups)[1][:, :width].flatten(),
                "first layer": torch.cat([part(g, every) for n, g in grads.items() if n.startswith("0 ")]),
                "last layer": torch.cat([part(g, every) for n, g in grads.items() if not n.startswith("0 ")]),
            },
        )


def capture(directory: Path, more: int) -> None:
    """Add files of gradients, one a step."""
    from safetensors.torch import save

    from pyeff.train.model import load_model

    directory.mkdir(parents=True, exist_ok=True)
    loaded = load_model("smollm2")
    present = len(list(directory.glob("step-*.safetensors")))
    steps = range(present, min(present + more, STEPS))
    found = gradients_of(loaded.model, sample(loaded.tokenizer), steps)
    for step, (loss, tensors) in zip(steps, found, strict=True):
        data = save({name: t.contiguous() for name, t in tensors.items()})
        write_atomic(directory / f"step-{step:04d}.safetensors", lambda file, data=data: file.write(data), sync=False)
        print(f"step {step}: loss {loss:.3f}", flush=True)


def files_in(directory: Path) -> list[Path]:
    files = sorted(directory.glob("step-*.safetensors"))
    if not files:
        raise SystemExit(f"{directory} holds no gradients: run with --capture {STEPS} first")
    return files


def spread_in_blocks(files: list[Path], sections: list[int]) -> list[float]:
    """The median over blocks of the standard deviation of log sqrt(v) at the end, what the simulation calls spread."""
    v = torch.zeros(sum(sections), dtype=torch.float64)
    for g in flat(files):
        v = BETA2 * v + (1 - BETA2) * g.double().square()
    found = []
    for section in v.split(sections):
        blocks = section.view(-1, BLOCK)
        blocks = blocks[(blocks > 0).all(1)]
        found.append((blocks.log() / 2).std(1).median().item())
    return found


def flat(files: list[Path], passes: int = 1) -> Iterator[Tensor]:
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(0)
    for i in range(passes):
        for place in torch.randperm(len(files), generator=generator) if i else range(len(files)):
            yield torch.cat(list(load_file(files[place]).values()))


def evaluate(directory: Path, results: Path) -> None:
    """Write errors, largest steps and spreads."""
    from safetensors.torch import load_file

    files = files_in(directory)
    first = load_file(files[0])
    names, sections = list(first), [t.numel() for t in first.values()]
    found = compare(CODED, flat(files, PASSES), sections, PASSES * len(files))
    record = {
        "model": "SmolLM2-135M-Instruct",
        "batches": len(files),
        "passes": PASSES,
        "tokens_a_step": WINDOWS * CONTEXT,
        "columns": names,
        "elements": sections,
        "spread": spread_in_blocks(files, sections),
        "pairs": [
            {"m": m.name, "second_moment": v.name, "error": r.error, "largest": r.largest, "bias": r.bias}
            for (m, v), r in zip(CODED, found, strict=True)
        ],
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(results, json.dumps(record, indent=1) + "\n")


def report(results: Path) -> None:
    """Print the table."""
    record = json.loads(results.read_text())
    steps = f"{record['passes']} x {record['batches']} steps of {record['tokens_a_step']} tokens"
    print(f"{steps} of {record['model']}: error / largest step / bias\n")
    columns = [f"{n} ({spread:.2g})" for n, spread in zip(record["columns"], record["spread"], strict=True)]
    pairs = record["pairs"]
    names = [(pair["m"], pair["second_moment"]) for pair in pairs]
    rows = [Result(*(tuple(pair[name]) for name in ("error", "largest", "bias"))) for pair in pairs]
    print_table(names, columns, [rows])


def main() -> None:
    """Capture, evaluate or report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--capture", type=int, metavar="N", help="take the gradients of N more steps")
    parser.add_argument("--report", action="store_true", help="print the table of the last evaluation")
    parser.add_argument("--gradients", type=Path, default=GRADIENTS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.capture:
        capture(options.gradients, options.capture)
    else:
        if not options.report:
            evaluate(options.gradients, options.results)
        report(options.results)


if __name__ == "__main__":
    main()
