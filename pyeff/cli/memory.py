"""A plan of memory in the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pyeff.cli.units import duration, number
from pyeff.memory.plans import Plan, size_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPONENTS = {
    "parameters": "weights",
    "states": "states",
    "gradients": "grads",
    "activations": "acts",
    "working": "working",
    "other": "other",
}
# The same in words, where there is room.
LEGEND = {
    "parameters": "weights",
    "states": "optimizer states",
    "gradients": "gradients",
    "activations": "activations",
    "working": "gradients of activations, workspaces",
    "other": "libraries and what the caller holds",
}
_OPTIONS_SHOWN = 10


def plan_tables(plan: Plan) -> RenderableType:
    """The sentence, the moments of a step, the layers, and the options."""
    parts: list[RenderableType] = [Panel(Text(plan.sentence, style="bold"), padding=(0, 1), width=100)]
    parts += [_moments(plan), _layers(plan)]
    largest = [
        f"{name} {value:,}"
        for name, value in (("batch", plan.largest_batch), ("sequence length", plan.largest_seq_len))
        if value
    ]
    if largest:
        parts.append(Text(f"Largest that fits, the rest as asked: {', '.join(largest)}"))
    elif plan.largest_batch == 0 or plan.largest_seq_len == 0:
        parts.append(Text("With the rest as asked, no batch and no sequence length fits."))
    if plan.options:
        parts.append(_options(plan))
    parts.append(Text(_origin(plan), style="dim"))
    return Group(*parts)


def _moments(plan: Plan) -> Table:
    # Eighty columns must do.
    table = Table(title="When", title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
    table.add_column("moment", no_wrap=True)
    columns = [name for name in COMPONENTS if any(getattr(phase, name) for phase in plan.phases)]
    for name in (*(COMPONENTS[name] for name in columns), "sum"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in plan.phases:
        cells = [size_text(getattr(phase, name)) for name in columns]
        fullest = phase is plan.peak
        table.add_row(phase.name, *cells, size_text(phase.total), style="bold" if fullest else None)
    return table


def _layers(plan: Plan) -> Table:
    table = Table(title="Where", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    columns = {"parameters": "weights", "states": "states", "gradients": "grads", "activations": "kept for backward"}
    table.add_column("layer")
    for title in columns.values():
        table.add_column(title, justify="right")
    shown: list[tuple[str, tuple[int, ...]]] = []
    for layer in plan.layers:
        sizes = tuple(getattr(layer, name) for name in columns)
        if shown and shown[-1][1] == sizes and layer.name.startswith("layer "):
            first = shown[-1][0].split(" ")[1].split("–")[0]
            shown[-1] = (f"layers {first}–{layer.name.split(' ')[1]}, each", sizes)
        else:
            tied = layer.name == "head" and 2 * layer.parameters < plan.layers[0].parameters
            shown.append(("head, tied" if tied else layer.name, sizes))
    for name, sizes in shown:
        kept = size_text(sizes[3]) if plan.method == "account" else "n/a"
        table.add_row(name, *(size_text(size) for size in sizes[:3]), kept)
    return table


def _options(plan: Plan) -> Table:
    table = Table(
        title="Options: what buys most alone, then best first",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("change")
    timed = plan.seconds is not None
    for name in ("peak", "step", "fits") if timed else ("peak", "fits"):
        table.add_column(name, justify="right")
    single = [option for option in plan.options if len(option.changes) <= 1]
    first = [] if plan.best_change is None else [plan.best_change]
    ranked = [option for option in plan.options if option not in first]
    shown = [*first, *ranked[:_OPTIONS_SHOWN], *(o for o in single if o not in [*first, *ranked[:_OPTIONS_SHOWN]])]
    for option in shown:
        fits = "" if option.fits is None else "yes" if option.fits else "no"
        time = [_time(option.seconds)] if timed else []
        table.add_row(option.name, size_text(option.peak), *time, fits, style=None if option.changes else "bold")
    if any("batch" in option.changes for option in shown):
        table.caption = "accumulated: by gradient accumulation, with the same tokens a step"
        table.caption_justify = "left"
    return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    return f"{number(1000 * seconds)} ms" if seconds < 1 else duration(seconds)


def _origin(plan: Plan) -> str:
    method = (
        "Activations: an account of every tensor that PyTorch keeps."
        if plan.method == "account"
        else "Activations: traced on fake tensors with the CPU's kernels."
    )
    if plan.rates is None:
        return f"{method} No rates were given: options rank by FLOPs."
    origin = {
        "estimate": "estimated from a data sheet, never measured",
        "measured": "measured by a short probe",
        "given": "as given",
    }[plan.rates.source]
    rates = f"{number(plan.rates.flops / 1e12)} TFLOP/s, {number(plan.rates.bandwidth / 1e9)} GB/s"
    return f"{method} Times: predicted from {rates}, {origin}."


def plan_figure(plan: Plan) -> Figure:
    """Stacked bars: each moment of a step, then the options' peaks, against the device's memory."""
    import matplotlib.style
    from matplotlib.figure import Figure

    from pyeff.cli.plots import BLUE, GREEN, MUTED, ORANGE, PURPLE, SKY, STYLE, VERMILION

    colours = dict(zip(LEGEND, (BLUE, SKY, GREEN, ORANGE, PURPLE, MUTED), strict=True))
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.subplots()
        names = [phase.name for phase in plan.phases]
        unit, factor = next(
            (u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if plan.peak.total >= f or f == 1e3
        )
        start = [0.0] * len(names)
        for key, label in LEGEND.items():
            sizes = [getattr(phase, key) / factor for phase in plan.phases]
            axes.barh(names, sizes, left=start, color=colours[key], label=label, height=0.62)
            start = [a + b for a, b in zip(start, sizes, strict=True)]
        for place, total in enumerate(start):
            axes.annotate(
                f"{number(total)} {unit}", (total, place), xytext=(4, 0), textcoords="offset points", va="center"
            )
        if plan.device_memory is not None:
            limit = plan.device_memory / factor
            axes.axvline(limit, color=VERMILION, linestyle="--", label=f"device: {size_text(plan.device_memory)}")
        axes.set_xlim(0, 1.16 * max(*start, plan.device_memory / factor if plan.device_memory else 0.0))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"memory ({unit})")
        settings = plan.settings
        axes.set_title(
            f"{plan.model}: {settings.batch} x {settings.seq_len} tokens, {settings.dtype}, {settings.optimizer}, "
            f"checkpointing {settings.checkpointing}"
        )
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def write_plot(plan: Plan, path: Path) -> None:
    """Save `plan_figure`."""
    from pyeff.cli.plots import DPI
    from pyeff.errors import UserError

    try:
        plan_figure(plan).savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:  # ValueError: an ending that names no kind of picture
        raise UserError(f"the plot cannot be written to {path}: {error}") from error
