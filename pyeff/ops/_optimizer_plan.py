"""Parameters, gradients and states laid out for the kernels of the optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyeff._extension import extension
from pyeff.ops._optimizer_states import DTYPES, LOW_ADDRESS, check_memory
from pyeff.reference.optimizer_step import RULES, OptimizerRule, row_length
from pyeff.reference.optimizer_step import optimizer_step as reference_step

WEIGHTS = {"none": 1, "stochastic": 2, "ecc8": 3, "fp32": 4}  # of bf16 parameters; fp32 ones are 0
FIELDS = 16  # of OptimizerTensor; the first two are the addresses of the parameter and its gradient
NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "dampening", "clip_norm")


class StepPlan:
    """A list of parameters with their states, laid out for the kernels: made once, used for many steps.

    On a GPU the table lies on the device, written there by kernels whose arguments are its rows, so that no copy from
    the host waits or has to outlive a captured graph. Gradients may move between steps; everything else may not.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        lists: Sequence[Sequence[Tensor]],
        *,
        master: str,
        block_size: int,
        keys: Sequence[int],
        first_blocks: Sequence[int] | None = None,
        impl: str,
    ) -> None:
        self.params, self.grads, self.lists = list(params), list(grads), [list(one) for one in lists]
        self.master, self.keys, self.impl = master, list(keys), impl
        self.first_blocks = list(first_blocks or [0] * len(self.params))
        if impl == "reference":
            check_memory(self.grads, "a gradient")
            return
        # Whose addresses are kept, and whose `.data` may be assigned meanwhile: the memory must not go.
        self._memory = [x.untyped_storage() for one in self.lists for x in one]
        # The kernels read flat memory; what is not flat is copied before a step, and a parameter copied back after it.
        self._flat_params = [p if _is_flat(p) else torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in params]
        self._copied_params = [(p, flat) for p, flat in zip(params, self._flat_params, strict=True) if p is not flat]
        addresses = [[x.data_ptr() for x in one] or [0] * len(self.params) for one in self.lists]
        sizes = [p.numel() for p in params]
        # Rows of whole blocks need not be told apart.
        rows = [row_length(p.shape) for p in params]
        rows = [size if row == 0 or row % block_size == 0 else row for row, size in zip(rows, sizes, strict=True)]
        chunk = getattr(extension(), "OPTIMIZER_CHUNK", 4096)
        # A chunk is a number of whole blocks; it counts the last ones of rows as full.
        padded = [
            size if row == size else size // row * -(-row // block_size) * block_size
            for row, size in zip(rows, sizes, strict=True)
        ]
        chunks = [-(-size // chunk) for size in padded]
        starts, self._chunk_count = [], 0
        for count in chunks:
            starts.append(self._chunk_count)
            self._chunk_count += count
        half = WEIGHTS[master]
        columns = [
            [p.data_ptr() for p in self._flat_params],
            [0] * len(self.params),
            *addresses,
            sizes,
            [0 if p.dtype == torch.float32 else half for p in params],
            [0] * len(self.params),
            self.keys,
            self.first_blocks,
            starts,
            rows,
        ]
        self._rows = torch.tensor(columns, dtype=torch.int64, device="cpu").T.contiguous()  # read by the host
        self._gradient_key: list[tuple[Any, ...]] = []
        self._copied_grads: list[tuple[Tensor, Tensor]] = []
        if impl == "cuda":
            device = self.params[0].device
            self._table = torch.empty_like(self._rows, device=device)
            self._chunks = torch.empty(self._chunk_count, 2, dtype=torch.int32, device=device)
            scalars = len(self.params) * extension().OPTIMIZER_SCALARS_BYTES
            self._scalars = torch.empty(scalars, dtype=torch.uint8, device=device)
        self.set_grads(grads)

    def set_grads(self, grads: Sequence[Tensor]) -> None:
        """Take the gradients of the next step; costs a look at each address where they are those of the last.

        Their signs must be in their memory (`Tensor.resolve_neg`). Raises ValueError for one whose memory was freed or
        never there.
        """
        if self.impl == "reference":
            check_memory(grads, "a gradient")
            self.grads = list(grads)
            return
        try:
            addresses = [g.data_ptr() for g in grads]
        except RuntimeError:  # of wrappers
            addresses = [0]
        if min(addresses, default=LOW_ADDRESS) < LOW_ADDRESS:
            check_memory(grads, "a gradient")
        self.grads = list(grads)
        key = [(address, g.dtype, g.is_contiguous()) for address, g in zip(addresses, grads, strict=True)]
        if key == self._gradient_key and not self._copied_grads:
            return
        self._gradient_key, self._copied_grads = key, []
        for i, (_, dtype, contiguous) in enumerate(key):
            if not contiguous:
                flat = torch.empty(grads[i].shape, dtype=dtype, device=grads[i].device)
                self._copied_grads.append((grads[i], flat))
                addresses[i] = flat.data_ptr()
        columns = [addresses, [DTYPES[dtype] for _, dtype, _ in key]]
        self._rows[:, 1], self._rows[:, 11] = torch.tensor(columns, dtype=torch.int64, device="cpu")
        if self.impl == "cuda":
            with torch.cuda.device(self._table.device):
                extension().optimizer_table_cuda(
                    self._rows.data_ptr(), len(self._rows), self._table.data_ptr(), self._chunks.data_ptr(),
                    self._chunk_count, torch.cuda.current_stream().cuda_stream,
                )  # fmt: skip

    def release_grads(self) -> None:
        """Let go of the gradients, whose memory is not the plan's to keep; `set_grads` comes before the next step."""
        self.grads = []
        if self.impl != "reference" and self._copied_grads:
            self._gradient_key, self._copied_grads = [], []

    def step(
        self,
        rule: OptimizerRule,
        *,
        norm: Tensor | None = None,
        lr: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> None:
        """Take a step; see `optimizer_step`."""
        if self.impl == "cuda":
            self._launch(rule, norm, lr, skipped)
            return
        if lr is not None:
            rule = dataclasses.replace(rule, lr=float(lr))
        size = 0.0 if norm is None else norm.item()
        if self.impl == "reference":
            taken = reference_step(
                self.params, self.grads, *self.lists, rule=rule, master=self.master, keys=self.keys,
                first_blocks=self.first_blocks, norm=size,
            )  # fmt: skip
        else:
            self._copy_in()
            taken = extension().optimizer_step(
                self._rows.data_ptr(), len(self._rows), _numbers(rule), size, torch.get_num_threads()
            )
            self._copy_out()
        if not taken and skipped is not None:
            skipped.add_(1)

    def _launch(self, rule: OptimizerRule, norm: Tensor | None, lr: Tensor | None, skipped: Tensor | None) -> None:
        device = self._table.device
        with torch.cuda.device(device):
            self._copy_in()
            extension().optimizer_step_cuda(
                self._table.data_ptr(), len(self._rows), self._chunks.data_ptr(), self._chunk_count, _numbers(rule),
                *(0 if x is None else x.data_ptr() for x in (lr, norm, skipped)),
                self._scalars.data_ptr(), torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
            self._copy_out()

    def _copy_in(self) -> None:
        for x, flat in (*self._copied_params, *self._copied_grads):
            flat.copy_(x)

    def _copy_out(self) -> None:
        for p, flat in self._copied_params:
            p.copy_(flat)
        # The kernels write behind autograd's back: a graph that still holds the old values must not be run backward.
        torch.autograd.graph.increment_version([p for p in self.params if not p.is_inference()])


def _is_flat(x: Tensor) -> bool:
    """Whether a kernel may read the memory as it is; a sign that torch keeps beside a tensor is not in it."""
    return x.is_contiguous() and not x.is_neg()


def _numbers(rule: OptimizerRule) -> tuple[float | int, ...]:
    """struct OptimizerRule of csrc/common/optimizer_step.h."""
    return (
        *(float(getattr(rule, name)) for name in NUMBERS),
        rule.seed,
        rule.block_size,
        RULES.index(rule.rule),
        int(rule.coded),
        int(rule.coupled),
        int(rule.nesterov),
    )
