"""The norm of all gradients together, on their device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyeff._extension import extension
from pyeff.ops._dispatch import Operation
from pyeff.ops._optimizer_plan import FIELDS
from pyeff.ops._optimizer_states import DTYPES, check_memory, check_parameter
from pyeff.reference.optimizer_step import global_norm as reference_norm


def global_norm(tensors: Sequence[Tensor], *, impl: str = "auto") -> Tensor:
    """The 2-norm of all elements of all tensors, sqrt(sum_i sum_j x_ij^2), as a float64 scalar on their device.

    tensors: fp32 or bf16, any shapes, on one device; none at all have norm 0 (on the CPU). Squares are summed in fp32
    over chunks of 4096 elements (in float64 where that overflows) and in float64 beyond, in one fixed order: every
    implementation and any number of threads give the same bits. NaN and Inf come through. Nothing waits for the
    device. impl="auto" takes "cuda" for CUDA tensors and "cpu" for CPU tensors where the compiled extension can run,
    else "reference".

    Raises TypeError for tensors that are sparse or of another dtype, ValueError for tensors on several devices.
    Cost: one read of the tensors, two launches on a GPU; a copy of each tensor that is not contiguous.

    >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]).item()
    5.0
    """
    tensors = list(tensors)
    for i, x in enumerate(tensors):
        check_parameter(x, f"tensors[{i}]")
        if x.device != tensors[0].device:
            raise ValueError(
                f"tensors[{i}] is on {x.device} and tensors[0] on {tensors[0].device}; call once per device"
            )
    chosen = OPERATION.explain(tensors, impl=impl).impl
    return norm(tensors, impl=chosen) if tensors else torch.zeros((), dtype=torch.float64)


torch.library.define("pyeff::global_norm", "(Tensor[] tensors, *, str impl) -> Tensor")


@torch.library.impl("pyeff::global_norm", ("CPU", "CUDA"))
def _norm(tensors: list[Tensor], *, impl: str) -> Tensor:
    check_memory(tensors, "a tensor")
    if impl != "cuda":
        if impl == "reference":
            size = reference_norm(tensors)
        else:
            flat, rows = _rows([x for x in tensors if x.numel()], 4096)
            size = extension().global_norm(rows.data_ptr(), len(flat), torch.get_num_threads())
        return torch.tensor(size, dtype=torch.float64, device=tensors[0].device)
    device = tensors[0].device
    with torch.cuda.device(device):
        flat, rows = _rows([x for x in tensors if x.numel()], extension().OPTIMIZER_CHUNK)
        count = int(rows[-1, -1]) + -(-int(rows[-1, 9]) // extension().OPTIMIZER_CHUNK) if flat else 0
        stream = torch.cuda.current_stream().cuda_stream
        table = torch.empty_like(rows, device=device)
        chunks = torch.empty(count, 2, dtype=torch.int32, device=device)
        squares = torch.empty(count, dtype=torch.float64, device=device)
        result = torch.empty((), dtype=torch.float64, device=device)
        extension().optimizer_table_cuda(rows.data_ptr(), len(flat), table.data_ptr(), chunks.data_ptr(), count, stream)
        extension().global_norm_cuda(
            table.data_ptr(), chunks.data_ptr(), count, squares.data_ptr(), result.data_ptr(), stream
        )
    return result


def _rows(tensors: list[Tensor], chunk: int) -> tuple[list[Tensor], Tensor]:
    """The tensors as flat memory, and a row of csrc/common/optimizer_step.h's table for each."""
    flat = [x.contiguous() for x in tensors]
    rows, start = [], 0
    for x in flat:
        row = [0] * FIELDS
        row[1], row[9], row[11], row[14], row[15] = x.data_ptr(), x.numel(), DTYPES[x.dtype], start, x.numel()
        start += -(-x.numel() // chunk)
        rows.append(row)
    return flat, torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, FIELDS)  # read by the host


@torch.library.register_fake("pyeff::global_norm")
def _norm_fake(tensors: list[Tensor], *, impl: str) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)


norm = torch.ops.pyeff.global_norm.default

OPERATION = Operation("global_norm", ("cuda", "cpu", "reference"))
