from __future__ import annotations

import json
import re

import matplotlib
import numpy as np
import pytest

from pyeff.cli import plots
from pyeff.cli.compare import compare_runs, notes, rows, write_comparison
from pyeff.cli.record import load_run
from pyeff.errors import UserError
from pyeff.governor import Budget


def edited(run, change):
    """The run with `change(event)` applied to every event."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for event in events:
        change(event)
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return load_run(run)


def with_final_losses(run, losses):
    def change(event):
        if event["kind"] == "evaluate" and event["set"] == "holdout" and event["step"] > 0:
            event["losses"] = losses
            event["loss"] = float(np.mean(losses))
            event["standard_error"] = float(np.std(losses, ddof=1) / np.sqrt(len(losses)))

    return edited(run, change)


@pytest.fixture
def pair(make_run):
    return load_run(make_run("governor")), load_run(make_run("uniform", policy="uniform"))


def test_exchanging_the_runs_changes_the_sign_and_nothing_else(pair):
    a, b = compare_runs(*pair), compare_runs(*reversed(pair))
    assert a.difference == -b.difference
    assert a.standard_error == b.standard_error
    assert a.headline == b.headline
    assert a.at == b.at


def test_a_run_equals_itself_and_no_winner_is_named(pair):
    same = compare_runs(pair[0], pair[0])
    assert same.difference == 0
    assert "cannot be told" in same.headline


def test_the_same_samples_are_compared_one_by_one(make_run):
    spread = np.linspace(0.1, 3.0, 24)  # samples differ by far more than the runs do
    first = with_final_losses(make_run("a"), list(spread))
    second = with_final_losses(make_run("b", policy="uniform"), [float(x) for x in spread + 0.05])
    compared = compare_runs(first, second)
    assert compared.paired
    assert compared.difference == pytest.approx(0.05)
    assert compared.headline.startswith("Selection paid: governor's holdout loss is 0.050 nats lower")


def test_without_losses_by_sample_the_same_difference_cannot_be_told(make_run):
    spread = np.linspace(0.1, 3.0, 24)
    runs = []
    for name, policy, shift in (("a", "governor", 0.0), ("b", "uniform", 0.05)):
        run = make_run(name, policy=policy)
        with_final_losses(run, [float(x) for x in spread + shift])
        runs.append(edited(run, lambda event: event.pop("losses", None)))
    compared = compare_runs(*runs)
    assert not compared.paired
    assert "cannot be told" in compared.headline


def test_selection_that_lost_is_said_not_to_have_paid(make_run):
    spread = np.linspace(0.1, 3.0, 24)
    first = with_final_losses(make_run("a"), [float(x) for x in spread + 0.05])
    second = with_final_losses(make_run("b", policy="uniform"), list(spread))
    assert compare_runs(first, second).headline.startswith("Selection did not pay: uniform's holdout loss is 0.050")


def test_runs_of_unequal_budgets_are_not_compared_at_unequal_spending(make_run):
    first = load_run(make_run("a"))

    def half(event):
        event["spent"] /= 2
        if event["kind"] == "start":
            event["budget"]["amount"] /= 2

    second = edited(make_run("b", policy="uniform"), half)
    compared = compare_runs(first, second)
    assert compared.difference is None
    assert "cannot be told" in compared.headline
    assert "n/a" in [row[1] for row in rows(compared) if row[0].startswith("holdout loss at")]
    assert compared.headline.endswith("Compare runs of the same budget.")


def test_a_run_that_ended_early_names_the_budget_to_compare_it_at(make_run):
    def early(event):
        event["spent"] /= 2

    compared = compare_runs(load_run(make_run("a")), edited(make_run("b", policy="uniform"), early))
    assert compared.difference is None
    given = re.search(r"--budget '(.+)'", compared.headline)
    assert given is not None
    ended = Budget.parse(given[1])
    assert ended.unit == "flops"
    # Three digits are shown: half a unit of the third of 1.00.
    assert ended.amount == pytest.approx(compared.second.spent, rel=0.5 / 100)


def test_close_evaluations_are_interpolated_on_a_line(make_run):
    first, second = load_run(make_run("a")), load_run(make_run("b"))
    budget = first.budget

    def curve(record, points):
        start = record.start
        shared = {"kind": "evaluate", "set": "holdout", "standard_error": 0.01}
        events = [{**shared, "step": i, "loss": y, "spent": x * budget} for i, (x, y) in enumerate(points)]
        return type(record)(record.path, (start, *events))

    a = curve(first, [(0.0, 3.0), (0.5, 1.0)])
    b = curve(second, [(0.0, 3.0), (0.46, 2.0), (0.54, 1.0)])
    compared = compare_runs(a, b)
    assert compared.interpolated
    assert compared.at == pytest.approx(0.5 * budget)
    assert compared.losses == pytest.approx((1.0, 1.5))


@pytest.mark.parametrize(
    "headline",
    [
        "Whether selection paid cannot be told: the holdout losses differ by 0.212 nats at 26 GFLOP (standard error).",
        "Which run is better cannot be told: both did not evaluate the holdout at equal spending (26 GFLOP). Compare.",
    ],
)
def test_a_headline_ends_inside_its_picture(pair, headline):
    with matplotlib.rc_context(plots.STYLE):
        figure = plots.comparison(*pair, ("governor", "uniform"), headline)
        figure.set_dpi(plots.DPI)
        figure.draw_without_rendering()
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1


def test_budgets_of_different_units_are_refused(make_run):
    with pytest.raises(UserError, match=r"flops.*seconds"):
        compare_runs(load_run(make_run("a")), load_run(make_run("b", unit="seconds")))


def test_a_run_without_a_holdout_loss_is_refused_by_name(make_run):
    run = make_run("young")
    first = (run / "events.jsonl").read_text().splitlines(keepends=True)[0]
    (run / "events.jsonl").write_text(first)
    with pytest.raises(UserError, match="young has no holdout"):
        compare_runs(load_run(make_run("a")), load_run(run))


def test_an_unfinished_run_is_not_judged_by_what_it_was_before_training(make_run):
    compared = compare_runs(load_run(make_run("a")), load_run(make_run("b", policy="uniform", finish=False)))
    assert compared.difference is None
    assert compared.headline.endswith("cannot be told yet: uniform has no holdout loss after training.")
    assert "uniform is unfinished." in notes(compared)


def test_differences_beside_the_policy_are_said(make_run):
    first = load_run(make_run("a"))
    same = compare_runs(first, load_run(make_run("b", policy="uniform")))
    assert [key for key, _, _ in same.differing] == ["policy"]
    assert not any("more than the policy" in note for note in notes(same))

    def change(event):
        if event["kind"] == "start":
            event["config"]["optimizer"]["lr"] = 1e-5

    other = compare_runs(first, edited(make_run("c", policy="uniform"), change))
    assert any("optimizer.lr (0.0003 and 1e-05)" in note for note in notes(other))


def test_other_holdout_samples_are_noticed(make_run):
    first = load_run(make_run("a"))
    second = load_run(make_run("b", policy="uniform", seed=1))
    assert any("other holdout samples" in note for note in notes(compare_runs(first, second)))


def test_the_page_holds_every_row_and_the_picture(pair, tmp_path):
    compared = compare_runs(*pair)
    page = write_comparison(compared, tmp_path / "new" / "place").read_text()
    assert "data:image/png;base64," in page
    assert (tmp_path / "new" / "place" / "compare.png").is_file()
    for name, *values in rows(compared):
        assert name in page
        for value in values:
            assert value in page
