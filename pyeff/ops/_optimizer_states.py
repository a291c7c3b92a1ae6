"""What a list of parameters keeps between optimizer steps: moments in 8 bits or fp32, masters, counts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyeff.reference.optimizer_step import (
    CODE,
    MASTERS,
    RULES,
    decode_root,
    decode_signed,
    encode_root,
    encode_signed,
    from_blocks,
    row_length,
    to_blocks,
)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # csrc/common/optimizer_step.h
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048)
STATES = ("8bit", "fp32")


@dataclass
class OptimizerStates:
    """What a list of parameters keeps between steps.

    rule: "adam" (two moments), "lion" or "sgd" (one). states: "8bit" or "fp32". For a parameter of n elements and
    blocks of b, a moment is uint8 codes of the parameter's shape and an fp32 scale each block, or one fp32 tensor of
    its shape (then the lists of scales are empty). The first moment is signed; of the second, codes hold sqrt(v) and
    fp32 holds v. Blocks are cut from each row of r = n / shape[0] elements, scales [shape[0], ceil(r / b)]; a vector
    is one row, scales [ceil(n / b)]. For Adam with codes 2 + 8 / b bytes per parameter, and 2 + 8 / r where rows are
    shorter than a block.

    master: what a bf16 parameter has beside it: "ecc8" an error byte (uint8), "fp32" a twin; "stochastic" and "none"
    nothing. `steps` counts (float64 scalars) and Adam's `beta_powers` hold beta1^t and beta2^t (float64 [2]) on the
    parameter's device. `keys` tell the random bits of parameters apart. `code` names how bytes stand for numbers
    (docs/optimizer_states.md).

    >>> states = OptimizerStates.zeros([torch.zeros(3, 100)])
    >>> states.first[0].shape, states.first_scale[0].shape
    (torch.Size([3, 100]), torch.Size([3, 1]))
    """

    first: list[Tensor]
    first_scale: list[Tensor]
    second: list[Tensor]
    second_scale: list[Tensor]
    masters: list[Tensor]
    steps: list[Tensor]
    beta_powers: list[Tensor]
    keys: list[int]
    rule: str = "adam"
    states: str = "8bit"
    master: str = "none"
    block_size: int = 256
    code: str = field(default=CODE)

    @classmethod
    def zeros(
        cls,
        params: Sequence[Tensor],
        *,
        rule: str = "adam",
        states: str = "8bit",
        master: str = "stochastic",
        block_size: int = 256,
        keys: Sequence[int] | None = None,
    ) -> OptimizerStates:
        """States of parameters that have taken no step yet, on the parameters' devices.

        keys: default to 0, 1, 2, ... Raises ValueError for a rule, kind of states, master or block size (64, 128, 256,
        512, 1024, 2048) that does not exist.
        """
        check_layout(rule=rule, states=states, master=master, block_size=block_size)
        made = cls([], [], [], [], [], [], [], list(range(len(params)) if keys is None else keys), rule, states, master)
        made.block_size = block_size
        for p in params:
            for moment, scale in ((made.first, made.first_scale), (made.second, made.second_scale)):
                if moment is made.second and rule != "adam":
                    continue
                dtype = torch.uint8 if states == "8bit" else torch.float32
                moment.append(torch.zeros(p.shape, dtype=dtype, device=p.device))
                if states == "8bit":
                    scale.append(torch.zeros(scale_shape(p.shape, block_size), dtype=torch.float32, device=p.device))
            if master in ("ecc8", "fp32"):
                made.masters.append(master_of(p, master))
            made.steps.append(torch.zeros((), dtype=torch.float64, device=p.device))
            if rule == "adam":
                made.beta_powers.append(torch.ones(2, dtype=torch.float64, device=p.device))
        return made

    def lists(self) -> tuple[list[Tensor], ...]:
        """The lists of tensors in the order the operation takes them."""
        return (
            self.first,
            self.first_scale,
            self.second,
            self.second_scale,
            self.masters,
            self.steps,
            self.beta_powers,
        )

    def decode(self, index: int) -> tuple[Tensor, Tensor | None]:
        """The moments (m, v) of parameter `index` as fp32 tensors of its shape; v is None where there is none."""
        first = self.first[index]
        second = self.second[index] if self.second else None
        if self.states == "fp32":
            return first, second
        m = decode_moment(first, self.first_scale[index], self.block_size)
        if second is None:
            return m, None
        return m, decode_square(second, self.second_scale[index], self.block_size)


def scale_shape(shape: Sequence[int], block_size: int) -> tuple[int, ...]:
    """The shape of the scales of a moment of this shape."""
    in_row = -(-row_length(shape) // block_size)
    return (shape[0], in_row) if len(shape) > 1 else (in_row,)


def decode_moment(code: Tensor, scale: Tensor, block_size: int) -> Tensor:
    """The first moment of these codes, fp32 of their shape."""
    row = row_length(code.shape)
    return from_blocks(decode_signed(to_blocks(code, block_size, row), scale.flatten()), code, row)


def decode_square(code: Tensor, scale: Tensor, block_size: int) -> Tensor:
    """The second moment v of these codes, fp32 of their shape."""
    row = row_length(code.shape)
    root = decode_root(to_blocks(code, block_size, row), scale.flatten())
    return from_blocks(root * root, code, row)


def encode_moment(m: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a first moment."""
    row = row_length(m.shape)
    code, scale = encode_signed(to_blocks(m.float(), block_size, row))
    return from_blocks(code, m, row).contiguous(), scale.view(scale_shape(m.shape, block_size))


def encode_square(v: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a second moment; of its root, that is."""
    row = row_length(v.shape)
    code, scale = encode_root(to_blocks(v.float().sqrt(), block_size, row))
    return from_blocks(code, v, row).contiguous(), scale.view(scale_shape(v.shape, block_size))


def master_of(p: Tensor, master: str) -> Tensor:
    """What this master keeps beside a parameter that has taken no step: nothing (no elements) if it is fp32."""
    if p.dtype != torch.bfloat16:
        return torch.zeros(0, dtype=torch.float32, device=p.device)
    if master == "ecc8":
        return torch.zeros(p.shape, dtype=torch.uint8, device=p.device)
    check_memory([p], "a parameter")
    return p.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def check_layout(*, rule: str, states: str, master: str, block_size: int) -> None:
    """ValueError naming the first option that the kernels do not have."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
    if states not in STATES:
        raise ValueError(f"states must be '8bit' or 'fp32'; got {states!r}")
    if master not in MASTERS:
        raise ValueError(f"master must be one of {', '.join(MASTERS)}; got {master!r}")
    if isinstance(block_size, bool) or block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}; got {block_size!r}")


def check_parameter(p: Tensor, name: str = "params") -> None:
    """TypeError unless `p` is a dense fp32 or bf16 tensor."""
    if p.layout != torch.strided or p.dtype not in DTYPES:
        raise TypeError(f"{name} must be dense fp32 or bf16 tensors; got {p.dtype} with layout {p.layout}")


LOW_ADDRESS = 2**40
"""Memory lies above, so an address below is likely the offset of a view into memory that was freed."""


def check_memory(tensors: Sequence[Tensor], what: str) -> None:
    """ValueError unless the elements of these lie in memory whose address a kernel may be given; costs a look each."""
    with contextlib.suppress(RuntimeError):  # of wrappers
        if min([t.data_ptr() for t in tensors], default=LOW_ADDRESS) >= LOW_ADDRESS:
            return
    for t in tensors:
        refused = None
        try:
            if t.data_ptr() >= LOW_ADDRESS or t.numel() == 0:
                continue
            lost = t.untyped_storage().data_ptr() == 0
        except RuntimeError as error:  # of fake tensors, and of wrappers (theirs is a NotImplementedError)
            lost, refused = True, error
        if lost:
            raise ValueError(
                f"{what} of shape {tuple(t.shape)} on {t.device} has no memory: it was freed, or never there "
                "(a fake or meta tensor, or a wrapper of others); bring it back before a step"
            ) from refused


def check_writable(p: Tensor) -> None:
    """ValueError for a parameter of which several elements are one in memory."""
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is expanded: elements share memory and cannot take steps of their "
            "own; clone() it"
        )


def state_shapes(
    p: Tensor, *, rule: str, states: str, master: str, block_size: int
) -> list[tuple[tuple[int, ...], torch.dtype] | None]:
    """Shape and dtype of each of a parameter's states in the order of `OptimizerStates.lists`, None where there is
    none."""
    coded, adam = states == "8bit", rule == "adam"
    moment = (tuple(p.shape), torch.uint8 if coded else torch.float32)
    scale = (scale_shape(p.shape, block_size), torch.float32) if coded else None
    kept: tuple[tuple[int, ...], torch.dtype] | None = None
    if master in ("ecc8", "fp32"):
        kept = ((0,), torch.float32)
        if p.dtype == torch.bfloat16:
            kept = (tuple(p.shape), torch.uint8 if master == "ecc8" else torch.float32)
    return [
        moment,
        scale,
        moment if adam else None,
        scale if adam else None,
        kept,
        ((), torch.float64),
        ((2,), torch.float64) if adam else None,
    ]


def fits(state: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """What the kernels rely on and do not check."""
    if not isinstance(state, Tensor):
        return False
    return state.dtype is dtype and state.shape == shape and state.device == device and state.is_contiguous()
