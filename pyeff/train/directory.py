"""A run's directory: its configuration, its lock, and whether it is finished."""

from __future__ import annotations

from pathlib import Path

from pyeff.errors import UserError
from pyeff.train.config import RunConfig, load_config
from pyeff.train.events import Event, read_events


def stored_config(directory: Path) -> RunConfig:
    """The configuration a run was started with; `UserError` when there is no run."""
    path = directory / "config.yaml"
    if not path.is_file():
        raise UserError(f"there is no run in {directory}: {path} is missing")
    return load_config(path)


def changed_key(given: RunConfig, stored: RunConfig) -> str | None:
    """The first key in which two configurations differ; the output directory may have moved."""
    a, b = given.model_dump(mode="json"), stored.model_dump(mode="json")
    return next((key for key in a if key != "out" and a[key] != b[key]), None)


def end_event(out: Path) -> Event | None:
    """The last event of a finished run; None while it is not finished."""
    if not (out / "result.json").exists():
        return None
    end = next((event for event in read_events(out / "events.jsonl") if event["kind"] == "end"), None)
    if end is None:
        raise UserError(f"{out} has a result.json but no end in its events.jsonl: the directory is damaged")
    return end
