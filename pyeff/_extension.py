"""The compiled extension: loaded at first use, after torch, so that both share one OpenMP runtime."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    # torch ships the OpenMP runtime under the same soname; whoever loads first decides which copy the process uses.
    import torch  # noqa: F401

    try:
        return importlib.import_module("pyeff._native"), None
    except ImportError as error:
        return None, (
            f"the compiled extension is not available ({error}); reinstall with a C++17 compiler on PATH: "
            "pip install --force-reinstall --no-deps pyeff"
        )


def extension() -> ModuleType:
    """The module `pyeff._native`; RuntimeError with the reason and a remedy when it cannot be loaded."""
    module, problem = _load()
    if module is None:
        raise RuntimeError(problem)
    return module


def extension_problem() -> str | None:
    """Why the extension cannot be used, or None."""
    return _load()[1]


@functools.cache
def cuda_extension_problem() -> str | None:
    """Why the extension's CUDA kernels cannot be used on the current device, or None."""
    module, problem = _load()
    if module is None:
        return problem
    if not hasattr(module, "cuda_problem"):
        return "the extension was built without CUDA sources (nvcc was not found at build time)"
    return module.cuda_problem()
