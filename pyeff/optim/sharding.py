"""Parameters that are split among processes (DTensor, FSDP2), and what it takes for a split to change no bit of a step.

Blocks of 8-bit states run along the rows of the whole parameter, so a split between rows cuts none: each process
holds whole blocks, with their scales, and steps them alone. A vector is one row; it can be split between blocks only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyeff.ops._optimizer_states import scale_shape


def is_distributed(x: Tensor) -> bool:
    """Whether this is a DTensor; importing the class to ask would take longer than everything else here."""
    return hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """This process's part of a DTensor; every other tensor as it is."""
    return x.to_local() if is_distributed(x) else x  # type: ignore[attr-defined]


def check_split(p: Tensor, where: str, *, block_size: int, in_blocks: bool, at_random: bool) -> None:
    """ValueError, on every process alike, if a DTensor is split in a way that cuts a block.

    in_blocks: its states have scales. at_random: its weights are rounded by the random bits of a block.
    """
    from torch.distributed.tensor.placement_types import Replicate, Shard

    for placement in p.placements:  # type: ignore[attr-defined]
        if type(placement) is Replicate or (type(placement) is Shard and placement.dim == 0):
            continue
        raise ValueError(
            f"{where} is placed as {placement}; blocks of states run along its rows, so it can be replicated or "
            "split along dimension 0 only"
        )
    if p.ndim != 1 or not (in_blocks or at_random):
        return
    part = p.numel()
    for mesh_dim in _sharded_dims(p):
        whole, part = part, -(-part // p.device_mesh.size(mesh_dim))  # type: ignore[attr-defined]
        if part < whole and part % block_size:
            remedy = "states='fp32'" + (" and master='fp32'" if at_random else "")
            raise ValueError(
                f"{where}, a vector of {p.numel()} elements, is split into parts of {part}, which cuts its blocks of "
                f"{block_size}; give vectors a group with {remedy}"
            )


def first_block(p: Tensor, block_size: int) -> int:
    """The number of blocks of the whole parameter before this process's part."""
    if not is_distributed(p) or p.ndim == 0:
        return 0
    start: int = _offsets(p, p.shape)[1][0]
    return start * scale_shape(p.shape, block_size)[1] if p.ndim > 1 else start // block_size


def shard_groups(p: Tensor) -> tuple[Any, ...]:
    """The process groups that hold different parts of a DTensor; none for other tensors."""
    if not is_distributed(p):
        return ()
    return tuple(p.device_mesh.get_group(mesh_dim) for mesh_dim in _sharded_dims(p))  # type: ignore[attr-defined]


def as_part(value: Tensor, p: Tensor, shape: Sequence[int]) -> Tensor:
    """This process's part of something of `shape` that is split like `p`, as a DTensor if `p` is one."""
    if not is_distributed(p):
        return value
    from torch.distributed.tensor import DTensor

    stride = torch.empty(tuple(shape), device="meta").stride()
    if value.device.type != p.device_mesh.device_type:  # type: ignore[attr-defined]
        # States in host memory: from_local would move them to the mesh's device. FSDP2 makes its own this way.
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        meta = TensorMeta(torch.Size(shape), stride, value.dtype)
        spec = DTensorSpec(p.device_mesh, p.placements, tensor_meta=meta)  # type: ignore[attr-defined]
        return DTensor(value, spec, requires_grad=False)
    return DTensor.from_local(
        value,
        p.device_mesh,  # type: ignore[attr-defined]
        p.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def part_of(value: Tensor, p: Tensor) -> Tensor:
    """What this process keeps of a whole tensor that is to be split like `p`, or of one that already is.

    Raises ValueError for a DTensor that is split another way; nothing is communicated.
    """
    if is_distributed(value):
        if not is_distributed(p):
            raise ValueError("is split among processes and its parameter is not; gather it by full_tensor() first")
        if value.device_mesh != p.device_mesh or value.placements != p.placements:  # type: ignore[attr-defined]
            raise ValueError(
                f"is split as {value.placements}, its parameter as {p.placements}; "  # type: ignore[attr-defined]
                "load it through torch.distributed.checkpoint, or redistribute() it first"
            )
        return local(value)
    if not is_distributed(p) or value.ndim == 0:
        return value
    shape, offsets = _offsets(p, value.shape)
    return value[tuple(slice(start, start + n) for start, n in zip(offsets, shape, strict=True))]


def placed(name: str, part: Tensor, p: Tensor, shape: Sequence[int]) -> Tensor:
    """This process's part of a state of this name and whole shape, as it stands in `state`."""
    return as_part(part, p, shape) if is_split(name, p) else part


def part_of_grad(grad: Tensor, p: Tensor) -> Tensor:
    """This process's part of a gradient that is split as its parameter is; ValueError if it is not."""
    try:
        if is_distributed(p) and not is_distributed(grad):
            raise ValueError("is a whole one of a parameter that is split among processes")
        grad = part_of(grad, p)
    except ValueError as error:
        raise ValueError(f"the gradient of a parameter of shape {tuple(p.shape)} {error}") from None
    # What a collective has not delivered yet is waited for here; a kernel would read the memory as it is.
    return grad.wait() if hasattr(grad, "wait") else grad


def is_split(name: str, p: Tensor) -> bool:
    """Whether a state of this name is split among processes as its parameter is; counts are the same on each."""
    if not is_distributed(p) or name in ("step", "beta_powers") or (name == "col_var" and p.ndim == 2):
        return False
    return p.dtype == torch.bfloat16 or not name.startswith("master")


def _sharded_dims(p: Tensor) -> list[int]:
    return [i for i, placement in enumerate(p.placements) if placement.is_shard()]  # type: ignore[attr-defined]


def _offsets(p: Tensor, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and place of this process's part of something of `shape` that is split like `p`."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tuple(shape), p.device_mesh, p.placements)  # type: ignore[attr-defined]
