"""The byte tokenizer of the training tests, with and without a chat template."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    # Test directories are no packages, so the module is loaded by its path, once for all of them.
    name = "pyeff_tests_tiny"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "train" / "tiny.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def plain_tokenizer(tiny: ModuleType) -> PreTrainedTokenizerFast:
    return tiny.byte_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer(tiny: ModuleType) -> PreTrainedTokenizerFast:
    return tiny.byte_tokenizer(chat_template=tiny.CHAT_TEMPLATE)
