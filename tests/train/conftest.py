"""Fixtures for everything that trains: the tiny model, on disk and in memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

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
