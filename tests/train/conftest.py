"""Fixtures for everything that trains: the tiny model, on disk and in memory."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load_tiny() -> ModuleType:
    # Test directories are no packages, so the module beside this file is loaded by its path, once.
    name = "pyeff_tests_tiny"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("tiny.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module `tiny.py`: `tiny.tiny_model()`, `tiny.byte_tokenizer()`, `tiny.write_tiny_model(path)`."""
    return _load_tiny()


@pytest.fixture(scope="session")
def tiny_model_dir(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `load_model` reads: random weights, byte tokenizer, no chat template. Do not write to it."""
    directory: Path = tiny.write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    return directory


@pytest.fixture(scope="session")
def task_config(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The values of a run's configuration on the tiny model: sums to learn, noise in the pool, no `out`."""
    directory = tmp_path_factory.mktemp("task")
    sums = [(f"{a}+{b}=", str(a + b), "sum") for a in range(10) for b in range(10)]
    noise = [(f"say {a * b % 97}", str(a * a + b), "noise") for a in range(3, 9) for b in range(9)]
    random.Random(0).shuffle(sums)
    for name, rows in (("target", sums[:40]), ("pool", sums[40:] + noise)):
        lines = [json.dumps({"prompt": p, "answer": a, "source": s}) for p, a, s in rows]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    return {
        "model": str(tiny_model_dir),
        "data": {
            "pool": [{"kind": "jsonl", "path": str(directory / "pool.jsonl"), "source_column": "source"}],
            "target": [{"kind": "jsonl", "path": str(directory / "target.jsonl"), "source_column": "source"}],
            "anchors": 6,
            "holdout": 12,
            "target_samples": 6,
            "exact_match": 4,
            "max_tokens": 32,
            "max_new_tokens": 4,
        },
        "optimizer": {"lr": 1e-2},
        "batch_tokens": 128,
        "micro_batch_tokens": 96,
        "budget": "1.1e9F",
        # The pool is a good part of what this budget can be spent on.
        "governor": {"overhead_cap": 0.5},
        "threads": 1,
    }
