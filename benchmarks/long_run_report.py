"""Table and figure of `long_run.py`, from the cells that are finished.

Differences are paired: a cell against torch's AdamW with fp32 weights of the same seed. What they are held against is
the spread of that optimizer's own seeds, largest minus smallest, and what a mere reordering of roundings does to a run
(pyeff with fp32 states).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from long_run import ARMS, SEEDS, Arm

from pyeff._files import write_atomic, write_text_atomic

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "optimizer_states.md"
FIGURE = ROOT / "docs" / "images" / "long_run.png"
BEGIN, END = "<!-- long run:begin -->", "<!-- long run:end -->"
BASELINE = "torch"
COLORS = {"torch": "black", "pyeff": "tab:blue", "bitsandbytes": "tab:red", "torchao": "tab:orange"}


@dataclass(frozen=True)
class Row:
    """What is known of an arm: its losses by seed, and their differences from the baseline's."""

    arm: Arm
    state_bytes: float
    losses: dict[int, float]
    differences: dict[int, float]
    weights: list[tuple[float, float | None]]
    """Root mean square and largest magnitude, where they were recorded."""

    @property
    def mean_difference(self) -> float:
        return sum(self.differences.values()) / len(self.differences)


def cells_in(results: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Finished cells by arm and seed; they must be of one experiment."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    kinds = set()
    for file in sorted(results.glob("*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(cell["arm"], {})[cell["seed"]] = cell
        kinds.add(json.dumps([cell["settings"], cell["text"]], sort_keys=True))
    if not found.get(BASELINE):
        raise SystemExit(f"{results} holds no finished cell of {BASELINE}: run long_run.py first")
    if len(kinds) > 1:
        raise SystemExit(f"{results} holds cells of {len(kinds)} settings or texts: keep those of one")
    return found


def rows_of(cells: dict[str, dict[int, dict[str, Any]]]) -> list[Row]:
    base = {seed: cell["validation_loss"] for seed, cell in cells[BASELINE].items()}
    rows = []
    for arm in ARMS:
        if arm.name in cells:
            losses = {seed: cell["validation_loss"] for seed, cell in sorted(cells[arm.name].items())}
            differences = {seed: loss - base[seed] for seed, loss in losses.items() if seed in base}
            state = next(iter(cells[arm.name].values()))["state_bytes_per_parameter"]
            ended = cells[arm.name].values()
            sizes = [(cell["weight_rms"], cell.get("largest_weight")) for cell in ended if "weight_rms" in cell]
            rows.append(Row(arm, state, losses, differences, sizes))
    return rows


def seed_spread(rows: list[Row]) -> float | None:
    """Largest minus smallest loss of the baseline, once two of its seeds are finished."""
    losses = rows[0].losses.values()
    return max(losses) - min(losses) if len(losses) > 1 else None


def verdict(row: Row, spread: float | None) -> str:
    if row.arm.name == BASELINE:
        return ""
    if spread is None or len(row.differences) < 2:
        return "too few seeds"
    return "yes" if abs(row.mean_difference) <= spread else "**no**"


def table(rows: list[Row]) -> str:
    spread, done = seed_spread(rows), sum(len(row.losses) for row in rows)
    of_all = len(ARMS) * len(SEEDS)
    lines = [
        f"{done} of {of_all} cells have finished."
        + (f" Seeds of torch's AdamW end {spread:.4f} apart." if spread is not None else ""),
        "",
        "| optimizer | dtype | bytes of state | loss, by seed | minus fp32, by seed | mean | inside | rms / max |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        weights = "bf16" if row.arm.weights.itemsize == 2 else "fp32"
        losses = ", ".join(f"{loss:.4f}" for loss in row.losses.values())
        differences = mean = ""
        if row.arm.name != BASELINE and row.differences:
            differences = ", ".join(f"{d:+.4f}" for d in row.differences.values())
            mean = f"{row.mean_difference:+.4f}"
        cells = [row.arm.label, weights, f"{row.state_bytes:.2f}", losses, differences, mean, verdict(row, spread)]
        sizes = [f"{rms:.3f}" + (f" / {largest:.2g}" if largest is not None else "") for rms, largest in row.weights]
        cells.append(", ".join(sizes))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def color_of(arm: Arm) -> str:
    if arm.name == "torch-no-decay":
        return "0.6"
    return COLORS[arm.name.partition("-")[0]]


def figure(cells: dict[str, dict[int, dict[str, Any]]], rows: list[Row], path: Path) -> None:
    """Curves of the mean over seeds on the left, differences of every cell on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), width_ratios=(1, 1.15), layout="constrained")
    drawn = {"torch-no-decay"}  # has a line of its own in the legend
    for row in reversed(rows):
        curves = [cell["curve"] for cell in cells[row.arm.name].values()]
        steps = [step for step, _ in curves[0][:-1]]  # the last point is of another sample of windows
        means = [sum(curve[i][1] for curve in curves) / len(curves) for i in range(len(steps))]
        name = row.arm.name if row.arm.name == "torch-no-decay" else row.arm.name.partition("-")[0]
        left.plot(
            steps,
            means,
            color=color_of(row.arm),
            lw=1,
            ls="-" if row.arm.weights.itemsize == 4 else (0, (3, 2)),
            label=name if name not in drawn and row.arm.weights.itemsize == 4 else None,
        )
        drawn |= {name} if row.arm.weights.itemsize == 4 else set()
    left.set(xlabel="step", ylabel="validation loss (nats a byte)", yscale="log")
    left.set_xticks(range(0, 20_001, 5000))
    left.set_yticks([1.5, 1.75, 2, 2.5], ["1.5", "1.75", "2", "2.5"])
    left.yaxis.set_minor_locator(plt.NullLocator())
    left.plot([], [], color="0.4", ls=(0, (3, 2)), lw=1, label="bf16 weights")
    left.plot([], [], color="0.6", lw=1, label="no weight decay")
    left.legend(frameon=False)
    others = [row for row in rows if row.arm.name != BASELINE and row.differences]
    spread = seed_spread(rows)
    if spread is not None:
        right.axvspan(-spread, spread, color="0.92", zorder=0, label="spread of fp32's seeds")
        right.legend(frameon=False, loc="lower right")
    right.axvline(0, color="black", lw=0.8)
    for place, row in enumerate(others):
        xs = list(row.differences.values())
        right.plot(xs, [place] * len(xs), "o", color=color_of(row.arm), ms=5, alpha=0.6, mew=0)
        right.plot([row.mean_difference] * 2, [place - 0.3, place + 0.3], color=color_of(row.arm), lw=2)
    weights = ["bf16" if row.arm.weights.itemsize == 2 else "fp32" for row in others]
    labels = [f"{row.arm.label} · {weight} weights" for row, weight in zip(others, weights, strict=True)]
    right.set_yticks(range(len(others)), labels)
    right.invert_yaxis()
    right.set_xscale("symlog", linthresh=0.01, linscale=2)
    ticks = [-0.1, -0.01, -0.005, 0, 0.005, 0.01]
    right.set_xticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    right.xaxis.set_minor_locator(plt.NullLocator())
    right.set_xlabel("final loss minus fp32 AdamW's (log beyond 0.01; dots: seeds)")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: fig.savefig(file, format="png", dpi=110, metadata={"Software": None}))
    plt.close(fig)


def report(results: Path, page: Path = PAGE, image: Path = FIGURE) -> None:
    """Write the table between the page's markers, and the figure; print the table."""
    cells = cells_in(results)
    rows = rows_of(cells)
    body = table(rows)
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    write_text_atomic(page, f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.split(END)[1]}")
    figure(cells, rows, image)
    print(body)
