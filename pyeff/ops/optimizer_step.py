"""One step of Adam, AdamW, Lion or SGD over a list of parameters whose moments live in 8 bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyeff._extension import extension
from pyeff.ops._dispatch import Operation
from pyeff.reference.optimizer_step import (
    CODE,
    MASTERS,
    RULES,
    OptimizerRule,
    decode_root,
    decode_signed,
    encode_root,
    encode_signed,
    from_blocks,
    row_length,
    to_blocks,
)
from pyeff.reference.optimizer_step import optimizer_step as reference_step

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # csrc/common/optimizer_step.h
WEIGHTS = {"none": 1, "stochastic": 2, "ecc8": 3, "fp32": 4}  # of bf16 parameters; fp32 ones are 0
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048)
FIELDS = 16  # of OptimizerTensor; the first two are the addresses of the parameter and its gradient
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
                    scale.append(torch.zeros(scale_shape(p.shape, block_size), device=p.device))
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
        return torch.zeros(0, device=p.device)
    if master == "ecc8":
        return torch.zeros(p.shape, dtype=torch.uint8, device=p.device)
    return p.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def optimizer_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: OptimizerStates,
    rule: OptimizerRule,
    *,
    norm: Tensor | None = None,
    lr: Tensor | None = None,
    skipped: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Take one step in place, for all parameters in one call and, on a GPU, one launch for all dtypes.

    The formulas are torch's, in torch's order (Lion's are its paper's), computed in fp32; only what is kept between
    steps is rounded: see `pyeff.reference.optimizer_step`. params: fp32 or bf16, any shape; grads: the same shapes,
    fp32 or bf16; `states` from `OptimizerStates.zeros(params)`. All are on one device and read or changed in place.

    norm: float64 scalar on that device, the norm of the gradients (`pyeff.global_norm`). `rule.clip_norm` needs it.
    If it is NaN or Inf nothing changes but `skipped` (int64 scalar), which goes up by one. lr: fp32 scalar on the
    device that takes the place of `rule.lr`; nothing then waits for the device, and the call can be captured in a
    CUDA graph. A NaN or Inf gradient without a norm makes that weight NaN, as in torch (SGD, Adam), and leaves its
    block alone: scales are taken from finite values, and the element's own codes saturate.

    Every parameter counts its own steps, and beta^t is a running product, so betas may change between steps. All
    implementations give the same bits (NaN payloads aside), whatever the order or the splitting of the list, on any
    number of threads; random bits depend on `rule.seed`, `states.keys`, the step and the element alone. impl="auto"
    takes "cuda" for CUDA tensors and "cpu" for CPU tensors where the compiled extension can run, else "reference".

    Raises ValueError or TypeError when shapes, dtypes, devices, layouts or hyperparameters do not fit, before anything
    is changed. Cost for Adam: 16 bytes moved per fp32 parameter with fp32 gradient, 10 with bf16 for both (12 with
    "ecc8", 16 with "fp32"); no memory is allocated except a copy of each parameter or gradient that is not contiguous.

    Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022); Loshchilov and Hutter, Decoupled Weight
    Decay Regularization (2019); Chen et al., Symbolic Discovery of Optimization Algorithms (2023).

    >>> p, g = torch.ones(1000), torch.full((1000,), 0.5)
    >>> states = OptimizerStates.zeros([p])
    >>> optimizer_step([p], [g], states, OptimizerRule("adam", lr=0.1))
    >>> print(f"{p[0]:.4f}")
    0.9000
    """
    params, grads = list(params), list(grads)
    lists = states.lists()
    _check(params, grads, states, rule, lists)
    check_rule(rule)
    chosen = OPERATION.explain(params, grads, impl=impl).impl
    for name, scalar, dtype in (
        ("norm", norm, torch.float64),
        ("lr", lr, torch.float32),
        ("skipped", skipped, torch.int64),
    ):
        if scalar is not None and params:
            check_scalar(name, scalar, dtype, params[0].device)
    if rule.clip_norm < math.inf and norm is None:
        raise ValueError("rule.clip_norm needs norm, the norm of all gradients; got None")
    if params:
        step(
            params,
            grads,
            *lists,
            norm,
            lr,
            skipped,
            rule=rule.rule,
            numbers=[float(getattr(rule, name)) for name in _NUMBERS],
            integers=[int(getattr(rule, name)) for name in _INTEGERS],
            master=states.master,
            keys=states.keys,
            impl=chosen,
        )


_NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "dampening", "clip_norm")
_INTEGERS = ("seed", "block_size", "coded", "coupled", "nesterov")


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


def check_rule(rule: OptimizerRule) -> None:
    """ValueError naming the first hyperparameter that is out of range (NaN is)."""
    if rule.rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule.rule!r}")
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= float(getattr(rule, name)) < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite; got {getattr(rule, name)!r}")
    if not (0.0 <= float(rule.beta1) < 1.0 and 0.0 <= float(rule.beta2) < 1.0):
        what = "momentum must be a number" if rule.rule == "sgd" else "betas must be two numbers"
        raise ValueError(f"{what} in [0, 1); got {rule.beta1!r} and {rule.beta2!r}")
    if not 0.0 <= float(rule.dampening) <= 1.0:
        raise ValueError(f"dampening must be in [0, 1]; got {rule.dampening!r}")
    if rule.nesterov and rule.dampening:
        raise ValueError(f"nesterov needs dampening 0; got {rule.dampening!r}")
    if not float(rule.clip_norm) > 0.0:
        raise ValueError(f"clip_norm must be > 0, or None not to clip; got {rule.clip_norm!r}")
    if isinstance(rule.seed, bool) or not isinstance(rule.seed, int) or not 0 <= rule.seed < 2**63:
        raise ValueError(f"seed must be an integer in [0, 2^63); got {rule.seed!r}")


def check_parameter(p: Tensor, name: str = "params") -> None:
    """TypeError unless `p` is a dense fp32 or bf16 tensor."""
    if p.layout != torch.strided or p.dtype not in DTYPES:
        raise TypeError(f"{name} must be dense fp32 or bf16 tensors; got {p.dtype} with layout {p.layout}")


def check_scalar(name: str, scalar: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError unless this is one number of that dtype on that device."""
    if scalar.numel() != 1 or scalar.dtype != dtype or scalar.device != device:
        raise ValueError(
            f"{name} must be one {dtype} number on {device}; "
            f"got {scalar.dtype} {tuple(scalar.shape)} on {scalar.device}"
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


def fits(state: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """What the kernels rely on and do not check."""
    return state.dtype is dtype and state.shape == shape and state.device == device and state.is_contiguous()


_LISTS = ("first", "first_scale", "second", "second_scale", "masters", "steps", "beta_powers")


def _check(
    params: list[Tensor],
    grads: list[Tensor],
    states: OptimizerStates,
    rule: OptimizerRule,
    lists: tuple[list[Tensor], ...],
) -> None:
    layout: dict[str, Any] = {"rule": states.rule, "states": states.states, "master": states.master}
    layout["block_size"] = states.block_size
    check_layout(**layout)
    if (rule.rule, rule.coded, rule.block_size) != (states.rule, states.states == "8bit", states.block_size):
        raise ValueError(
            f"the rule is for {rule.rule!r} with coded={rule.coded} and block_size={rule.block_size}; the states are "
            f"{states.states} of {states.rule!r} with block_size={states.block_size}"
        )
    if states.code != CODE:
        raise ValueError(f"states are in code {states.code!r}; this version reads {CODE!r}")
    if len(grads) != len(params) or len(states.keys) != len(params):
        raise ValueError(
            f"{len(params)} params need as many grads and states; got {len(grads)} grads and {len(states.keys)} keys"
        )
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
        for name, one, expected in zip(_LISTS, lists, state_shapes(p, **layout), strict=True):
            if len(one) != (0 if expected is None else len(params)):
                raise ValueError(
                    f"states.{name} must have {0 if expected is None else len(params)} tensors; got {len(one)}"
                )
            if expected is not None and not fits(one[i], *expected, p.device):
                raise ValueError(
                    f"states.{name}[{i}] must be contiguous {expected[1]} {expected[0]} on {p.device}; "
                    f"got {one[i].dtype} {tuple(one[i].shape)} on {one[i].device}"
                )


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
            return
        # The kernels read flat memory; what is not flat is copied before a step, and a parameter copied back after it.
        self._flat_params = [
            p if p.is_contiguous() else torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in params
        ]
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
        self._rows = torch.tensor(columns, dtype=torch.int64).T.contiguous()
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
        """Take the gradients of the next step; costs a look at each address where they are those of the last."""
        self.grads = list(grads)
        if self.impl == "reference":
            return
        key = [(g.data_ptr(), g.dtype, g.is_contiguous()) for g in self.grads]
        if key == self._gradient_key and not self._copied_grads:
            return
        self._gradient_key, self._copied_grads = key, []
        flat_grads = []
        for g in self.grads:
            flat = g
            if not g.is_contiguous():
                flat = torch.empty(g.shape, dtype=g.dtype, device=g.device)
                self._copied_grads.append((g, flat))
            flat_grads.append(flat)
        columns = [[g.data_ptr() for g in flat_grads], [DTYPES[g.dtype] for g in flat_grads]]
        self._rows[:, 1], self._rows[:, 11] = torch.tensor(columns, dtype=torch.int64)
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


def _numbers(rule: OptimizerRule) -> tuple[float | int, ...]:
    """struct OptimizerRule of csrc/common/optimizer_step.h."""
    return (
        *(float(getattr(rule, name)) for name in _NUMBERS),
        rule.seed,
        rule.block_size,
        RULES.index(rule.rule),
        int(rule.coded),
        int(rule.coupled),
        int(rule.nesterov),
    )


# Lists of tensors go through the dispatcher as they are; every argument that changes is declared so.
torch.library.define(
    "pyeff::optimizer_step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] first, Tensor(c!)[] first_scale, Tensor(d!)[] second, "
    "Tensor(e!)[] second_scale, Tensor(f!)[] masters, Tensor(g!)[] steps, Tensor(h!)[] beta_powers, Tensor? norm, "
    "Tensor? lr, Tensor(i!)? skipped, *, str rule, float[] numbers, int[] integers, str master, int[] keys, "
    "str impl) -> ()",
)


@torch.library.impl("pyeff::optimizer_step", ("CPU", "CUDA"))
def _step(
    params: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    first_scale: list[Tensor],
    second: list[Tensor],
    second_scale: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    beta_powers: list[Tensor],
    norm: Tensor | None,
    lr: Tensor | None,
    skipped: Tensor | None,
    *,
    rule: str,
    numbers: list[float],
    integers: list[int],
    master: str,
    keys: list[int],
    impl: str,
) -> None:
    seed, block_size, coded, coupled, nesterov = integers
    made = OptimizerRule(
        rule,
        **dict(zip(_NUMBERS, numbers, strict=True)),
        seed=seed,
        block_size=block_size,
        coded=bool(coded),
        coupled=bool(coupled),
        nesterov=bool(nesterov),
    )
    lists = (first, first_scale, second, second_scale, masters, steps, beta_powers)
    plan = StepPlan(params, grads, lists, master=master, block_size=block_size, keys=keys, impl=impl)
    plan.step(made, norm=norm, lr=lr, skipped=skipped)


@torch.library.register_fake("pyeff::optimizer_step")
def _step_fake(*args: Any, **kwargs: Any) -> None:
    return None


step = torch.ops.pyeff.optimizer_step.default

OPERATION = Operation("optimizer_step", ("cuda", "cpu", "reference"))
