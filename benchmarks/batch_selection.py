"""Whether choosing samples within batches pays: holdout loss of uniform, random, GREATS, OPUS and CoLM runs.

    python benchmarks/batch_selection.py OUT            # resumable: kill it at any moment and start it again
    python benchmarks/batch_selection.py OUT --report   # write the table of what is there into docs/selection.md

A small byte-level model learns other reasoning-gym tasks than the target's (`base`), then each cell is a `pyeff run` on
a pool of which a quarter are the target's own tasks, the rest other tasks, wrong answers and shuffled words. All arms
of a seed share split, data order and first weights. With a budget in FLOPs choosing is paid for; with one in training
tokens it is free. Cells and comparisons were fixed before the first reported cell was run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from pyeff._files import write_text_atomic

ARMS: dict[str, dict[str, Any] | None] = {
    "uniform": None,
    "random": {"method": "random"},
    "greats": {"method": "greats"},
    "opus": {"method": "opus"},
    "colm": {"method": "colm", "sketch_size": 16},
}
BUDGETS = {"flops": "3e11F", "tokens": "75k tokens"}
SEEDS = (0, 1, 2, 3, 4)
RATE = 3e-3  # of the three tried on a development seed, for uniform batches, that ended lowest
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "selection.md"
WORK = Path(tempfile.gettempdir()) / "pyeff-batch-selection"  # the model that cells begin with, and running ones
BEGIN, END = "<!-- batch-selection:begin -->", "<!-- batch-selection:end -->"

_OWN = {
    "count_bits": {"min_n": 1, "max_n": 1023},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
}
_OTHER = ["count_primes", "lcm", "letter_counting", "simple_equations"]


def gym(seed: int, size: int, names: list[str], **more: Any) -> dict[str, Any]:
    """A source of questions of these tasks."""
    tasks = [{"name": name, "config": _OWN.get(name, {})} for name in names]
    return {"kind": "reasoning_gym", "seed": seed, "size": size, "max_characters": 90, "tasks": tasks, **more}


def write_model(directory: Path) -> None:
    """Three layers, 96 wide, a token a byte; random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>").save_pretrained(directory)


def configuration(model: Path, pool: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Of a uniform run on a pool."""
    return {
        "model": str(model),
        "data": {
            "pool": pool,
            "target": gym(1, 260, list(_OWN)),
            "anchors": 12,
            "holdout": 120,
            "target_samples": 60,
            "exact_match": 0,
            "max_tokens": 160,
            "drop_long": True,
        },
        "optimizer": {"lr": RATE, "weight_decay": 0.0},
        "batch_tokens": 1024,
        "micro_batch_tokens": 512,
        "policy": "uniform",
        "governor": {"check_every": 0.3},
        "save_model": False,
        "checkpoint_every": 1.0,
        "threads": 1,
        **changes,
    }


def base() -> Path:
    """The model that all cells begin with; made where it is missing."""
    from pyeff.train import train_run
    from pyeff.train.config import parse_config

    run = WORK / "base"
    if not (run / "result.json").exists():
        shutil.rmtree(run, ignore_errors=True)
        WORK.mkdir(parents=True, exist_ok=True)
        write_model(WORK / "random")
        pool = [gym(90, 3000, [*_OTHER, "number_sequence"], distinct=False)]
        values = configuration(WORK / "random", pool, budget="2e12F", save_model=True, out=str(run))
        values["optimizer"]["lr"] = 3e-3
        train_run(parse_config(values))
    return run / "model"


def run_cell(out: Path, name: str, **changes: Any) -> None:
    """One run; its end event goes to ``name``.json, the rest is deleted."""
    from pyeff.train import train_run
    from pyeff.train.config import parse_config

    pool = [
        gym(2, 500, list(_OWN)),
        gym(3, 500, _OTHER),
        gym(4, 500, [*_OWN, "lcm", "simple_equations"], corrupt="wrong_answer"),
        gym(5, 500, ["count_bits", "spell_backward", "letter_counting"], corrupt="shuffle_words"),
    ]
    scratch = WORK / f"{name}-{os.getpid()}"
    values = configuration(base(), pool, out=str(scratch), **changes)
    end = train_run(parse_config(values)).end
    kept = {key: end.get(key) for key in ("step", "holdout", "ledger", "batch_selection")}
    write_text_atomic(out / f"{name}.json", json.dumps(kept, indent=1))
    shutil.rmtree(scratch)
    print(name, end["step"], end["holdout"]["after"], flush=True)


def cells(out: Path, most: int) -> None:
    """Run what is missing, so many at most; several processes may share a directory."""
    done = 0
    base()
    for unit, budget in BUDGETS.items():
        for seed in SEEDS:
            for arm, selection in ARMS.items():
                name = f"{unit}-{arm}-{seed}"
                claim = WORK / f"{name}.claim"
                if done == most or (out / f"{name}.json").exists() or not _claim(claim):
                    continue
                run_cell(out, name, seed=seed, budget=budget, batch_selection=selection)
                claim.unlink()
                done += 1


def _claim(file: Path) -> bool:
    """Whether no living process works on it."""
    try:
        os.kill(int(file.read_text()), 0)
    except (OSError, ValueError):
        write_text_atomic(file, str(os.getpid()))
        return True
    return False


def holm(values: list[float]) -> list[float]:
    """p values adjusted for as many comparisons as there are (Holm 1979).

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order, adjusted, most = np.argsort(values), [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        most = max(most, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = most
    return adjusted


def table(out: Path) -> str:
    """Holdout loss by arm and budget, and the paired difference from the random draw."""
    lines = []
    for unit, title in (
        ("flops", f"Equal total FLOPs ({BUDGETS['flops']}): choosing is paid for"),
        ("tokens", f"Equal trained tokens ({BUDGETS['tokens']}): choosing is free"),
    ):
        found = {
            arm: {s: json.loads(f.read_text()) for s in SEEDS if (f := out / f"{unit}-{arm}-{s}.json").exists()}
            for arm in ARMS
        }
        lines += [f"**{title}**", ""]
        if not any(found.values()):
            lines += ["Not measured yet.", ""]
            continue
        lines += [
            "| arm | holdout loss | minus random | p (Holm) | steps | FLOPs for choosing | seeds |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        compared = [arm for arm in ARMS if arm != "random" and len(set(found[arm]) & set(found["random"])) > 1]
        paired = {
            arm: [
                found[arm][s]["holdout"]["after"] - found["random"][s]["holdout"]["after"]
                for s in sorted(set(found[arm]) & set(found["random"]))
            ]
            for arm in compared
        }
        p = dict(zip(compared, holm([float(stats.ttest_1samp(paired[a], 0).pvalue) for a in compared]), strict=True))
        for arm, runs in found.items():
            if not runs:
                continue
            after = [run["holdout"]["after"] for run in runs.values()]
            choosing = [
                run["ledger"]["score"]["flops"] / sum(row["flops"] for row in run["ledger"].values())
                for run in runs.values()
            ]
            difference, chance = ("", "") if arm not in p else (interval(paired[arm]), f"{p[arm]:.2g}")
            steps = np.mean([run["step"] for run in runs.values()])
            row = [
                arm,
                f"{np.mean(after):.3f}",
                difference,
                chance,
                f"{steps:.0f}",
                f"{100 * np.mean(choosing):.0f} %",
            ]
            lines.append(f"| {' | '.join(row)} | {len(runs)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def interval(values: list[float]) -> str:
    """Mean and half width of its 95 % t interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):+.3f} ± {half:.3f}"


def report(out: Path) -> None:
    """Write the table between its markers."""
    text = DOCUMENT.read_text()
    head, rest = text.split(BEGIN)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{table(out)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--report", action="store_true", help="write the table of what is there")
    parser.add_argument("--develop", action="store_true", help="try rates on a seed that is not reported")
    parser.add_argument("--most", type=int, default=-1, help="stop after so many cells")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.report:
        report(options.out)
    elif options.develop:
        for rate in (3e-4, 1e-3, 3e-3):
            optimizer = {"lr": rate, "weight_decay": 0.0}
            run_cell(options.out, f"develop-{rate:g}", seed=100, budget=BUDGETS["flops"], optimizer=optimizer)
    else:
        cells(options.out, options.most)


if __name__ == "__main__":
    main()
