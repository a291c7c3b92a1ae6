from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyeff.train
from pyeff.cli import main
from pyeff.cli.app import run_app
from pyeff.errors import UserError
from pyeff.train.config import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def trained(monkeypatch):
    """Replaces the training loop; `calls` holds what it was given, `act` what it does."""

    class Loop:
        calls: list = []  # noqa: RUF012 (one test, one class)
        act = staticmethod(lambda config, observers: None)

    def train_run(config, *, observers=(), resume=None):
        Loop.calls.append((config, resume))
        return Loop.act(config, observers)

    monkeypatch.setattr(pyeff.train, "train_run", train_run, raising=False)
    return Loop


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
model: tiny
data:
  pool: {{kind: jsonl, path: pool.jsonl}}
  target: {{kind: jsonl, path: target.jsonl}}
budget: 1e12F
out: {tmp_path / "out"}
"""
    )
    return path


def sentence(capsys):
    """What went to stderr: one sentence on one line, no traceback."""
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nowhere"], "nowhere is missing"),
        (["report", "."], "no events.jsonl"),
        (["compare", "nowhere", "nowhere"], "nowhere is missing"),
        (["run"], "name the configuration"),
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "--resume", "nowhere"], "no such directory"),
        (["run", "--resume", "."], "no config.yaml"),
        (["run", "--resume", ".", "--seed", "3"], "--seed cannot be given with --resume"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_code_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert run_app(arguments) == 2
    assert words in sentence(capsys)


@pytest.mark.parametrize(("option", "value"), [("--policy", "oracle"), ("--budget", "4e13 bananas"), ("--seed", "-1")])
def test_a_bad_option_is_refused_before_training(config, trained, capsys, option, value):
    assert run_app(["run", str(config), option, value]) == 2
    assert option in sentence(capsys)
    assert not trained.calls


def test_an_error_of_the_training_loop_keeps_its_sentence(config, trained, capsys):
    def act(config, observers):
        raise UserError("pool.jsonl, line 3:\n  column `answer` is missing")

    trained.act = act
    assert run_app(["run", str(config)]) == 2
    assert "line 3: column `answer` is missing" in sentence(capsys)


def test_a_defect_keeps_its_traceback(config, trained):
    def act(config, observers):
        raise ZeroDivisionError

    trained.act = act
    with pytest.raises(ZeroDivisionError):
        run_app(["run", str(config)])


@pytest.mark.parametrize("saved", [True, False])
def test_an_interrupted_run_exits_with_130_and_says_how_to_go_on(config, trained, capsys, saved):
    def act(config, observers):
        if saved:
            (config.out / "checkpoints" / "step-000012").mkdir(parents=True)
        raise KeyboardInterrupt

    trained.act = act
    assert run_app(["run", str(config)]) == 130
    error = capsys.readouterr().err
    assert (f"pyeff run --resume {config.parent / 'out'}" in error) is saved
    assert ("must start again" in error) is not saved


def test_options_replace_the_settings_of_the_file(config, trained, make_run, capsys):
    run = make_run("elsewhere")
    arguments = ["--policy", "uniform", "--budget", "5m", "--seed", "7", "--out", str(run)]
    assert run_app(["run", str(config), *arguments]) == 0
    ((settings, resume),) = trained.calls
    trained.calls.clear()
    assert (settings.policy, settings.budget, settings.seed, settings.out) == ("uniform", "5m", 7, run)
    assert resume is None


def test_a_run_shows_its_events_and_ends_with_the_verdict_and_the_report(config, trained, make_run, capsys):
    run = make_run("out")  # the directory that the configuration names

    def act(config, observers):
        from pyeff.cli.record import load_run

        for event in load_run(config.out).events:
            for observer in observers:
                observer(event)

    trained.act = act
    trained.calls.clear()
    assert run_app(["run", str(config)]) == 0
    out = capsys.readouterr().out
    assert out.index("Estimate:") < out.index("REFRESH:") < out.index("Selection did not pay.")
    assert f"Report: {run / 'report.html'}" in out
    assert (run / "report.html").is_file()


def test_resuming_takes_the_settings_the_run_began_with(config, trained, make_run, capsys):
    run = make_run("out")
    (run / "config.yaml").write_text(load_config(config).to_yaml())
    trained.calls.clear()
    assert run_app(["run", "--resume", str(run)]) == 0
    ((settings, resume),) = trained.calls
    assert resume == run
    assert settings == load_config(config)
    config.write_text(config.read_text().replace("1e12F", "2e12F"))
    assert run_app(["run", str(config), "--resume", str(run)]) == 2
    assert "keeps the settings it began with" in sentence(capsys)


def test_a_finished_run_is_not_trained_again(config, trained, make_run, capsys):
    run = make_run("out")
    (run / "config.yaml").write_text(load_config(config).to_yaml())
    (run / "result.json").write_text("{}")
    trained.calls.clear()
    assert run_app(["run", "--resume", str(run)]) == 0
    assert not trained.calls
    assert "is finished: there is nothing to resume" in capsys.readouterr().out


def test_compare_prints_the_table_and_writes_beside_the_runs(make_run, capsys, tmp_path):
    first, second = make_run("a"), make_run("b", policy="uniform")
    assert run_app(["compare", str(first), str(second)]) == 0
    out = capsys.readouterr().out
    assert "scoring passes" in out
    assert (tmp_path / "compare-a-b" / "compare.html").is_file()
    assert run_app(["compare", str(first), str(second), "--out", str(tmp_path / "here")]) == 0
    assert (tmp_path / "here" / "compare.png").is_file()


def test_info_shows_each_operation_in_one_line_of_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run_app(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    info = pyeff.info()
    for found in info.operations:
        assert sum(line.split()[:1] == [found.operation] and found.impl in line.split() for line in lines) == 1
    assert any(info.version in line for line in lines)
    assert len(lines) < 2 * len(info.operations) + 40
    assert run_app(["info", "--verbose"]) == 0
    assert "the interpreter is for tests" in " ".join(capsys.readouterr().out.split()) or "triton" not in info.versions


@pytest.mark.parametrize("command", [["-m", "pyeff"], ["-m", "pyeff.cli"]], ids=" ".join)
def test_the_version_is_shown_by_the_command_and_the_module(command):
    shown = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["pyeff", pyeff.__version__]


def test_help_needs_neither_torch_nor_matplotlib_nor_transformers():
    code = (
        "import sys\n"
        "from pyeff.cli.app import run_app\n"
        "run_app(['run', '--help'])\n"
        "print(sorted({'torch', 'matplotlib', 'transformers', 'yaml', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)  # importing it raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "pyeff.cli.app", raising=False)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "pip install 'pyeff[run]'" in capsys.readouterr().err


def test_the_demo_describes_the_pool_it_promises():
    from pyeff.train.task import read_task

    settings = load_config(EXAMPLES / "smollm2.yaml")
    raw = read_task(settings.data, seed=settings.seed)
    families = {sample.source for sample in raw.holdout}
    assert families == {"count_bits", "chain_sum", "spell_backward"}
    assert len(raw.pool) == 600
    assert sum(sample.source in families for sample in raw.pool) == 150
    judged = {sample.prompt for sample in [*raw.anchors, *raw.holdout]}
    assert not judged & {sample.prompt for sample in raw.pool}


@pytest.mark.parametrize("name", ["score_tokens.py", "train_adamw8bit.py"])
def test_the_examples_run(name):
    # One thread: threads that wait for each other are slow where other tests use the cores too.
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_names_of_runs_are_printed_as_they_are(make_run, capsys):
    first, second = make_run("[bold]a"), make_run("b[nowhere]:x:")
    assert run_app(["compare", str(first), str(second), "--out", str(first.parent / "out")]) == 0
    table = capsys.readouterr().out
    assert "[bold]a" in table
    assert "b[nowhere]:x:" in table
