"""Real runs as a tree of decisions: policies that decide alike share what they trained, exactly.

A run is a function of its seed, its schedule and what was decided at every check, so the state after the same decisions
is the same state, whoever took them. Every state is reached by training from its parent, once; a policy walks from the
root. Costs are those of the ledger in every walk: sharing saves our time, not the policy's budget.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyeff.governor import Action, advantage, is_control_batch

from .metrics import Promised, Run
from .policies import MIXTURE, POOL, RANDOM, Forecast, Move, Policy, Setup, View, cooldown_end, lr_factor
from .t1_state import Branch, Cell, Root, State
from .tasks.task import SPANS, Data, Task, stream
from .tasks.training import Weights

# Of either kind before control batches are compared, and samples of the target below which they are not worth a look.
_FEWEST_BATCHES, _FEWEST_TARGETS = 4, 6
_CONTROL_SHARE = 0.01
# States kept: four vectors each. A state that was dropped is trained again from its parent.
_KEPT = 96
# The fake plateau: shares of the budget between which the anchors are shown as they were at its beginning.
PLATEAU = (0.3, 0.5)
_TINY = 1e-9


class Engine:
    """All runs of one cell.

    Args:
        task: in the cell's mode.
        cell: which budget, seed and control.
    """

    def __init__(self, task: Task, cell: Cell) -> None:
        self.task, self.cell = task, cell
        self.data: Data = task.data(cell.seed, cell.control)
        self.network = task.network(cell.seed)
        self.start = self.network.flat()
        self.step_flops = task.batch * task.train_flops
        # The same FLOPs in every memory mode.
        self.budget = float(round(task.smallest_steps * SPANS[cell.budget]) * task.batch * task.full_train_flops)
        self.rate = task.rates[task.mode]
        self.anchors = self.data.anchors[: task.anchors[cell.budget]]
        self.eval_flops = task.forward_flops * len(self.anchors)
        self.kept = round(task.keep * len(self.data.pool))
        self.by_source = [torch.nonzero(self.data.source == k).flatten() for k in range(len(self.data.sources))]
        self._uniforms = np.random.default_rng(stream(task.name, "draws", cell.seed))
        self._draws = self._uniforms.random((0, task.batch))
        self._states: OrderedDict[tuple[Any, ...], State] = OrderedDict()
        self._looks: dict[tuple[Any, ...], tuple[float, ...]] = {}
        self._finals: dict[tuple[Any, ...], tuple[float, float]] = {}
        self._scored: dict[tuple[Any, ...], Tensor] = {}
        self.trained_steps = 0

    def setup(self) -> Setup:
        costs = {name: self.cost(name) for name in self.task.selectors}
        sources = {name: len(part) for name, part in zip(self.data.sources, self.by_source, strict=True)}
        return Setup(
            budget=self.budget,
            selectors=dict(sorted(costs.items(), key=lambda item: item[1])),
            sources=sources,
            eval_flops=self.eval_flops,
            seed=self.cell.seed,
        )

    def cost(self, selector: str) -> float:
        """What a scoring is charged."""
        return float(self.task.score_flops(selector) * (10 if self.cell.control == "tenfold" else 1))

    def run(self, make: Callable[[Setup], Policy]) -> tuple[Run, list[dict[str, Any]]]:
        """Let a policy spend the budget; returns the cell and every decision's record."""
        policy = make(self.setup())
        costs: Mapping[str, float] = getattr(policy, "charges", None) or self.setup().selectors
        root = Root(
            policy.schedule,
            policy.data,
            len(policy.needs & {"anchors", "raw"}),
            policy.check_every,
            policy.cooldown,
        )
        path: tuple[Any, ...] = (root, self._step_of(policy.begin(), policy, costs))
        moves: list[tuple[float, str]] = []
        promises: list[Promised] = []
        records: list[dict[str, Any]] = []
        last: tuple[float, float, Forecast | None] | None = None
        known: dict[int, tuple[float, float]] = {}
        slowest, charged = 0.0, 0.0
        while not (state := self.state(path)).done:
            branch = state.branches[state.branch]
            anchors = self.look(path, "average") if policy.needs & {"anchors"} else ()
            raw = self.look(path, "parameters") if policy.needs & {"raw"} else ()
            seen = anchors or raw
            mean = math.fsum(seen) / len(seen) if seen else math.nan
            known[state.branch] = (branch.owned, mean)
            if last is not None and last[2] is not None and math.isfinite(mean):
                # What scoring cost is not training.
                trained = state.spent - last[0] - charged
                if trained > 0:
                    promised = last[2]
                    promises.append(Promised(promised.rate, promised.low, promised.high, (last[1] - mean) / trained))
            names = self.data.sources
            counts = state.counts if state.counts is not None else torch.zeros(len(names))
            losses = state.losses if state.losses is not None else torch.zeros(len(names))
            view = View(
                step=state.steps,
                spent=state.spent,
                budget=self.budget,
                reserve=policy.cooldown * self.budget if policy.schedule == "wsd" else 0.0,
                anchors=anchors,
                raw_anchors=raw,
                train_loss=float(losses.sum() / counts.sum().clamp(min=1)),
                costs=dict(costs),
                selector=branch.using if branch.using in self.task.selectors else None,
                scored_at=branch.scored_at,
                refreshes=state.refreshes,
                overhead=float(sum(state.flops[name] for name in ("eval", "score", "probe"))),
                source_losses={n: float(losses[k] / counts[k]) for k, n in enumerate(names) if counts[k] > 0},
                source_counts={n: float(counts[k]) for k, n in enumerate(names)},
                advantage=state.reading,
                control_cost=self._control_cost(state, root),
                finite=state.finite,
                branch=state.branch,
                branches=dict(known),
            )
            began = time.perf_counter()
            move = policy.decide(view)
            slowest = max(slowest, time.perf_counter() - began)
            if move.action is not Action.CONTINUE and move.argument != MIXTURE:
                key = move.action.value if move.argument is None else f"{move.action.value}({move.argument})"
                moves.append((state.spent, key))
            records.append({"spent": state.spent, "anchors": mean, "move": move.action.value, "record": move.record})
            step = self._step_of(move, policy, costs)
            charged = 0.0
            if move.action is Action.REFRESH and move.argument != RANDOM and not policy.free_selection:
                charged = costs[str(move.argument)]
            last = (state.spent, mean, move.forecast)
            path = (*path, step)
        loss, _ = self.final(path)
        run = Run(
            task=self.cell.label,
            policy=policy.name,
            budget=self.budget,
            seed=self.cell.seed,
            loss=loss,
            flops={name: float(value) for name, value in state.flops.items()},
            moves=tuple(moves),
            promises=tuple(promises),
            decide_seconds=slowest,
        )
        return run, records

    def _step_of(self, move: Move, policy: Policy, costs: Mapping[str, float]) -> tuple[Any, ...]:
        """A move as a key of the tree: what it does, and at what charge."""
        if move.action is Action.CONTINUE and move.branch == 0:
            return ("CONTINUE",)
        weights = None
        if move.weights is not None:
            weights = tuple(round(move.weights[name], 9) for name in self.data.sources)
        refresh = move.action is Action.REFRESH and move.argument != RANDOM
        charge = 0.0 if policy.free_selection else costs.get(str(move.argument), 0.0)
        extra = (policy.control, charge) if refresh else ()
        return (move.action.value, move.argument, weights, move.branch, *extra)

    # The tree

    def state(self, path: tuple[Any, ...]) -> State:
        """The state after these decisions."""
        if path in self._states:
            self._states.move_to_end(path)
            return self._states[path]
        if len(path) == 2:
            before = State({0: Branch(Weights.fresh(self.start))}, end=self.budget)
            before.next_check = path[0].check_every * self.budget
        else:
            before = self.state(path[:-1])
        found = self._advance(before.copy(), path)
        self._states[path] = found
        if len(self._states) > _KEPT:
            self._states.popitem(last=False)
        return found

    def look(self, path: tuple[Any, ...], which: str) -> tuple[float, ...]:
        """The anchors' losses at a state, under averaged or raw weights."""
        key = (path, which)
        if key not in self._looks:
            state = self.state(path)
            if which in state.frozen:
                self._looks[key] = state.frozen[which]
            else:
                with self.network.at(getattr(state.branches[state.branch].weights, which)) as module:
                    self._looks[key] = tuple(self.task.evaluate(module, self.anchors).tolist())
        return self._looks[key]

    def final(self, path: tuple[Any, ...]) -> tuple[float, float]:
        """Mean holdout loss at the end of a run, and its standard error."""
        if path not in self._finals:
            state = self.state(path)
            with self.network.at(state.branches[state.branch].weights.parameters) as module:
                losses = self.task.evaluate(module, self.data.held_out)
            self._finals[path] = float(losses.mean()), float(losses.std() / math.sqrt(len(losses)))
        return self._finals[path]

    # Training

    def _advance(self, state: State, path: tuple[Any, ...]) -> State:
        """Carry the path's last move out and train until the next check, or the end."""
        root: Root = path[0]
        self._apply(state, path)
        state.losses, state.counts = torch.zeros(len(self.data.sources)), torch.zeros(len(self.data.sources))
        branch = state.branches[state.branch]
        self.network.load(branch.weights)
        interval = max(root.check_every * self.budget / self.step_flops, 1.0)
        averaging = max(1 - 4 / interval, 0.0)
        field_ = "train" if state.cooling is None else "cooldown"
        # A plateau has a check at its very end, from which it cools.
        plateau = (1 - root.cooldown) * self.budget if root.schedule == "wsd" else math.inf
        while True:
            if state.steps and state.spent + state.last > state.end * (1 + _TINY):
                state.done = True
                break
            if state.cooling is None and state.spent >= min(state.next_check, plateau) * (1 - _TINY):
                break
            self._train_step(state, branch, root, averaging)
            state.flops[field_] += self.step_flops
            branch.owned += self.step_flops
            state.last = float(self.step_flops)
        if not state.done:
            self._measure(state, root, branch)
        return state

    def _train_step(self, state: State, branch: Branch, root: Root, averaging: float) -> None:
        samples, is_control = self._batch(state, branch, root)
        middle = state.spent + self.step_flops / 2
        factor = lr_factor(root.schedule, middle, self.budget, cooldown_start=state.cooling, end=state.end)
        losses = self.task.losses(self.network.module, self._samples(samples))
        branch.weights = self.network.step(branch.weights, losses, self.rate * factor, averaging)
        found = losses.detach()
        source = self.data.source[samples]
        state.losses.index_add_(0, source, found)
        state.counts.index_add_(0, source, torch.ones(len(found)))
        state.finite = state.finite and bool(torch.isfinite(found).all())
        if branch.direction is not None:
            gain = float(self.network.gradient @ branch.direction[0])
            branch.gains = (*branch.gains, (is_control, state.spent - (branch.scored_at or 0.0), gain))
        branch.drawn += 1
        state.steps += 1
        self.trained_steps += 1

    def _samples(self, index: Tensor) -> Any:
        return self.data.pool[index]

    def _batch(self, state: State, branch: Branch, root: Root) -> tuple[Tensor, bool]:
        """The samples of the next step: common random numbers for all policies, by the step's number."""
        if state.steps >= len(self._draws):
            more = self._uniforms.random((max(len(self._draws), 256), 2 * self.task.batch))
            self._draws = more if len(self._draws) == 0 else np.concatenate([self._draws, more])
        draws = self._draws[state.steps]
        first, second = draws[: self.task.batch], draws[self.task.batch :]
        active = branch.direction is not None
        control = active and is_control_batch(state.steps, fraction=branch.control, seed=self.cell.seed)
        if branch.mixture is not None:
            edges = np.cumsum(branch.mixture)
            kinds = np.minimum(np.searchsorted(edges / edges[-1], first, side="right"), len(edges) - 1)
            parts = [self.by_source[k] for k in kinds]
            picked = [int(part[int(u * len(part))]) for part, u in zip(parts, second, strict=True)]
            return torch.tensor(picked), False
        chosen = torch.arange(len(self.data.pool)) if branch.chosen is None or control else branch.chosen
        if root.data == "epochs" and branch.chosen is None:
            places = state.steps * self.task.batch + np.arange(self.task.batch)
            return torch.from_numpy(self._epoch_order(places, len(chosen))), False
        return chosen[torch.from_numpy((first * len(chosen)).astype(np.int64))], bool(control)

    def _epoch_order(self, places: np.ndarray, size: int) -> np.ndarray:
        epochs, at = places // size, places % size
        orders = {
            e: np.random.default_rng(stream("epoch", self.cell.seed, int(e))).permutation(size) for e in set(epochs)
        }
        return np.array([orders[e][i] for e, i in zip(epochs, at, strict=True)])

    def _apply(self, state: State, path: tuple[Any, ...]) -> None:
        root, move = path[0], path[-1]
        if move == ("CONTINUE",):
            action, argument, weights, number = "CONTINUE", None, None, 0
        else:
            action, argument, weights, number = move[:4]
        if number not in state.branches:
            state.branches[number] = Branch(Weights.fresh(self.start))
        if number != state.branch:
            state.branches[number] = replace(state.branches[number], weights=state.branches[number].weights.clone())
            state.branch = number
        branch = state.branches[number]
        if action == "COOLDOWN":
            state.cooling = state.spent
            state.end = cooldown_end(state.spent, self.budget, cooldown=root.cooldown, check_every=root.check_every)
        elif action == "REFRESH" and argument == RANDOM:
            rng = np.random.default_rng(stream("random subset", self.cell.seed, state.refreshes))
            branch.chosen = torch.from_numpy(rng.permutation(len(self.data.pool))[: self.kept].copy())
            branch.using, branch.mixture, branch.drawn = RANDOM, None, 0
        elif action == "REFRESH":
            self._refresh(state, branch, argument, control=move[4], charge=move[5], path=path)
        elif action == "SWITCH" and argument == POOL:
            branch.using = branch.chosen = branch.mixture = branch.scored_at = branch.direction = None
            branch.gains = ()
        elif action == "SWITCH" and argument == MIXTURE:
            branch.using, branch.chosen, branch.mixture = MIXTURE, None, weights
        elif action != "CONTINUE":
            raise ValueError(f"a run knows no {action}({argument})")

    def _scores(self, path: tuple[Any, ...], branch: Branch, selector: str) -> Tensor:
        """Scores at the state before the path's last move; policies that score there pay each for themselves."""
        key = (path[:-1], path[-1][3], selector)
        if key not in self._scored:
            self._scored[key] = self.task.scores(selector, self.network, branch.weights.average, self.data)
        return self._scored[key]

    def _refresh(
        self, state: State, branch: Branch, selector: str, *, control: float, charge: float, path: tuple[Any, ...]
    ) -> None:
        scores = self._scores(path, branch, selector)
        if self.cell.control == "shuffled":
            rng = np.random.default_rng(stream("shuffled", self.cell.seed, selector, state.refreshes))
            scores = scores[torch.from_numpy(rng.permutation(len(scores)))]
        branch.chosen = scores.topk(self.kept).indices.sort().values
        branch.using, branch.mixture, branch.drawn, branch.gains = selector, None, 0, ()
        cost = min(int(charge), max(int(self.budget - state.spent), 0))
        state.flops["score"] += cost
        branch.owned += cost
        state.next_check += cost
        state.refreshes += 1
        branch.scored_at = state.spent
        branch.direction = None
        if control and (samples := self._affordable_targets(state)):
            branch.control = control
            self._look_at_target(state, branch, samples)

    def _affordable_targets(self, state: State) -> int:
        """As many samples of the target as a hundredth of the budget lets the arm look at until the end; 0: too few."""
        looks = max((self.budget - state.spent) / (0.05 * self.budget), 1.0)
        samples = int(_CONTROL_SHARE * self.budget / looks / self.task.train_flops)
        return samples if samples >= _FEWEST_TARGETS else 0

    def _control_cost(self, state: State, root: Root) -> float | None:
        """What the control arm of a selection made now would add to what the checks take; None where there is none."""
        samples = self._affordable_targets(state)
        if not samples:
            return None
        direction = state.branches[state.branch].direction
        running = 0 if direction is None else int(direction[1])
        checks = math.ceil(max((1 - root.cooldown) * self.budget - state.spent, 0.0) / (root.check_every * self.budget))
        return float(max(samples * (checks + 1) - running * checks, 0) * self.task.train_flops)

    def _look_at_target(self, state: State, branch: Branch, samples: int) -> None:
        target = self.data.target[:samples]
        with self.network.at(branch.weights.average) as module:
            found = self.task.mean_gradient(module, target)
        branch.direction = (torch.cat([g.flatten() for g in found.values()]), torch.tensor(samples))
        state.flops["probe"] += self.task.train_flops * len(target)
        branch.owned += self.task.train_flops * len(target)

    def _measure(self, state: State, root: Root, branch: Branch) -> None:
        """What a check evaluates, and is charged."""
        state.flops["eval"] += self.eval_flops * root.evaluations
        branch.owned += self.eval_flops * root.evaluations
        state.next_check = state.spent + root.check_every * self.budget
        state.reading = None
        if branch.direction is not None:
            chosen = [gain for is_control, _, gain in branch.gains if not is_control]
            uniform = [gain for is_control, _, gain in branch.gains if is_control]
            if min(len(chosen), len(uniform)) >= _FEWEST_BATCHES:
                age = math.fsum(age for _, age, _ in branch.gains) / len(branch.gains)
                state.reading = advantage(chosen, uniform, age=age)
                branch.gains = ()
            self._look_at_target(state, branch, int(branch.direction[1]))
        if self.cell.control == "plateau" and root.evaluations:
            low, high = PLATEAU
            if not low * self.budget <= state.spent < high * self.budget:
                state.frozen = {}
            elif not state.frozen:
                for which in ("average", "parameters"):
                    with self.network.at(getattr(branch.weights, which)) as module:
                        state.frozen[which] = tuple(self.task.evaluate(module, self.anchors).tolist())
