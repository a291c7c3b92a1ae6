"""Synthetic runs with the event stream of the training loop: refreshes, a cooldown, the demo's numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

SOURCES = {
    "count_bits": (50, 0.80),
    "chain_sum": (50, 0.72),
    "spell_backward": (50, 0.62),
    "number_sorting": (60, 0.25),
    "letter_counting": (60, 0.22),
    "word_sorting": (60, 0.15),
    "chain_sum/wrong": (90, 0.12),
    "count_bits/wrong": (80, 0.06),
    "spell_backward/shuffled": (100, 0.04),
}
TARGET = ("count_bits", "chain_sum", "spell_backward")
BUDGETS = {"flops": 4e13, "seconds": 540.0, "tokens": 60_000}


class SyntheticRun:
    """Writes events the way the training loop does; the losses follow a decaying curve with seeded noise."""

    def __init__(self, policy: str, unit: str, seed: int, refreshes: int, out: str) -> None:
        self.rng = np.random.default_rng(seed)
        self.policy, self.unit, self.refreshes = policy, unit, refreshes
        self.budget = BUDGETS[unit]
        self.events: list[dict] = []
        self.spent = 0.0
        self.step = 0
        self.time = 1.7e9
        self.useful = 0.0  # the learning variable: budget spent on useful tokens
        self.rate = 1.0  # how useful a token is; a selection raises it
        self.ledger = {
            f: {"flops": 0.0, "seconds": 0.0, "tokens": 0}
            for f in ("train", "eval", "score", "probe", "cooldown", "discarded")
        }
        self.difficulty = self.rng.normal(0, 0.5, 24)
        self.config = {
            "model": "smollm2",
            "policy": policy,
            "budget": "4e13F",
            "seed": 0,
            "out": out,
            "optimizer": {"lr": 3e-4},
        }

    def emit(self, kind: str, **fields) -> None:
        self.events.append({"kind": kind, **fields, "spent": self.spent, "time": self.time})

    def charge(self, field: str, share: float, tokens: int = 0) -> None:
        amount = share * self.budget
        if self.unit == "tokens":
            amount = tokens
        self.spent += amount
        row = self.ledger[field]
        row["flops"] += share * 4e13
        row["seconds"] += share * 540
        row["tokens"] += tokens
        self.time += share * 540

    def loss(self) -> float:
        return 0.35 + 2.3 * math.exp(-4.0 * self.useful)

    def anchors(self) -> list[float]:
        return [float(max(0.02, self.loss() * math.exp(d * 0.4) + self.rng.normal(0, 0.02))) for d in self.difficulty]

    def evaluate(self, which: str) -> list[float]:
        losses = self.anchors()
        self.charge("eval", 0.006)
        se = float(np.std(losses, ddof=1) / math.sqrt(len(losses)))
        self.emit(
            "evaluate",
            step=self.step,
            set=which,
            weights="ema",
            loss=float(np.mean(losses)),
            standard_error=se,
            losses=losses,
        )
        return losses

    def train(self, phase: str, steps: int, share: float) -> None:
        for i in range(steps):
            self.step += 1
            self.charge(phase, share, tokens=640)
            self.useful += share * self.rate
            lr = 3e-4 * (1 if phase == "train" else 1 - math.sqrt((i + 1) / (steps + 1)))
            noisy = self.loss() * 1.15 + self.rng.normal(0, 0.12)
            self.emit(
                "step",
                step=self.step,
                phase=phase,
                loss=float(max(noisy, 0.05)),
                lr=lr,
                grad_norm=float(1 + self.rng.random()),
                tokens=640,
                fraction=self.spent / self.budget,
            )

    def decide(self, action: str, reason: str, before: list[float], now: list[float]) -> None:
        values = {
            "CONTINUE": 1.0e-14,
            "REFRESH": 1.9e-14 if action == "REFRESH" else 0.4e-14,
            "COOLDOWN": 0.0,
        }
        inputs = {
            "step": self.step,
            "spent": self.spent,
            "budget": self.budget,
            "unit": self.unit,
            "anchors_before": before,
            "anchors_now": now,
            "spent_before": self.spent * 0.9,
            "refresh_cost": 1e13,
            "cooldown_cost": 6e12,
            "scored_at": None,
            "refreshes_done": 0,
            "loss_finite": True,
        }
        self.emit(
            "decision",
            step=self.step,
            action=action,
            reason=reason,
            inputs={"policy": self.policy, "config": {}, "state": {}, "observation": inputs},
            values=values,
        )

    def refresh(self) -> None:
        self.charge("score", 0.24)
        self.emit(
            "score",
            step=self.step,
            samples=600,
            flops=9.6e12,
            seconds=84.0,
            summary={"target_similarity": {"mean": 0.41, "min": -0.02, "max": 0.93}},
        )
        by_source = {s: [round(n * share), n] for s, (n, share) in SOURCES.items()}
        kept = sum(k for k, _ in by_source.values())
        examples = [
            {
                "id": f"chain_sum-{i}",
                "source": "chain_sum",
                "prompt": "State the final answer: 4 + 3 =",
                "answer": "7",
                "score": 0.91 - 0.01 * i,
                "kept": True,
            }
            for i in range(6)
        ] + [
            {
                "id": f"shuffled-{i}",
                "source": "spell_backward/shuffled",
                "prompt": "backward word <b>Spell</b> this: cat",
                "answer": "t c a",
                "score": 0.08 - 0.01 * i,
                "kept": False,
            }
            for i in range(6)
        ]
        self.emit(
            "select",
            step=self.step,
            selector="target_similarity",
            kept=kept,
            of=600,
            by_source=by_source,
            examples=examples,
        )
        self.rate = 1.9

    def run(self, finish: bool, paid: bool | None) -> list[dict]:
        self.emit(
            "start",
            config=self.config,
            budget={"amount": self.budget, "unit": self.unit},
            policy=self.policy,
            model={"name": "smollm2", "parameters": 134_515_008, "trainable": 134_515_008},
            pool={"samples": 600, "tokens": 24_000, "by_source": {s: n for s, (n, _) in SOURCES.items()}},
            estimates={
                "train_flops_per_token": 8.4e8,
                "score_pool_flops": 9.6e12,
                "check_flops": 2.4e11,
                "cooldown_reserve": 6e12,
                "steps": 50,
            },
            threads=2,
        )
        first = self.evaluate("holdout")
        self.emit("exact_match", step=0, when="start", correct=0, total=36, by_source={s: [0, 12] for s in TARGET})
        before = self.evaluate("anchors")
        checks = 0
        while self.spent < 0.78 * self.budget:
            self.train("train", 5, 0.0125)
            checks += 1
            now = self.evaluate("anchors")
            scored = len([e for e in self.events if e["kind"] == "score"])
            if self.policy == "governor" and scored < self.refreshes and checks >= 3 + 4 * scored:
                self.decide(
                    "REFRESH",
                    "a fresh selection is worth 1.2e13 F of training over the 2.4e13 F left and costs 9.6e12 F",
                    before,
                    now,
                )
                self.refresh()
            else:
                self.decide(
                    "CONTINUE",
                    "a selection would cost 9.6e12 F and could return at most 7.1e12 F worth of training",
                    before,
                    now,
                )
            before = now
            if self.step == 20 and not finish:
                return self.events
            if self.step % 20 == 0:
                self.emit("checkpoint", step=self.step, bytes=1_350_000_000)
        self.decide(
            "COOLDOWN",
            "8.6e12 F are left, the reserve of the cooldown needs 8.0e12 F",
            before,
            self.evaluate("anchors"),
        )
        left = 1 - 0.012 - self.spent / self.budget
        self.train("cooldown", 8, left / 8)
        last = self.evaluate("holdout")
        self.emit(
            "exact_match",
            step=self.step,
            when="end",
            correct=29,
            total=36,
            by_source={"count_bits": [11, 12], "chain_sum": [9, 12], "spell_backward": [9, 12]},
        )
        gains = np.subtract(first, last)
        actions = [e["action"] for e in self.events if e["kind"] == "decision"]
        self.emit(
            "end",
            step=self.step,
            reason="budget spent",
            ledger=self.ledger,
            holdout={
                "before": float(np.mean(first)),
                "after": float(np.mean(last)),
                "gain": float(gains.mean()),
                "standard_error": float(gains.std(ddof=1) / math.sqrt(len(gains))),
            },
            exact_match={"before": 0, "after": 29, "total": 36},
            decisions={a: actions.count(a) for a in ("CONTINUE", "REFRESH", "COOLDOWN")},
            selection_paid=paid,
            sentence="The gain per PFLOP after the selection was 0.7 of what the fit before it predicts: "
            "the scoring pass of 9.6 TFLOP was not earned back.",
        )
        return self.events


def write_events(directory: Path, events: list[dict]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return directory


@pytest.fixture
def make_run(tmp_path):
    """`make_run(name, policy=..., unit=..., paid=..., finish=..., refreshes=...) -> run directory`."""

    def make(name="run", *, policy="governor", unit="flops", seed=0, refreshes=1, finish=True, paid=False) -> Path:
        run = SyntheticRun(policy, unit, seed, refreshes, f"runs/{name}")
        return write_events(tmp_path / name, run.run(finish, paid if policy == "governor" else None))

    return make
