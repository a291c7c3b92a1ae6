from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyeff.errors import UserError
from pyeff.train.config import RunConfig, load_config, parse_config


@pytest.fixture
def values() -> dict[str, Any]:
    return {
        "model": "smollm2",
        "data": {
            "pool": [{"kind": "jsonl", "path": "pool.jsonl"}],
            "target": [{"kind": "jsonl", "path": "target.jsonl"}],
            "max_tokens": 60,
        },
        "budget": "4e13F",
    }


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(values)
    *parents, last = path.split(".")
    place = values
    for part in parents:
        place = place.setdefault(part, {})
    place[last] = value
    return values


def test_a_configuration_survives_being_written_and_read(values: dict[str, Any], tmp_path: Path):
    config = parse_config(changed(values, "lora.rank", 4))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_one_source_needs_no_list(values: dict[str, Any]):
    single = changed(values, "data.pool", values["data"]["pool"][0])
    assert parse_config(single) == parse_config(values)


def test_a_rate_that_yaml_reads_as_text_is_a_number(values: dict[str, Any]):
    assert isinstance(yaml.safe_load("1e-4"), str)
    assert parse_config(changed(values, "optimizer.lr", "1e-4")).optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("batch_token", 64, "batch_token: unknown key, did you mean 'batch_tokens'?"),
        ("optimizer.learning_rate", 1.0, "optimizer.learning_rate: unknown key"),
        ("optimizer.lr", -1, "optimizer.lr: Input should be greater than 0 (got -1)"),
        ("optimizer.betas", [0.9, 1.0], "optimizer.betas: betas must be in [0, 1)"),
        ("selector.score", "luck", "selector.score: Input should be"),
        ("governor.check_evry", 0.1, "governor: unknown key 'check_evry'"),
        ("governor.check_every", 2.0, "governor: check_every must be"),
        ("price", "cheap", "cannot read the price 'cheap'"),
        ("control_share", 0.9, "control_share"),
        ("budget", "lots", "budget: cannot read the budget 'lots'"),
        ("budget", 4e13, "budget: a number by itself has no unit: expected text such as '4e13F'"),
        ("price", 0.01, "price: a number by itself has no unit: expected text such as '0.01 per PF'"),
        ("budget", "-5F", "budget: cannot read the budget '-5F'"),
        ("batch_tokens", 32, "batch_tokens (32) must hold a sample of data.max_tokens (60)"),
        ("micro_batch_tokens", 4096, "micro_batch_tokens (4096) must not exceed batch_tokens (1024)"),
        ("data.exact_match", 100, "exact_match (100) must not exceed holdout (48)"),
        ("data.pool", [], "data.pool"),
        ("data.anchors", 1, "data.anchors"),
        ("lora.rank", 0, "lora.rank"),
        ("cooldown", 1.0, "cooldown"),
        ("data", 3, "data"),
    ],
)
def test_a_bad_value_is_named_by_its_path_in_one_sentence(values, path: str, value: Any, words: str):
    with pytest.raises(UserError) as error:
        parse_config(changed(values, path, value), name="run.yaml")
    assert words in str(error.value)
    assert str(error.value).startswith("run.yaml: ")
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named(values: dict[str, Any]):
    del values["model"]
    with pytest.raises(UserError, match="model: is missing"):
        parse_config(values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2", "line 2"),
        ("- 1", "expected keys and values, got list"),
        ("", "got NoneType"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands twice"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_sentence(tmp_path: Path, text: str, words: str):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            load_config(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_every_default_is_accepted_by_its_own_rules(values: dict[str, Any]):
    config = parse_config(changed(values, "data.max_tokens", 1024))
    assert parse_config(config.model_dump()) == config
    assert isinstance(config, RunConfig)
