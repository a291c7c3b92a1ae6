"""One AdamW step over a list of parameters whose moments live in 8 bits."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyeff._extension import extension
from pyeff.ops._dispatch import Operation
from pyeff.reference.adamw8bit_step import CODE, AdamWScalars, decode_exp_avg, decode_root, from_blocks, to_blocks
from pyeff.reference.adamw8bit_step import adamw8bit_step as reference_step

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # csrc/common/adamw8bit.h
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048)


@dataclass
class AdamWStates:
    """The 8-bit moments of a list of parameters, and beta^t.

    For a parameter of n elements and blocks of b: two code tensors uint8 of the parameter's shape, contiguous, one
    for the first moment m and one for sqrt(v) of the second, and two scale tensors fp32 [ceil(n / b)]. Blocks are cut
    from the flattened parameter. 2 + 8 / b bytes per parameter. `code` names how bytes stand for numbers
    (docs/optimizer_states.md).

    >>> states = AdamWStates.zeros([torch.zeros(3, 100)])
    >>> states.exp_avg_code[0].shape, states.exp_avg_scale[0].shape
    (torch.Size([3, 100]), torch.Size([2]))
    """

    exp_avg_code: list[Tensor]
    exp_avg_scale: list[Tensor]
    exp_avg_sq_code: list[Tensor]
    exp_avg_sq_scale: list[Tensor]
    block_size: int = 256
    beta1_power: float = 1.0
    beta2_power: float = 1.0
    code: str = CODE

    @classmethod
    def zeros(cls, params: Sequence[Tensor], *, block_size: int = 256) -> AdamWStates:
        """States of parameters that have taken no step yet, on the parameters' devices.

        Raises ValueError for a block size that is not one of 64, 128, 256, 512, 1024, 2048.
        """
        check_block_size(block_size)
        states = cls([], [], [], [], block_size=block_size)
        for p in params:
            blocks = -(-p.numel() // block_size)
            for code, scale in (
                (states.exp_avg_code, states.exp_avg_scale),
                (states.exp_avg_sq_code, states.exp_avg_sq_scale),
            ):
                code.append(torch.zeros(p.shape, dtype=torch.uint8, device=p.device))
                scale.append(torch.zeros(blocks, dtype=torch.float32, device=p.device))
        return states

    def decode(self, index: int) -> tuple[Tensor, Tensor]:
        """The moments (m, v) of parameter `index` as fp32 tensors of its shape; v as the kernels read it."""
        code_m, code_v = self.exp_avg_code[index], self.exp_avg_sq_code[index]
        m = decode_exp_avg(to_blocks(code_m, self.block_size), self.exp_avg_scale[index])
        root = decode_root(to_blocks(code_v, self.block_size), self.exp_avg_sq_scale[index] / 256)
        return from_blocks(m, code_m), from_blocks(root * root, code_v)


def adamw8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: AdamWStates,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    impl: str = "auto",
) -> None:
    """Take one AdamW step in place, for all parameters in one call.

    With t the number of steps taken including this one, and m, sqrt(v) read from and written to 8-bit codes:

        p <- p (1 - lr weight_decay)
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    This is torch.optim.AdamW's order and formula; only what is kept between steps is rounded to 8 bits. params: fp32
    or bf16, any shape; grads: the same shapes, fp32 or bf16; `states` from `AdamWStates.zeros(params)`. All three are
    modified or read in place and may be on one device only. beta^t is a running product in `states`, so betas may
    change between steps.

    bf16 parameters are rounded to nearest even once a step: weight decay or updates below 2^-9 of a weight are then
    lost altogether. A NaN or Inf gradient makes that weight NaN (as in torch) and leaves its block alone: scales are
    taken from finite values, and the element's own codes saturate.

    All implementations give the same bits (NaN payloads aside), whatever the order or the splitting of the list, on
    any number of threads. impl="auto" takes "cuda" for CUDA tensors and "cpu" for CPU tensors where the compiled
    extension can run, else "reference".

    Raises ValueError or TypeError when shapes, dtypes, devices, layouts or hyperparameters do not fit, before anything
    is changed. Cost: 16 bytes moved per fp32 parameter with fp32 gradient, 10 with bf16 for both; no memory is
    allocated except a copy of each parameter or gradient that is not contiguous.

    Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022); Loshchilov and Hutter, Decoupled Weight
    Decay Regularization (2019).

    >>> p, g = torch.ones(1000), torch.full((1000,), 0.5)
    >>> states = AdamWStates.zeros([p])
    >>> adamw8bit_step([p], [g], states, lr=0.1, weight_decay=0.0)
    >>> print(f"{p[0]:.4f}")
    0.9000
    """
    params, grads = list(params), list(grads)
    lists = _state_lists(states)
    _check(params, grads, states, lists, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    chosen = OPERATION.explain(params, grads, states, lr=lr, impl=impl).impl
    beta1, beta2 = float(betas[0]), float(betas[1])
    beta1_power, beta2_power = states.beta1_power * beta1, states.beta2_power * beta2
    if params:
        step(
            params,
            grads,
            *lists,
            block_size=states.block_size,
            lr=float(lr),
            beta1=beta1,
            beta2=beta2,
            eps=float(eps),
            weight_decay=float(weight_decay),
            beta1_power=beta1_power,
            beta2_power=beta2_power,
            impl=chosen,
        )
    states.beta1_power, states.beta2_power = beta1_power, beta2_power


def check_block_size(block_size: int) -> None:
    """ValueError unless the kernels have this block size."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}; got {block_size!r}")


def _state_lists(states: AdamWStates) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    return states.exp_avg_code, states.exp_avg_scale, states.exp_avg_sq_code, states.exp_avg_sq_scale


def check_hyperparameters(*, lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> None:
    """ValueError naming the first of AdamW's hyperparameters that is out of range (NaN is)."""
    if not float(lr) >= 0.0:
        raise ValueError(f"lr must be >= 0; got {lr!r}")
    if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1); got {betas!r}")
    if not float(eps) >= 0.0:
        raise ValueError(f"eps must be >= 0; got {eps!r}")
    if not float(weight_decay) >= 0.0:
        raise ValueError(f"weight_decay must be >= 0; got {weight_decay!r}")


def check_parameter(p: Tensor, name: str = "params") -> None:
    """TypeError unless `p` is a dense fp32 or bf16 tensor."""
    if p.layout != torch.strided or p.dtype not in DTYPES:
        raise TypeError(f"{name} must be dense fp32 or bf16 tensors; got {p.dtype} with layout {p.layout}")


def fits_states(
    p: Tensor, code_m: Tensor, scale_m: Tensor, code_v: Tensor, scale_v: Tensor, *, block_size: int
) -> bool:
    """Whether these are the states of a parameter like `p`: what the kernels rely on and do not check."""
    shape, device, blocks = p.shape, p.device, (-(-p.numel() // block_size),)
    # Written out: this runs for every parameter in every step.
    return (
        code_m.shape == shape
        and code_v.shape == shape
        and scale_m.shape == blocks
        and scale_v.shape == blocks
        and code_m.dtype is code_v.dtype is torch.uint8
        and scale_m.dtype is scale_v.dtype is torch.float32
        and device == code_m.device == scale_m.device == code_v.device == scale_v.device
        and code_m.is_contiguous()
        and scale_m.is_contiguous()
        and code_v.is_contiguous()
        and scale_v.is_contiguous()
    )


def _check(
    params: list[Tensor],
    grads: list[Tensor],
    states: AdamWStates,
    lists: tuple[list[Tensor], ...],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    check_hyperparameters(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    check_block_size(states.block_size)
    if states.code != CODE:
        raise ValueError(f"states are in code {states.code!r}; this version reads {CODE!r}")
    if len(grads) != len(params) or any(len(one) != len(params) for one in lists):
        lengths = ", ".join(str(len(one)) for one in lists)
        raise ValueError(f"{len(params)} params need as many grads and states; got {len(grads)} and {lengths}")
    if len({id(p) for p in params}) != len(params):
        # Both entries would be written at once, by different threads.
        raise ValueError("params must be different tensors; one of them is given twice")
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        check_parameter(p, f"params[{i}]")
        check_parameter(g, f"grads[{i}]")
        if p.device != params[0].device:
            raise ValueError(f"params[{i}] is on {p.device} and params[0] on {params[0].device}; call once per device")
        if g.shape != p.shape or g.device != p.device:
            raise ValueError(
                f"grads[{i}] must be {tuple(p.shape)} on {p.device} like its parameter; "
                f"got {tuple(g.shape)} on {g.device}"
            )
        blocks = -(-p.numel() // states.block_size)
        for code, scale in ((lists[0][i], lists[1][i]), (lists[2][i], lists[3][i])):
            if (code.shape, code.dtype, code.device) != (p.shape, torch.uint8, p.device) or not code.is_contiguous():
                raise ValueError(
                    f"states: the codes of params[{i}] must be contiguous uint8 {tuple(p.shape)} on {p.device}; "
                    f"got {code.dtype} {tuple(code.shape)} on {code.device}"
                )
            if (scale.shape, scale.dtype, scale.device) != (
                (blocks,),
                torch.float32,
                p.device,
            ) or not scale.is_contiguous():
                raise ValueError(
                    f"states: the scales of params[{i}] must be contiguous fp32 [{blocks}] on {p.device}; "
                    f"got {scale.dtype} {tuple(scale.shape)} on {scale.device}"
                )


# Lists of tensors go through the dispatcher as they are; every argument that changes is declared so.
torch.library.define(
    "pyeff::adamw8bit_step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg_code, Tensor(c!)[] exp_avg_scale, "
    "Tensor(d!)[] exp_avg_sq_code, Tensor(e!)[] exp_avg_sq_scale, *, int block_size, float lr, float beta1, "
    "float beta2, float eps, float weight_decay, float beta1_power, float beta2_power, str impl) -> ()",
)


@torch.library.impl("pyeff::adamw8bit_step", ("CPU", "CUDA"))
def _step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg_code: list[Tensor],
    exp_avg_scale: list[Tensor],
    exp_avg_sq_code: list[Tensor],
    exp_avg_sq_scale: list[Tensor],
    *,
    block_size: int,
    impl: str,
    **hyperparameters: float,
) -> None:
    scalars = AdamWScalars.of(**hyperparameters)
    states = (exp_avg_code, exp_avg_scale, exp_avg_sq_code, exp_avg_sq_scale)
    if impl == "reference":
        reference_step(params, grads, *states, scalars=scalars, block_size=block_size)
        return
    # The kernels read flat memory; what is not flat is copied, and a parameter copied back.
    flat_params = [p if p.is_contiguous() else p.contiguous() for p in params]
    flat_grads = [g if g.is_contiguous() else g.contiguous() for g in grads]
    numbers = dataclasses.astuple(scalars)
    if impl == "cpu":
        fields = [x for row in zip(flat_params, flat_grads, *states, strict=True) for x in _fields(*row)]
        extension().adamw8bit_step(fields, block_size, numbers, torch.get_num_threads())
    else:
        _launch(flat_params, flat_grads, states, block_size, numbers)
    for p, flat in zip(params, flat_params, strict=True):
        if flat is not p:
            p.copy_(flat)
    # The kernels write behind autograd's back: a graph that still holds the old values must not be run backward.
    torch.autograd.graph.increment_version([p for p in params if not p.is_inference()])


def _fields(p: Tensor, g: Tensor, code_m: Tensor, scale_m: Tensor, code_v: Tensor, scale_v: Tensor) -> tuple[int, ...]:
    """struct AdamWTensor of csrc/common/adamw8bit.h."""
    return (
        p.data_ptr(),
        g.data_ptr(),
        code_m.data_ptr(),
        scale_m.data_ptr(),
        code_v.data_ptr(),
        scale_v.data_ptr(),
        p.numel(),
        DTYPES[p.dtype],
        DTYPES[g.dtype],
    )


_CHUNK = 4096  # ADAMW_CHUNK of csrc/cuda/adamw8bit.h
# Tables on the device, by device and content. The chunks of a list of parameters never change; addresses change only
# when a gradient moves, and torch's allocator mostly hands back the same ones.
_TABLES: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
_MOST_TABLES = 64


def _launch(
    params: list[Tensor],
    grads: list[Tensor],
    states: tuple[list[Tensor], ...],
    block_size: int,
    numbers: tuple[float, ...],
) -> None:
    """One launch for each combination of dtypes, on the current stream; nothing waits for the device."""
    rows: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for row in zip(params, grads, *states, strict=True):
        fields = _fields(*row)
        if fields[6]:
            rows.setdefault((fields[7], fields[8]), []).append(fields)
    device = params[0].device
    stream = torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        for (p_dtype, g_dtype), tensors in rows.items():
            chunks = _table(_chunks, tuple(fields[6] for fields in tensors), stream)
            table = _table(_integers, tuple(x for fields in tensors for x in fields), stream)
            extension().adamw8bit_step_cuda(
                table.data_ptr(), chunks.data_ptr(), len(chunks), p_dtype, g_dtype, block_size, numbers,
                stream.cuda_stream,
            )  # fmt: skip


def _chunks(sizes: tuple[int, ...]) -> Tensor:
    """int32 [chunks, 2]: which tensor, and which chunk of it."""
    counts = torch.tensor([-(-size // _CHUNK) for size in sizes], dtype=torch.int64)
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    index = torch.arange(len(tensor)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensor, index], dim=1).to(torch.int32)


def _integers(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _table(build: Callable[[tuple[int, ...]], Tensor], content: tuple[int, ...], stream: torch.cuda.Stream) -> Tensor:
    # A table belongs to a stream: on it, copy and kernels are in order, and so is a reuse of its memory.
    key = (stream.device, stream.cuda_stream, build, content)
    table = _TABLES.get(key)
    if table is None:
        # From pinned memory the copy does not wait, and torch keeps that memory until it is done.
        table = _TABLES[key] = build(content).pin_memory().to(stream.device, non_blocking=True)
        while len(_TABLES) > _MOST_TABLES:
            _TABLES.popitem(last=False)
    else:
        _TABLES.move_to_end(key)
    return table


@torch.library.register_fake("pyeff::adamw8bit_step")
def _step_fake(*args: Any, **kwargs: Any) -> None:
    return None


step = torch.ops.pyeff.adamw8bit_step.default


OPERATION = Operation("adamw8bit_step", ("cuda", "cpu", "reference"))
