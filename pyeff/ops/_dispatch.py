"""Which implementation of an operation runs, and why.

An operation lists its implementations in the order `impl="auto"` tries them. What can run depends on the environment
(is triton there, was the extension built, is there a GPU), the same for all operations and answered here, and on the
arguments, answered by the operation. An explicit `impl` is never replaced by another: it runs or raises the reason.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from pyeff._extension import cuda_extension_problem, extension_problem

IMPLEMENTATIONS = ("triton", "cuda", "cpu", "reference")


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be used at all, or None; found without importing it."""
    try:
        found = importlib.util.find_spec("triton") is not None
    except ImportError:  # an import hook that refuses it
        found = False
    return None if found else "triton is not installed (pip install 'pyeff[triton]')"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def environment_problem(impl: str, device: str) -> str | None:
    """Why `impl` cannot run for tensors of this device type ("cpu", "cuda") here, or None."""
    if impl == "reference":
        return None
    if impl == "cpu":
        if device != "cpu":
            return f"it runs on CPU tensors, and these are on {device}"
        return extension_problem()
    if impl == "triton":
        if device == "cpu" and interpreting():
            return triton_problem()
        if device != "cuda":
            return f"it runs on CUDA tensors, and these are on {device} (TRITON_INTERPRET=1 interprets it, slowly)"
        return triton_problem()
    if impl == "cuda":
        if device != "cuda":
            return f"it runs on CUDA tensors, and these are on {device}"
        return cuda_extension_problem()
    raise ValueError(f"impl must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call would use ("none" where the one asked for cannot run), and why not the others."""

    operation: str
    device: str
    impl: str
    reason: str
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.operation} on {self.device}: {self.impl} ({self.reason})"]
        lines += [f"  not {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


def check_layout(name: str, tensor: torch.Tensor) -> None:
    """Raises `TypeError` for a sparse, nested or opaque tensor and `ValueError` for one without data."""
    if tensor.is_nested or tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {'nested' if tensor.is_nested else tensor.layout}")
    if tensor.is_meta:
        raise ValueError(f"{name} must hold data, and is on the meta device")


def _no_limits(impl: str, *args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Operation:
    """An operation's implementations in the order `auto` tries them, and what each refuses.

    `limits(impl, *args, **kwargs)` gets the arguments of the public function and returns why `impl` cannot take them,
    or None. `environment(impl, device)` says why this machine cannot run `impl`, for operations that have
    implementations of their own; `order(*args, **kwargs)` is the order for these arguments, where it depends on them.
    The order must end in "reference", which takes everything.
    """

    name: str
    implementations: tuple[str, ...]
    limits: Callable[..., str | None] = _no_limits
    environment: Callable[[str, str], str | None] = environment_problem
    order: Callable[..., tuple[str, ...]] | None = None

    def explain(self, *args: Any, impl: str = "auto", **kwargs: Any) -> Explanation:
        """The implementation this call would use; ValueError or RuntimeError if an explicit one cannot."""
        device = device_of((args, kwargs))
        if impl != "auto":
            problem = self.problem(impl, *args, **kwargs)
            if problem:
                raise RuntimeError(f"{self.name}: impl={impl!r} cannot be used: {problem}")
            return Explanation(self.name, device, impl, "asked for")
        refused: dict[str, str] = {}
        for name in self.order(*args, **kwargs) if self.order else self.implementations:
            problem = self.environment(name, device)
            if problem is None and name == "triton" and device == "cpu":
                problem = "the interpreter is for tests; ask for it with impl='triton'"
            problem = problem or self.limits(name, *args, **kwargs)
            if problem is None:
                reason = "nothing faster can run" if name == "reference" else "first in order that can run"
                return Explanation(self.name, device, name, reason, refused)
            refused[name] = problem
        raise AssertionError(f"{self.name} has no reference implementation")

    def problem(self, impl: str, *args: Any, **kwargs: Any) -> str | None:
        """Why an explicit `impl` cannot take this call here, or None; ValueError for one that there is not."""
        if impl not in self.implementations:
            raise ValueError(
                f"impl must be 'auto' or one of {', '.join(self.implementations)} for {self.name}; got {impl!r}"
            )
        return self.environment(impl, device_of((args, kwargs))) or self.limits(impl, *args, **kwargs)

    def on_device(self, device: str) -> Explanation:
        """What `auto` takes on a device type, limits of the arguments aside."""
        refused: dict[str, str] = {}
        for name in self.implementations:
            problem = self.environment(name, device)
            if problem is None and not (name == "triton" and device == "cpu"):
                return Explanation(self.name, device, name, "first in order that can run", refused)
            refused[name] = problem or "the interpreter is for tests"
        raise AssertionError(f"{self.name} has no reference implementation")


def device_of(arguments: Any) -> str:
    """The type of the device that a call's first tensor is on; "cpu" without any."""
    return next((tensor.device.type for tensor in _tensors(arguments)), "cpu")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
