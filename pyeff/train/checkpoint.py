"""Checkpoints that are either complete or not there, and the newest complete one of a run.

A checkpoint is a directory ``step-000123`` with one safetensors file per group of tensors and
``state.json`` for everything else. It is written under a temporary name, forced to disk and renamed, so
a kill at any moment leaves the older ones untouched; an old one is renamed before it is deleted, for the
same reason. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyeff._files import PARTIAL, fsync_directory, write_text_atomic
from pyeff.errors import UserError

_COMPLETE = re.compile(r"step-(\d{6,})")
# Room for state.json, the safetensors headers and the logs that grow until the next checkpoint.
_MARGIN_BYTES = 16 << 20


class NoSpaceError(OSError):
    """The disk has no room for a checkpoint; the ones already there are untouched."""


def tensor_bytes(groups: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes of all tensors in ``groups``."""
    return sum(t.numel() * t.element_size() for group in groups.values() for t in group.values())


def free_bytes(directory: Path) -> int:
    """Bytes free for this user on the disk that holds ``directory``."""
    return shutil.disk_usage(directory).free


def _discard(directory: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves nothing that looks complete."""
    doomed = directory.with_name(f"{PARTIAL}old-{directory.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.replace(doomed)
    shutil.rmtree(doomed)


def complete_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under ``root``, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _COMPLETE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    root: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
) -> int:
    """Write ``root/step-NNNNNN`` and delete all but the newest ``keep`` checkpoints; returns its bytes.

    ``groups`` maps a file name (without ``.safetensors``) to contiguous tensors, which are written from
    where they lie: no second copy is made. ``state`` must survive JSON.

    Raises `NoSpaceError` when the disk has no room, before anything is written where that can be seen.
    """
    from safetensors.torch import save_file

    root.mkdir(parents=True, exist_ok=True)
    needed = tensor_bytes(groups) + _MARGIN_BYTES
    free = free_bytes(root)
    if needed > free:
        raise NoSpaceError(f"a checkpoint needs {needed / 1e9:.2f} GB, {root} has {free / 1e9:.2f} GB free")
    partial = root / f"{PARTIAL}step-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        written = {}
        for name, tensors in groups.items():
            file = partial / f"{name}.safetensors"
            save_file({key: value.detach() for key, value in tensors.items()}, file)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            written[file.name] = fingerprint(file)
        write_text_atomic(partial / "state.json", json.dumps({**state, "step": step, "files": written}))
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors reports a full disk as its own error type, with the reason in its text.
        if isinstance(error, OSError) or "No space" in str(error) or "SafetensorError" in type(error).__name__:
            raise NoSpaceError(f"a checkpoint could not be written to {root}: {error}") from error
        raise
    total = sum(path.stat().st_size for path in partial.iterdir())
    final = root / f"step-{step:06d}"
    if final.exists():
        _discard(final)
    partial.replace(final)
    fsync_directory(root)
    for old in complete_checkpoints(root)[:-keep]:
        _discard(old)
    return total


def fingerprint(file: Path) -> dict[str, int]:
    """Bytes and CRC-32 of a file's content: what tells a damaged file from the one that was written."""
    size = crc = 0
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 22):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return {"bytes": size, "crc32": crc}


def remove_partial(root: Path) -> None:
    """Delete what a kill left half-written or half-deleted."""
    if root.is_dir():
        for path in root.glob(f"{PARTIAL}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint.

    Raises `UserError` when it cannot be read, or a tensor file is missing or does not hold what was written. Reads
    every file once.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        damaged = [name for name, written in state["files"].items() if fingerprint(checkpoint / name) != written]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"the checkpoint {checkpoint} is damaged: {error}") from error
    if damaged:
        raise UserError(f"the checkpoint {checkpoint} is damaged: {damaged[0]} does not hold what was written")
    return state


def newest_checkpoint(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its state; ``None`` when there is none at all.

    Raises `UserError` when there are checkpoints but every one is damaged.
    """
    problem: UserError | None = None
    for path in reversed(complete_checkpoints(root)):
        try:
            return path, read_state(path)
        except UserError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None


@torch.no_grad()
def load_into(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a safetensors file into the ones given, one at a time and in place.

    Copying in place keeps each tensor's storage, whose alignment the bits of a matrix product may depend on.
    Raises `UserError` when names, shapes or dtypes differ.
    """
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as stored:
        names = set(stored.keys())
        if names != set(tensors):
            odd = sorted(names ^ set(tensors))
            raise UserError(f"{file} is of another model: {odd[0]} and {len(odd) - 1} more names differ")
        for name, tensor in tensors.items():
            value = stored.get_tensor(name)
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise UserError(
                    f"{file}: {name} is {value.dtype} {tuple(value.shape)}, "
                    f"expected {tensor.dtype} {tuple(tensor.shape)}"
                )
            tensor.copy_(value)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory of their own."""
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as stored:
        return {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118


def split_tensors(tree: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Separate a nested state into JSON and named tensors: each tensor becomes ``{"tensor": name}``.

    >>> split_tensors({"a": [1, torch.zeros(2)]})
    ({'a': [1, {'tensor': 'a.1'}]}, {'a.1': tensor([0., 0.])})
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            tensors[path] = node.detach().contiguous()
            return {"tensor": path}
        if isinstance(node, Mapping):
            # JSON keys are strings; optimizers index their states by integers.
            return (
                {"items": [[key, walk(value, f"{path}.{key}" if path else str(key))] for key, value in node.items()]}
                if any(not isinstance(key, str) for key in node)
                else {key: walk(value, f"{path}.{key}" if path else key) for key, value in node.items()}
            )
        if isinstance(node, (list, tuple)):
            return [walk(value, f"{path}.{i}" if path else str(i)) for i, value in enumerate(node)]
        return node

    return walk(tree, prefix), tensors


def join_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split_tensors` (tuples come back as lists)."""
    if isinstance(tree, Mapping):
        if set(tree) == {"tensor"}:
            return tensors[tree["tensor"]]
        if set(tree) == {"items"}:
            return {key: join_tensors(value, tensors) for key, value in tree["items"]}
        return {key: join_tensors(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [join_tensors(value, tensors) for value in tree]
    return tree


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path, content: Mapping[str, Any]) -> None:
    """Give an optimizer the states that a checkpoint holds.

    Raises `ValueError` or `LookupError` for those of other parameters.
    """
    moments = load_tensors(path / "optimizer.safetensors")
    optimizer.load_state_dict(join_tensors(content["optimizer"], moments))
    for parameter, moment in optimizer.state.items():
        # torch's fused AdamW trusts these shapes, and would write out of bounds.
        for name in ("exp_avg", "exp_avg_sq"):
            if name in moment and (moment[name].shape, moment[name].dtype) != (parameter.shape, parameter.dtype):
                raise ValueError(
                    f"{name} is {moment[name].dtype} {tuple(moment[name].shape)}, "
                    f"expected {parameter.dtype} {tuple(parameter.shape)}"
                )
