"""The commands of `pyeff` and what every one of them promises about errors.

Something the user gave that cannot be used ends in one sentence on stderr and exit code 2, without a traceback.
Torch, matplotlib and rich are imported by the commands that need them, so `pyeff --help` is quick.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyeff.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from pyeff.train import RunConfig

app = typer.Typer(
    name="pyeff",
    help="Train a language model under a budget, and see where the budget went.",
    no_args_is_help=True,
    add_completion=False,
    # Tracebacks of defects stay Python's own: rich's would print the values of local variables.
    pretty_exceptions_enable=False,
)

_NEEDED_TO_RUN = ("matplotlib", "pydantic", "safetensors", "scipy", "transformers", "yaml")


def run_app(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        app(args=list(arguments), prog_name="pyeff", standalone_mode=True)
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


@app.callback()
def _commands() -> None:
    pass


@app.command()
def run(
    config: Annotated[Path | None, typer.Argument(help="The run's YAML file; left out with --resume.")] = None,
    policy: Annotated[str | None, typer.Option(help="governor, or uniform: the same budget without selection.")] = None,
    budget: Annotated[str | None, typer.Option(help='For example "4e13F", "5m" or "200k tokens".')] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the run.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this directory.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order and sampling.")] = None,
) -> None:
    """Train a model under a budget; the options replace the file's settings."""
    for package in _NEEDED_TO_RUN:  # before any budget is spent
        if importlib.util.find_spec(package) is None:
            raise UserError(f"`pyeff run` needs {package}: pip install 'pyeff[run]'")
    overrides = {"policy": policy, "budget": budget, "out": None if out is None else str(out), "seed": seed}
    given = {key: value for key, value in overrides.items() if value is not None}
    settings = _settings(config, given, resume)
    from pyeff.cli.display import display
    from pyeff.train import train_run

    console = _console()
    if resume is not None and (resume / "result.json").is_file():
        console.print(f"{resume} is finished: there is nothing to resume.", markup=False, soft_wrap=True)
        _finish(console, resume)
        return
    try:
        with display(console, directory=resume or settings.out) as observer:
            train_run(settings, observers=[observer], resume=resume)
    except KeyboardInterrupt:
        _say_how_to_resume(resume or settings.out)
        raise typer.Exit(130) from None
    _finish(console, resume or settings.out)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, finished or not.")],
) -> None:
    """Write report.html and plots/*.png of a run again, from its events alone."""
    _finish(_console(), directory)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run to set beside it.")],
    out: Annotated[
        Path | None, typer.Option(help="Where compare.html and compare.png go; by default beside the second run.")
    ] = None,
) -> None:
    """Set two runs side by side at equal spending."""
    from pyeff.cli import tables
    from pyeff.cli.compare import compare_runs, write_comparison
    from pyeff.cli.record import load_run

    compared = compare_runs(load_run(first), load_run(second))
    console = _console()
    console.print(tables.comparison(compared))
    names = f"compare-{compared.first.name}-{compared.second.name}"
    _point_to(console, write_comparison(compared, out or compared.second.path.resolve().parent / names))


@app.command()
def info() -> None:
    """Show versions, devices, the compiled extension and which implementation each operation takes."""
    import pyeff
    from pyeff.cli import tables

    _console().print(tables.installed(pyeff.info()))


def _console() -> Console:
    from rich.console import Console

    # Names of models, runs and sources are text: a path may hold [brackets] or :colons:.
    return Console(markup=False, emoji=False)


def _settings(config: Path | None, given: Mapping[str, object], resume: Path | None) -> RunConfig:
    from pyeff.train.config import load_config, parse_config

    if resume is not None:
        if given:
            name = next(iter(given))
            raise UserError(f"--{name} cannot be given with --resume: a resumed run keeps the settings it began with")
        if not resume.is_dir():
            raise UserError(f"--resume {resume}: there is no such directory")
        kept = resume / "config.yaml"
        if not kept.is_file():
            raise UserError(f"--resume {resume}: no config.yaml in it, so it is not the directory of a run")
        settings = load_config(kept)
        if config is not None and load_config(config).model_copy(update={"out": settings.out}) != settings:
            raise UserError(
                f"{config} differs from {kept}: a resumed run keeps the settings it began with; leave the file out"
            )
        return settings
    if config is None:
        raise UserError("name the configuration of the run, for example: pyeff run examples/smollm2.yaml")
    settings = load_config(config)
    if not given:
        return settings
    options = " ".join(f"--{key} {value}" for key, value in given.items())
    return parse_config({**settings.model_dump(mode="json"), **given}, name=f"{config} with {options}")


def _finish(console: Console, directory: Path) -> None:
    """Print the end of a run and write its report."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the report needs matplotlib: pip install 'pyeff[run]'")
    from pyeff.cli import tables
    from pyeff.cli.record import load_run
    from pyeff.cli.report import write_report

    record = load_run(directory)
    console.print(tables.summary(record))
    _point_to(console, write_report(record))


def _point_to(console: Console, page: Path) -> None:
    # Never wrapped: a path that is broken over two lines cannot be clicked or copied.
    console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)


def _say_how_to_resume(directory: Path) -> None:
    checkpoints = directory / "checkpoints"
    if checkpoints.is_dir() and any(checkpoints.glob("step-*")):
        typer.secho(f"Interrupted. Go on with: pyeff run --resume {directory}", err=True)
    else:
        typer.secho("Interrupted before the first checkpoint: the run must start again.", err=True)


def _fail(sentence: str) -> int:
    typer.secho(f"Error: {' '.join(sentence.split())}", fg=typer.colors.RED, err=True)
    return 2
