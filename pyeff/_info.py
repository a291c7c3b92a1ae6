"""`pyeff.info` and `pyeff.explain`: what is installed, what would run, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pyeff import __version__
from pyeff._extension import extension, extension_problem
from pyeff.ops import OPERATIONS
from pyeff.ops._dispatch import Explanation, device_of

__all__ = ["Explanation", "Info", "explain", "info"]


@dataclass(frozen=True)
class Info:
    """What pyeff found on this machine; `print(pyeff.info())` shows it as text."""

    version: str
    versions: dict[str, str]
    devices: list[str]
    extension: dict[str, str]
    operations: list[Explanation] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"pyeff {self.version}"]
        lines += [f"  {name:<12} {value}" for name, value in self.versions.items()]
        lines += ["devices", *(f"  {device}" for device in self.devices)]
        lines += ["extension", *(f"  {name:<12} {value}" for name, value in self.extension.items())]
        lines += ["operations", *(f"  {op.operation} on {op.device}: {op.impl}" for op in self.operations)]
        lines += ["not used", *(f"  {line}" for line in self.refusals())]
        return "\n".join(lines)

    def refusals(self) -> list[str]:
        """Why implementations are not used, each reason once, with the operations it holds for."""
        grouped: dict[tuple[str, str, str], list[str]] = {}
        for found in self.operations:
            for name, why in found.refused.items():
                grouped.setdefault((name, found.device, why), []).append(found.operation)
        every = {device: sum(found.device == device for found in self.operations) for _, device, _ in grouped}
        return [
            f"{name} on {device}: {why}" + ("" if len(of) == every[device] else f" ({', '.join(of)})")
            for (name, device, why), of in grouped.items()
        ]


def info() -> Info:
    """Versions, devices, how the extension was built, and for every operation what each device here would run.

    Cost: some milliseconds; asks the CUDA driver for its devices if torch was built with CUDA.

    >>> import pyeff
    >>> "cpu" in {found.device for found in pyeff.info().operations}
    True
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy", "transformers", "peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = [f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            devices.append(
                f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
            )
    else:
        devices.append("cuda: none")
    device_types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    operations = [operation.on_device(device) for operation in OPERATIONS.values() for device in device_types]
    return Info(__version__, versions, devices, _extension_facts(), operations)


def _extension_facts() -> dict[str, str]:
    problem = extension_problem()
    if problem:
        return {"state": problem}
    built = extension().build_info()
    level = built["cpu_level"]
    if built["highest_cpu_level"] != level:
        level += f" (forced by PYEFF_CPU_LEVEL; this processor has {built['highest_cpu_level']})"
    cuda = f"{built['cuda']} for sm_{built['cuda_archs'].replace(' ', ', sm_')}" if built["cuda"] else "not built"
    return {
        "compiler": built["compiler"],
        "openmp": "yes" if built["openmp"] else "no: CPU kernels use one thread",
        "cpu level": level,
        "cuda": cuda,
    }


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which implementation `op(*args, **kwargs)` would use, and why not the others.

    `op` is a name or the public function; the other arguments are those of the call. Nothing is computed. Where an
    explicit `impl` cannot be used, the call would raise, `impl` is "none" and `refused` says why. Raises `ValueError`
    for an operation or implementation that there is not.

    >>> import pyeff, torch
    >>> hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> targets = torch.zeros(2, dtype=torch.long)
    >>> pyeff.explain("linear_cross_entropy_scores", hidden, weight, targets, impl="reference").impl
    'reference'
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPERATIONS:
        raise ValueError(f"op must be one of {', '.join(OPERATIONS)}; got {name!r}")
    operation, impl = OPERATIONS[name], kwargs.get("impl", "auto")
    if impl != "auto":
        asked = {key: value for key, value in kwargs.items() if key != "impl"}
        problem = operation.problem(impl, *args, **asked)
        if problem is not None:
            reason = f"impl={impl!r} was asked for and cannot run"
            return Explanation(name, device_of((args, asked)), "none", reason, {impl: problem})
    return operation.explain(*args, **kwargs)
