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

    from pyeff.memory import Rates
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
_NEEDED_TO_SCORE = ("pyarrow", "pydantic", "safetensors", "scipy", "transformers", "yaml")


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


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as installed_version

        typer.echo(f"pyeff {installed_version('pyeff')}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
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
    _require(_NEEDED_TO_RUN, "run")
    given = _given(policy=policy, budget=budget, out=None if out is None else str(out), seed=seed)
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
def score(
    config: Annotated[Path, typer.Argument(help="YAML file: model, samples, method; see examples/score.yaml.")],
    method: Annotated[str | None, typer.Option(help="el2n, grand, rds_plus, bm25, ...: see docs/scoring.md.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the table.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the scores in the directory.")] = False,
    seed: Annotated[int | None, typer.Option(help="Stands in the table.")] = None,
) -> None:
    """Score samples by what a model makes of them; the options replace the file's settings."""
    _require(_NEEDED_TO_SCORE, "score")
    from pyeff.cli import tables
    from pyeff.train.config import load_config, parse_config
    from pyeff.train.score_config import ScoreConfig

    settings = load_config(config, kind=ScoreConfig)
    given = _given(method=method, out=None if out is None else str(out), seed=seed)
    if given:
        values = {**settings.model_dump(mode="json"), **given}
        settings = parse_config(values, name=f"{config} with {_as_typed(given)}", kind=ScoreConfig)
    from pyeff.train.score import score_samples

    console = _console()
    try:
        scores = score_samples(settings, resume=resume, notify=lambda text: console.print(text, style="dim"))
    except KeyboardInterrupt:
        typer.secho("Interrupted. The same command with --resume goes on.", err=True)
        raise typer.Exit(130) from None
    console.print(tables.scored(scores))
    console.print(f"Scores: {scores.path}", highlight=False, soft_wrap=True)


@app.command()
def select(
    config: Annotated[Path, typer.Argument(help="YAML file: scores or features, rule, how many.")],
    rule: Annotated[str | None, typer.Option(help="top_k, round_robin, bids, ...: see docs/selection.md.")] = None,
    keep: Annotated[float | None, typer.Option(help="Fraction of the pool.")] = None,
    k: Annotated[int | None, typer.Option(help="Number of samples.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the subset.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of rules that draw.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier selection in the directory.")] = False,
) -> None:
    """Choose a subset from scores, and say what it cost and when that pays; the options replace the file's settings."""
    _require(_NEEDED_TO_SCORE, "select")
    from pyeff.cli import tables
    from pyeff.train.config import load_values, parse_config
    from pyeff.train.select import select_samples
    from pyeff.train.select_config import SelectConfig

    given = _given(rule=rule, keep=keep, k=k, out=None if out is None else str(out), seed=seed)
    values = load_values(config)
    if isinstance(values, dict):
        # One of the two says how many: the one that is given last.
        replaced = {"keep", "k"} if {"keep", "k"} & set(given) else set()
        values = {**{key: value for key, value in values.items() if key not in replaced}, **given}
    name = f"{config} with {_as_typed(given)}" if given else str(config)
    chosen = select_samples(parse_config(values, name=name, kind=SelectConfig), force=force)
    console = _console()
    console.print(tables.selected(chosen))
    console.print(f"Subset: {chosen.path}", highlight=False, soft_wrap=True)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|MODEL",
            help="A config.json, a model's directory, a GGUF file, smollm2, or a name on the hub.",
        ),
    ],
    seq_len: Annotated[int, typer.Option(help="Tokens of a row.")],
    batch: Annotated[int, typer.Option(help="Rows of one forward and backward.")] = 1,
    accumulation: Annotated[int, typer.Option(help="Forwards whose gradients are summed before a step.")] = 1,
    packed: Annotated[bool, typer.Option("--packed", help="One row of samples kept apart by a dense mask.")] = False,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    optimizer: Annotated[
        str, typer.Option(help="adamw, adamw8bit, adam8bit, lion8bit, sgd8bit, muon8bit or adafactor8bit.")
    ] = "adamw",
    master: Annotated[str, typer.Option(help="Beside bf16 weights: none, stochastic, ecc8 or fp32.")] = "none",
    offload: Annotated[bool, typer.Option("--offload", help="Optimizer states of a GPU in host memory.")] = False,
    release: Annotated[
        str, typer.Option(help="Steps inside the backward: none, one-pass, or two-pass with exact clipping.")
    ] = "none",
    checkpointing: Annotated[str, typer.Option(help="none, layer or attention.")] = "none",
    compress: Annotated[str | None, typer.Option(help="Inputs that checkpoints keep in fp8 or int8.")] = None,
    offload_activations: Annotated[
        bool, typer.Option("--offload-activations", help="What checkpoints keep in a GPU's host memory.")
    ] = False,
    head: Annotated[str, typer.Option(help="logits, or fused: without them in memory.")] = "logits",
    lora_rank: Annotated[int, typer.Option(help="Train adapters of this rank; 0 trains everything.")] = 0,
    lora_targets: Annotated[str, typer.Option(help="Modules with an adapter, or all-linear.")] = "q_proj,v_proj",
    device: Annotated[str, typer.Option(help="cuda or cpu: their kernels keep different tensors.")] = "cuda",
    device_memory: Annotated[str | None, typer.Option(help='For example "24GB".')] = None,
    gpu: Annotated[str | None, typer.Option(help="Estimate times for a100, h100, h200, b200, l40s or rtx4090.")] = None,
    rates: Annotated[
        str | None, typer.Option(help='TFLOP/s and GB/s of the device, such as "400,2600"; or "measure".')
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write stacked bars to this PNG.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")] = False,
) -> None:
    """Say what a training step keeps in memory, when, what fits, and what a change would buy."""
    _require(("pydantic", "transformers", *(("matplotlib",) if plot is not None else ())), "plan")
    from pyeff.memory import plan as make_plan
    from pyeff.train.model import smollm2_file

    try:
        found = make_plan(
            str(smollm2_file()) if model == "smollm2" else model,
            seq_len=seq_len,
            batch=batch,
            accumulation=accumulation,
            packed=packed,
            dtype=dtype,  # type: ignore[arg-type]  # checked there, with the choices in the message
            optimizer=optimizer,  # type: ignore[arg-type]
            master=master,  # type: ignore[arg-type]
            offload=offload,
            release=release,  # type: ignore[arg-type]
            checkpointing=checkpointing,  # type: ignore[arg-type]
            compress=compress,  # type: ignore[arg-type]
            offload_activations=offload_activations,
            head=head,  # type: ignore[arg-type]
            lora_rank=lora_rank,
            lora_targets=[name.strip() for name in lora_targets.split(",")],
            device=device,
            device_memory=device_memory,
            rates=_rates(gpu, rates, device, dtype),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    from pyeff.cli.memory import plan_tables, write_plot

    if plot is not None:
        write_plot(found, plot)
    if json:
        import json as writer

        typer.echo(writer.dumps(found.to_dict(), indent=1))
        return
    console = _console()
    console.print(plan_tables(found))
    if plot is not None:
        console.print(f"Plot: {plot}", highlight=False, soft_wrap=True)


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
def replay(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, or a log of decisions.")],
) -> None:
    """Take every decision of a run again from its log alone; exit code 1 where one comes out otherwise."""
    from pyeff.cli.audit import log_of, replayed

    shown, different = replayed(log_of(directory))
    _console().print(shown)
    if different:
        raise typer.Exit(1)


@app.command()
def audit(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, or a log of decisions.")],
) -> None:
    """Hold the gains that the governor predicted against those it then measured."""
    from pyeff.cli.audit import audited, log_of

    _console().print(audited(log_of(directory)))


@app.command()
def info(
    verbose: Annotated[bool, typer.Option("--verbose", help="Say why other implementations are not taken.")] = False,
) -> None:
    """Show versions, devices, the compiled extension and which implementation each operation takes."""
    import pyeff
    from pyeff.cli import tables

    _console().print(tables.installed(pyeff.info(), verbose=verbose))


def _require(packages: Sequence[str], command: str) -> None:
    """Raise before anything is spent where a package is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"`pyeff {command}` needs {package}: pip install 'pyeff[run]'")


def _given(**options: object) -> dict[str, object]:
    return {key: value for key, value in options.items() if value is not None}


def _as_typed(given: Mapping[str, object]) -> str:
    return " ".join(f"--{key} {value}" for key, value in given.items())


def _rates(gpu: str | None, given: str | None, device: str, dtype: str) -> Rates | None:
    from pyeff.memory.rates import Rates, estimated_rates, measured_rates

    itemsize = 4 if dtype == "float32" else 2
    if given == "measure":
        return measured_rates(device, itemsize=itemsize)
    if given is not None:
        try:
            flops, bandwidth = (float(part) for part in given.split(","))
        except ValueError as error:
            raise UserError(
                f'--rates takes TFLOP/s and GB/s, such as "400,2600", or "measure"; got {given!r}'
            ) from error
        return Rates(1e12 * flops, 1e9 * bandwidth, "given")
    return None if gpu is None else estimated_rates(gpu, itemsize=itemsize)


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
    return parse_config({**settings.model_dump(mode="json"), **given}, name=f"{config} with {_as_typed(given)}")


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
