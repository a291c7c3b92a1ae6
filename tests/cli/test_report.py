from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from pyeff.cli import plots
from pyeff.cli.record import load_run
from pyeff.cli.report import ledger_rows, write_atomic, write_report
from pyeff.cli.verdict import verdict
from pyeff.errors import UserError

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Text by tag, and whether every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def within(self, tag):
        return [t for name, t in self.text if name == tag and t.strip()]


def page_of(run):
    page = Page(write_report(load_run(run)).read_text())
    assert not page.open
    return page


@pytest.mark.parametrize(
    ("options", "first_line"),
    [
        ({"paid": False}, "Selection did not pay."),
        ({"paid": True}, "Selection paid by the run's own estimate."),
        ({"paid": None}, "Whether selection paid cannot be told from this run."),
        ({"policy": "uniform"}, "No selection was made (uniform policy)."),
        ({"refreshes": 0}, "The governor selected nothing"),
        ({"finish": False}, "Unfinished: 53 % of 40 TFLOP spent; whether selection pays cannot be told yet."),
    ],
)
def test_the_first_line_says_whether_selection_paid(make_run, options, first_line):
    page = page_of(make_run(**options))
    assert page.within("h1")[0].startswith(first_line)


def test_a_run_that_selected_nothing_cannot_claim_that_selection_paid(make_run):
    judged = verdict(load_run(make_run(refreshes=0, paid=True)))
    assert judged.paid is None
    assert "paid by" not in judged.headline


@pytest.mark.parametrize(
    ("after", "error", "words"),
    [(1.0, 0.1, "fell from 2.000 to 1.000"), (3.0, 0.1, "rose from 2.000"), (1.9, 0.1, "did not change measurably")],
)
def test_a_change_within_two_standard_errors_is_not_called_a_change(make_run, after, error, words):
    run = make_run()
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    end = json.loads(lines[-1])
    end["holdout"] = {"before": 2.0, "after": after, "gain": 2.0 - after, "standard_error": error}
    (run / "events.jsonl").write_text("".join(lines[:-1]) + json.dumps(end) + "\n")
    assert words in verdict(load_run(run)).headline


def test_every_decision_and_its_reason_is_on_the_page(make_run):
    run = make_run(refreshes=2)
    text = " ".join(t for _, t in page_of(run).text)
    for event in load_run(run).of("decision"):
        assert event["reason"] in text


def test_the_text_of_samples_cannot_become_markup(make_run):
    run = make_run()
    html = write_report(load_run(run)).read_text()
    assert "<b>Spell</b>" not in html
    assert "&lt;b&gt;Spell&lt;/b&gt;" in html


def test_the_page_fetches_nothing(make_run):
    page = page_of(make_run())
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)


@pytest.mark.parametrize(
    "options", [{}, {"policy": "uniform"}, {"finish": False}, {"unit": "seconds"}, {"unit": "tokens", "refreshes": 2}]
)
def test_every_kind_of_run_has_all_its_pictures(make_run, options):
    run = make_run(**options)
    write_report(load_run(run))
    names = {path.name for path in (run / "plots").iterdir()}
    assert names == {"overview.png", "loss.png", "budget.png", "samples.png", "decisions.png"}
    for name in names:
        data = (run / "plots" / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert int.from_bytes(data[16:20], "big") == 9 * plots.DPI


@pytest.mark.parametrize("events", [1, 2, 3, 5])
def test_a_run_that_has_barely_begun_has_a_report(make_run, events):
    run = make_run()
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(lines[:events]))
    assert "Unfinished" in page_of(run).within("h1")[0]


def test_a_loss_that_was_not_finite_does_not_break_the_report(make_run):
    run = make_run()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for event in events:
        if event["kind"] in ("step", "evaluate") and event["step"] > 30:
            event["loss"] = event["standard_error"] = None
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    page_of(run)


def test_the_ledger_table_adds_up(make_run):
    rows = ledger_rows(load_run(make_run()))
    tokens = [int(row[3].replace(",", "")) for row in rows]
    assert tokens[-1] == sum(tokens[:-1]) > 0
    assert rows[-1][0] == "total"


def test_a_report_can_be_made_again(make_run):
    run = make_run()
    first = write_report(load_run(run)).read_bytes()
    assert write_report(load_run(run)).read_bytes() == first
    assert not [p for p in run.rglob(".*") if p.is_file()]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "page.html"
    target.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_atomic(target, "text is not bytes")  # type: ignore[arg-type]
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_that_cannot_be_written_is_one_sentence(make_run):
    run = make_run()
    (run / "plots").write_text("a file in the way")
    with pytest.raises(UserError, match="report cannot be written"):
        write_report(load_run(run))


def test_pictures_tell_lines_apart_without_colour():
    marks = [mark for mark, _ in plots.ACTION_MARKS.values()]
    assert len(set(marks)) == len(marks)


def test_what_was_kept_within_batches_is_on_the_page_by_source(make_run):
    run = make_run(policy="uniform")
    plain = load_run(run)
    assert "within its batch" not in verdict(plain).headline
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    events[-1]["batch_selection"] = {
        "method": "greats",
        "kept": 30,
        "candidates": 64,
        "spent": 0.25 * plain.budget,
        "by_source": {"sums": [24, 32], "noise": [6, 32]},
    }
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    text = " ".join(page_of(run).within("td") + page_of(run).within("p"))
    assert "noise 6 32 19 %" in text
    assert "greats kept 30 of 64 candidates (47 %), which took" in text
    assert "(25 % of the budget)" in text
    assert "only a run without that tells" in verdict(load_run(run)).headline
