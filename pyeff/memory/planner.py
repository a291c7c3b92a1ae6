"""What a training step needs in memory, when it needs it, what fits, and what a change would buy."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from pyeff.memory.architecture import LINEARS, Parameter
from pyeff.memory.planned_model import Source, trace_model
from pyeff.memory.plans import Compress, DType, Layer, Option, Phase, Plan, Release, Settings, parse_size
from pyeff.memory.rates import Rates, estimated_rates
from pyeff.memory.states import (
    WITHOUT_OFFLOAD,
    Master,
    Optimizer,
    slot_bytes,
    state_bytes,
    step_flops,
    step_traffic,
    step_working,
)
from pyeff.memory.tape import Moment, Simulation, simulate
from pyeff.memory.transformer import Checkpointing, Head, Work, record_step

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

# The workspace that the GPU's matrix library takes from torch's allocator (on Hopper; less before).
_LIBRARY_BYTES = {"cuda": 32 * 2**20, "cpu": 0}
_NO_MORE = 2**24  # rows or tokens beyond which nobody asks


def plan(
    model: nn.Module | Any | str | Path,
    *,
    seq_len: int,
    batch: int = 1,
    accumulation: int = 1,
    packed: bool = False,
    dtype: DType | None = None,
    optimizer: Optimizer = "adamw",
    master: Master = "none",
    offload: bool = False,
    release: Release = "none",
    checkpointing: Checkpointing = "none",
    compress: Compress | None = None,
    offload_activations: bool = False,
    head: Head = "logits",
    head_tokens: int | None = None,
    lora_rank: int = 0,
    lora_targets: Iterable[str] = ("q_proj", "v_proj"),
    lora_dropout: float = 0.0,
    device: str = "cuda",
    device_memory: int | str | None = None,
    rates: Rates | str | None = None,
    other_bytes: int = 0,
    inputs: Mapping[str, Any] | None = None,
) -> Plan:
    """Say what one training step of a model keeps in memory, when most is needed, and what would make it fit.

    M(t) = M_theta + M_O + M_G(t) + M_A(t) + working memory, at the fullest moment of the forward, the head's backward,
    the layers' backward and the optimizer's step; states are there from the second step on. For Llama-like models
    and GPT-2 the activations are an account of every tensor that PyTorch saves (see docs/memory.md); for any other
    model the step is traced on fake tensors. Nothing is allocated and no weights are read.

    Args:
        model: a transformers configuration, its directory or name, or a module (on any device, meta included).
        seq_len, batch: tokens of a row and rows of one forward; with `packed`, one row of `seq_len` tokens that a
            dense mask cuts into samples.
        accumulation: forwards whose gradients are summed before a step.
        dtype: of weights and activations; by default the module's own, or bfloat16.
        optimizer, master: see `pyeff.memory.states`; "adamw" is torch's. Classes' names will do: "AdamW8bit".
        offload: states in host memory; nothing changes on a CPU. release: "one-pass" steps parameters inside the
            backward (`pyeff.optim.GradientRelease`), without clipping or by the norm of the step before; "two-pass"
            clips exactly and runs everything twice. Both are for pyeff's optimizers.
        checkpointing: "none"; "layer", torch.utils.checkpoint around each decoder layer; "attention",
            `pyeff.checkpoint`, which keeps attention's output and log-sum-exps instead of computing them again.
        compress, offload_activations: `compress` and `offload` of `pyeff.checkpoint`: layers' inputs in a byte an
            element, "fp8" or "int8"; what is kept in host memory, which changes nothing on a CPU.
        head: "logits" as transformers' loss, "fused" without logits in memory. head_tokens: positions with a loss.
        lora_rank, lora_targets, lora_dropout: train adapters of modules with these names; 0 trains everything.
        device: "cuda" or "cpu": their attention kernels and masks of dropout differ.
        device_memory: bytes, or text like "24GB" or "80GiB".
        rates: how fast the device is, or the name of a GPU for an estimate; without it options rank by FLOPs.
        other_bytes: what the caller holds besides, such as averaged weights.
        inputs: keyword arguments of a module that is no causal language model, as tensors on any device.

    Raises ValueError for sizes and choices that cannot be, `UserError` for a model that cannot be read.

    Cost: 10 to 100 ms an option, about a hundred options and sizes looked at; nothing on the device.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8)
    >>> found = plan(config, seq_len=1024, batch=4, device_memory="2GB")
    >>> found.fits, found.peak.name
    (False, 'head backward')
    >>> found.best_change.name
    'batch 1 accumulated'
    """
    bytes_given = parse_size(device_memory, name="device_memory") if device_memory is not None else None
    source = Source(model, dtype, inputs)
    targets = tuple(lora_targets) if lora_rank else ()
    settings = Settings(
        seq_len=seq_len,
        batch=batch,
        accumulation=accumulation,
        dtype=source.dtype,
        optimizer=cast("Optimizer", optimizer.lower()) if isinstance(optimizer, str) else optimizer,
        master=master,
        offload=offload,
        release=release,
        checkpointing=checkpointing,
        compress=compress,
        offload_activations=offload_activations,
        head=head,
        packed=packed,
        lora_rank=lora_rank,
        lora_targets=targets,
        lora_dropout=lora_dropout,
        head_tokens=head_tokens,
        device=device,
    )
    if isinstance(rates, str):
        rates = estimated_rates(rates, itemsize=settings.itemsize)
    if bytes_given is None and rates is not None:
        bytes_given = rates.memory
    planner = Planner(source, other_bytes=other_bytes, rates=rates, device_memory=bytes_given)
    return planner.plan(settings)


class Planner:
    """Plans for one model, one device and many settings; `plan` makes one."""

    def __init__(
        self, source: Source, *, other_bytes: int = 0, rates: Rates | None = None, device_memory: int | None = None
    ) -> None:
        self.source, self.rates, self.device_memory = source, rates, device_memory
        self.other = other_bytes
        self._simulations: dict[Settings, Simulation] = {}
        self._parameters: dict[tuple[Any, ...], list[Parameter]] = {}
        self._traces: dict[Settings, Any] = {}

    def parameters(self, settings: Settings) -> list[Parameter]:
        """Every parameter under these settings."""
        key = (settings.dtype, settings.lora_rank, settings.lora_targets)
        if key not in self._parameters:
            self._parameters[key] = self.source.parameters(settings)
        return self._parameters[key]

    def phases(self, settings: Settings) -> tuple[Phase, ...]:
        """The fullest moments of a step."""
        parameters = self.parameters(settings)
        theta = sum(p.nbytes for p in parameters) + self.source.buffer_bytes()
        states = self.states(settings)
        released = settings.release != "none"
        gradients = 0 if released else sum(p.nbytes for p in parameters if p.trained)
        other = self.other + _LIBRARY_BYTES[settings.device]

        def phase(moment: Moment) -> Phase:
            return Phase(moment.phase, theta, states, moment.gradients, moment.activations, moment.working, other)

        working = step_working(parameters, settings.optimizer, settings.device)
        step = Phase("optimizer step", theta, states, gradients, 0, working, other)
        return (*(phase(moment) for moment in self._moments(settings)), step)

    def states(self, settings: Settings) -> int:
        """Bytes of the optimizer's states on the device, two slots for them included."""
        parameters = self.parameters(settings)
        if settings.offload and settings.device == "cuda":
            return slot_bytes(parameters, settings.optimizer, settings.master)
        return sum(state_bytes(p, settings.optimizer, settings.master) for p in parameters)

    def _moments(self, settings: Settings) -> tuple[Moment, ...]:
        if self.source.architecture is not None:
            found = self._simulate(settings)
            return (found.phases[0], found.forward_end, *found.phases[1:])
        traced = self._trace(settings)
        held = traced.gradients if settings.accumulation > 1 else 0
        # A trace sees one sum: gradients made so far are among what is live in the backward.
        return (
            Moment("forward end", traced.forward_end, held, 0),
            Moment(traced.phase, traced.peak, held, 0),
        )

    def _simulate(self, settings: Settings) -> Simulation:
        key = dataclasses.replace(settings, optimizer="adamw8bit", master="none", offload=False)
        if key not in self._simulations:
            assert self.source.architecture is not None
            adapters = self.source.adapters(settings)
            tape = record_step(
                self.source.architecture,
                Work(settings.batch, settings.seq_len, settings.packed, settings.head_tokens),
                itemsize=settings.itemsize,
                device=settings.device,
                trained=adapters is None,
                adapters=adapters,
                checkpointing=settings.checkpointing,
                compress=settings.compress is not None,
                offload=settings.offload_activations,
                head=settings.head,
                # peft and transformers do so together whenever transformers checkpoints layers.
                input_gradients=adapters is not None and settings.checkpointing == "layer",
            )
            self._simulations[key] = simulate(
                tape, gradients_held=settings.accumulation > 1, gradients_released=settings.release != "none"
            )
        return self._simulations[key]

    def _trace(self, settings: Settings) -> Any:
        key = dataclasses.replace(settings, optimizer="adamw8bit", master="none", offload=False, accumulation=1)
        if key not in self._traces:
            self._traces[key] = trace_model(self.source, settings)
        return self._traces[key]

    def peak(self, settings: Settings) -> int:
        """Bytes at the fullest moment."""
        return max(phase.total for phase in self.phases(settings))

    def flops(self, settings: Settings) -> int:
        """FLOPs of a step, all its micro-batches and everything computed again."""
        return self._pass_flops(settings) * settings.accumulation * (2 if settings.release == "two-pass" else 1)

    def _pass_flops(self, settings: Settings) -> int:
        architecture = self.source.architecture
        if architecture is None:
            return int(self._trace(settings).flops)
        shape = architecture.shape
        adapters = self.source.adapters(settings)
        linears = {linear for name in (adapters.modules if adapters else ()) for linear in LINEARS.get(name, ())}
        cost = shape.train_cost(
            trainable="full" if adapters is None else "lora",
            lora_rank=0 if adapters is None else adapters.rank,
            lora_targets=linears & set(shape.linears),
            input_requires_grad=adapters is not None and settings.checkpointing == "layer",
            checkpointing=settings.checkpointing != "none",
            keep_attention=settings.checkpointing == "attention",
        )
        tokens, rows = settings.seq_len, settings.batch
        # Causal kernels skip what lies above the diagonal; a dense mask is multiplied out. `pyeff.checkpoint` has none,
        # and at most one sample fills the row.
        dense = settings.packed and settings.checkpointing != "attention"
        pairs = tokens * tokens if dense else rows * tokens * (tokens + 1) // 2
        total = cost(rows * tokens, pairs, rows * tokens if settings.head_tokens is None else settings.head_tokens)
        if settings.head == "fused":  # forms the softmax again
            positions = rows * tokens if settings.head_tokens is None else settings.head_tokens
            total += shape.forward(0, attention_pairs=0, head_tokens=positions)
        return total

    def seconds(self, settings: Settings) -> float | None:
        """Predicted time of a step: its products, each micro-batch's reading of the weights, the optimizer's bytes."""
        if self.rates is None:
            return None
        parameters = self.parameters(settings)
        passes = 4 if settings.checkpointing != "none" else 3
        passes *= 2 if settings.release == "two-pass" else 1
        weights = settings.accumulation * passes * sum(p.nbytes for p in parameters)
        moved = weights + step_traffic(parameters, settings.optimizer, settings.master)
        flops = self.flops(settings) + step_flops(parameters, settings.optimizer)
        seconds = flops / self.rates.flops + moved / self.rates.bandwidth
        if settings.offload and settings.device == "cuda":  # both directions at once, in turn with the rest
            seconds += sum(state_bytes(p, settings.optimizer, settings.master) for p in parameters) / self.rates.bus
        return seconds

    def fits(self, settings: Settings) -> bool | None:
        """Whether the peak is within the device's memory."""
        return None if self.device_memory is None else self.peak(settings) <= self.device_memory

    def checkpointings(self) -> tuple[Checkpointing, ...]:
        """Those that the model can be planned and trained with, the one that keeps most first."""
        architecture = self.source.architecture
        # `pyeff.attention` has no dropout.
        keeping = architecture is not None and not architecture.attention_dropout
        return ("none", "attention", "layer") if keeping else ("none", "layer")

    def options(self, settings: Settings) -> list[Option]:
        """Other ways to take the same step, ranked: what fits first, then by time (or FLOPs), then by peak."""
        known = self.source.architecture is not None
        values: dict[str, list[Any]] = {
            "checkpointing": list(self.checkpointings()),
            "head": ["logits", "fused"] if known else [settings.head],
        }
        if not known and not hasattr(
            self.source.module or self.source.empty(self.source.dtype), "supports_gradient_checkpointing"
        ):
            values["checkpointing"] = [settings.checkpointing]
        if settings.optimizer == "adamw":
            values["optimizer"] = ["adamw", "adamw8bit"]
        if settings.device == "cuda":
            values["offload"] = [settings.offload, not settings.offload]
        # Exact whatever clips, and therefore priced at two passes.
        if known and settings.release == "none":
            values["release"] = ["none", "two-pass"]
        if settings.dtype == "float32" and known:
            values["dtype"] = ["float32", "bfloat16"]
        if not settings.packed and self.source.inputs is None:
            values["batch"] = _halves(settings.batch)
        found = []
        for combination in itertools.product(*values.values()):
            changes = {
                name: value for name, value in zip(values, combination, strict=True) if value != getattr(settings, name)
            }
            changed = self._change(settings, changes) if len(changes) <= 3 else None
            if changed is None:
                continue
            found.append(
                Option(changes, self.peak(changed), self.flops(changed), self.seconds(changed), self.fits(changed))
            )

        def rank(option: Option) -> tuple[Any, ...]:
            time = option.flops if option.seconds is None else option.seconds
            return (option.fits is False, time if option.fits is not False else option.peak, option.peak)

        return sorted(found, key=rank)

    def _change(self, settings: Settings, changes: Mapping[str, Any]) -> Settings | None:
        """The settings with these changes; None where they do not go together."""
        more: dict[str, Any] = dict(changes)
        if "batch" in changes:  # the same tokens a step
            more["accumulation"] = settings.accumulation * settings.batch // changes["batch"]
            if settings.head_tokens is not None:
                more["head_tokens"] = -(-settings.head_tokens * changes["batch"] // settings.batch)
        if changes.get("checkpointing") == "none":
            more |= {"compress": None, "offload_activations": False}
        wanted = {
            **{name: getattr(settings, name) for name in ("optimizer", "offload", "release", "accumulation")},
            **more,
        }
        ours = wanted["optimizer"] != "adamw"
        if not ours and wanted["release"] != "none":
            return None
        if wanted["offload"] and wanted["optimizer"] in WITHOUT_OFFLOAD:
            return None
        if wanted["accumulation"] > 1 and wanted["release"] != "none":
            return None
        return dataclasses.replace(settings, **more)

    def largest(self, settings: Settings, name: Literal["batch", "seq_len"]) -> int | None:
        """The largest value that fits; 0 where not even one does, None without a device size."""
        if self.device_memory is None or self.source.inputs is not None:
            return None
        limit = _NO_MORE
        if name == "seq_len" and self.source.architecture is not None:
            limit = self.source.architecture.positions
        if self.source.architecture is None:
            return self._largest_traced(settings) if name == "batch" else None

        def fits(value: int) -> bool:
            change: dict[str, Any] = {name: value, "head_tokens": None}
            return bool(self.fits(dataclasses.replace(settings, **change)))

        return largest_that_fits(fits, limit)

    def _largest_traced(self, settings: Settings) -> int:
        # Every tensor is as large as the batch or does not depend on it: two traces give the line.
        one, two = (self.peak(dataclasses.replace(settings, batch=rows)) for rows in (1, 2))
        assert self.device_memory is not None
        return max(0, int((self.device_memory - one) // max(1, two - one)) + 1) if one <= self.device_memory else 0

    def plan(self, settings: Settings, *, search: bool = True) -> Plan:
        """The whole plan; without `search`, no options and no largest sizes."""
        parameters = self.parameters(settings)
        account = self.source.architecture is not None
        simulation = self._simulate(settings) if account else None
        kept = simulation.by_layer() if simulation is not None else {}
        names = list(dict.fromkeys([*(p.layer for p in parameters), *kept]))
        away = settings.offload and settings.device == "cuda"
        layers = []
        for name in sorted(names, key=_layer_order):
            own = [p for p in parameters if p.layer == name]
            layers.append(
                Layer(
                    name,
                    sum(p.nbytes for p in own),
                    0 if away else sum(state_bytes(p, settings.optimizer, settings.master) for p in own),
                    sum(p.nbytes for p in own if p.trained),
                    kept.get(name, 0),
                )
            )
        return Plan(
            model=self.source.name,
            method="account" if account else "trace",
            settings=settings,
            layers=tuple(layers),
            phases=self.phases(settings),
            saved=() if simulation is None else tuple((s.layer, s.name, s.nbytes) for s in simulation.saved),
            device_memory=self.device_memory,
            rates=self.rates,
            flops=self.flops(settings),
            seconds=self.seconds(settings),
            largest_batch=None if settings.packed or not search else self.largest(settings, "batch"),
            largest_seq_len=self.largest(settings, "seq_len") if search else None,
            options=tuple(self.options(settings)) if search else (),
        )


def largest_that_fits(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n up to `limit` for which `fits(n)`, which must hold below it; 0 where it holds for none.

    >>> largest_that_fits(lambda n: n * n < 50, 100)
    7
    """
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _halves(count: int) -> list[int]:
    found = [count]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found


def _layer_order(name: str) -> tuple[int, int]:
    if name.startswith("layer "):
        return (1, int(name.removeprefix("layer ")))
    return ({"embedding": 0, "head": 3}.get(name, 2), 0)


__all__ = ["Planner", "plan"]
