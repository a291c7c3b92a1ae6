"""A training loop of your own under a budget of FLOPs: the governor decides when the noisy pool is worth scoring.

    python examples/governor_loop.py [picture.png]

Two thirds of the pool come from another task, where the same inputs are labelled by another rule and one feature is
shifted. Anchors and target are of the task that matters, and disjoint. Scoring the pool with the model keeps the third
whose hidden features lie nearest to the target's; it costs FLOPs that could have been training.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import pyeff
from pyeff.governor import Action, Decision, GovernorConfig, Selector, audit_decisions

POOL, FEATURES, BATCH = 30_000, 8, 32


def task(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool, then 256 anchors and 256 samples of the target: does a point lie on one side of a random quadric?"""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(POOL + 512, FEATURES, generator=generator)
    rules = torch.randn(2, FEATURES, FEATURES, generator=generator)
    other = (torch.arange(POOL + 512) % 3 > 0) & (torch.arange(POOL + 512) < POOL)
    sides = [torch.einsum("ni,ij,nj->n", x, rule, x) > rule.trace() for rule in rules]
    x[other, 0] += 3.0
    return x, torch.where(other, sides[1], sides[0]).long()


def train(budget: str = "2 GF") -> tuple[pyeff.Governor, list[Decision]]:
    """Spend the budget; returns the governor and its decisions."""
    torch.manual_seed(0)
    x, y = task()
    pool, anchors, target = slice(0, POOL), slice(POOL, POOL + 256), slice(POOL + 256, POOL + 512)
    model = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 2))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    forward = 2.0 * (FEATURES * 64 + 64 * 2)  # FLOPs of one sample

    def losses(part: slice) -> torch.Tensor:
        with torch.no_grad():
            return cross_entropy(average(x[part]), y[part], reduction="none")

    def distances() -> torch.Tensor:
        """Of every pool sample's hidden features to the target's mean, in units of the target's spread."""
        with torch.no_grad():
            hidden = average.module[:2](x)
            mean, spread = hidden[target].mean(0), hidden[target].std(0) + 1e-6
            return (((hidden[pool] - mean) / spread) ** 2).sum(1)

    governor = pyeff.Governor(
        budget,
        anchors=lambda: losses(anchors).tolist(),
        flops_per_token=3 * forward,  # a sample is this task's token
        anchor_flops=forward * 256,
        selectors=[Selector("nearest", forward * (POOL + 256))],
        config=GovernorConfig(overhead_cap=0.25),
    )
    chosen, decisions = torch.arange(POOL), []
    while not governor.done:
        batch = chosen[torch.randint(len(chosen), (BATCH,))]
        loss = cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * governor.lr_factor
        optimizer.step()
        average.update_parameters(model)
        decision = governor.step(tokens=BATCH, loss=float(loss.detach()))
        if decision is not None:
            decisions.append(decision)
            if decision.action is Action.REFRESH:
                chosen = distances().argsort()[: POOL // 3]
                governor.scored(decision.argument, flops=forward * (POOL + 256))
    return governor, decisions


def draw(decisions: list[Decision], path: Path) -> None:
    """The anchors' loss with every decision on it, and each promised rate of gain beside the one that followed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    seen = [decision.inputs["observation"] for decision in decisions]
    spent = [each["spent"] / 1e9 for each in seen]
    loss = [sum(each["anchors_now"]) / len(each["anchors_now"]) for each in seen]
    above.plot(spent, loss, color="0.6")
    marks = {Action.CONTINUE: ("o", "C0"), Action.REFRESH: ("^", "C2"), Action.COOLDOWN: ("s", "C3")}
    for action, (marker, color) in marks.items():
        at = [i for i, decision in enumerate(decisions) if decision.action is action]
        if at:
            above.plot([spent[i] for i in at], [loss[i] for i in at], marker, color=color, label=str(action))
    above.set_ylabel("anchors' loss, nats")
    above.legend(frameon=False)
    place = {decision.step: x for decision, x in zip(decisions, spent, strict=True)}
    outcomes = audit_decisions(decisions).outcomes
    x = [place[outcome.step] for outcome in outcomes]
    below.plot(x, [1e9 * outcome.predicted for outcome in outcomes], "_", color="C0", markersize=12, label="predicted")
    known = [o for o in outcomes if o.low is not None and o.high is not None]
    below.vlines(
        [place[o.step] for o in known],
        [1e9 * (o.low or 0.0) for o in known],
        [1e9 * (o.high or 0.0) for o in known],
        color="C0",
        alpha=0.4,
        label="calibrated 90 %",
    )
    below.plot(x, [1e9 * outcome.realised for outcome in outcomes], ".", color="C1", label="realised")
    below.axhline(0, color="0.8", linewidth=0.8)
    below.set_ylabel("gain until the next check, nats per GFLOP")
    below.set_xlabel("spent, GFLOP")
    below.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Train, say what was decided and where the budget went, and draw it if asked."""
    governor, decisions = train()
    for decision in decisions:
        if decision.action is not Action.CONTINUE:
            print(f"step {decision.step}: {decision.reason}")
    for row in governor.ledger.table():
        if row["flops"]:
            print(f"{row['field']:10s} {row['flops'] / 1e6:8.1f} MF  {row['share']:6.1%}")
    if len(sys.argv) > 1:
        draw(decisions, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
