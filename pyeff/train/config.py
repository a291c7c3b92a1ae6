"""What a run is asked to do: the configuration file, checked before anything is loaded or spent.

Fractions are fractions of the budget. Every default is stated with its reason where it is not obvious.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from pyeff.data.sources import Source
from pyeff.errors import UserError
from pyeff.governor import Budget, GovernorConfig, parse_price
from pyeff.memory.plans import parse_size
from pyeff.memory.transformer import Checkpointing

# Of the budget. What is not training must be small beside it, or be asked for.
_OVERHEAD_CAP = 0.05


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class LoRAConfig(_Strict):
    """Train low-rank adapters of the named modules instead of all weights (needs peft)."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class DataConfig(_Strict):
    """Where samples come from and how many are kept apart to judge the run.

    ``target`` is the task to become better at: its samples are split into four sets that share no prompt:
    ``anchors`` (the governor decides by them), ``holdout`` (only reported), ``target_samples`` (what
    selection compares the pool with) and, as the first of the holdout, ``exact_match`` samples that are
    also answered in words. Prompts of anchors and holdout are removed from the pool; those that selection compares
    with may stand in it.
    """

    pool: list[Source] = Field(min_length=1)
    target: list[Source] = Field(min_length=1)
    anchors: int = Field(default=24, ge=2)
    holdout: int = Field(default=48, ge=2)
    target_samples: int = Field(default=24, ge=1)
    exact_match: int = Field(default=24, ge=0)
    max_tokens: int = Field(default=1024, ge=2)
    max_new_tokens: int = Field(default=16, ge=1)
    chat_template: bool | Literal["auto"] = "auto"
    drop_long: bool = False

    @field_validator("pool", "target", mode="before")
    @classmethod
    def _one_source_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _exact_match_is_part_of_holdout(self) -> DataConfig:
        if self.exact_match > self.holdout:
            raise ValueError(f"exact_match ({self.exact_match}) must not exceed holdout ({self.holdout})")
        return self


class OptimizerConfig(_Strict):
    """AdamW; ``states: 8bit`` keeps its moments in two bytes a parameter instead of eight."""

    states: Literal["8bit", "32bit"] = "8bit"
    lr: float = Field(default=5e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    # Adam's first steps have the size of the rate whatever the gradient: a short ramp keeps them from
    # undoing what the model knows.
    warmup_steps: int = Field(default=5, ge=0)
    clip: float = Field(default=1.0, gt=0)

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas must be in [0, 1), got {value}")
        return value


class SelectorConfig(_Strict):
    """How a scored pool becomes a training set."""

    score: Literal["target_similarity", "nll", "el2n", "entropy", "head_grad_norm", "random"] = "target_similarity"
    keep: float = Field(default=0.25, gt=0, le=1)
    drop_hardest: float = Field(default=0.1, ge=0, lt=1)


class BatchSelectionConfig(_Strict):
    """Which samples of a larger batch each step is made on; what a method does not read keeps its default.

    ``greats`` and ``opus`` compare the candidates with ``target_batch`` samples of ``target`` at each step: sources of
    samples of its own, or left out those of `data.target_samples`. No prompt of it may stand in anchors or holdout.
    """

    method: Literal["greats", "opus", "colm", "random"]
    # Of the candidates, which hold 1 / keep times the tokens of a step.
    keep: float = Field(default=0.5, gt=0, le=1)
    # Keep the activations of all candidates until the choice. False: pass the chosen through the model again.
    defer: bool = True
    target: list[Source] | None = None
    target_batch: int = Field(default=4, ge=1)
    # Rows and columns that are left of each matrix's gradient (greats, colm); numbers of the sketch of all (opus).
    sketch_size: int = Field(default=16, ge=1)
    sketch_dim: int = Field(default=4096, ge=1)
    # In standard deviations of the utilities (opus).
    temperature: float = Field(default=0.9, gt=0)
    # Sources kept whole, as far as they fit; the parameter whose gradient is compared (colm).
    keep_sources: list[str] = Field(default_factory=list)
    layer: str | None = None

    @field_validator("target", mode="before")
    @classmethod
    def _one_source_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _options_are_the_methods_own(self) -> BatchSelectionConfig:
        known = {
            "greats": {"defer", "target", "target_batch", "sketch_size"},
            "opus": {"defer", "target", "target_batch", "sketch_dim", "temperature"},
            "colm": {"defer", "sketch_size", "keep_sources", "layer"},
            "random": set(),
        }[self.method]
        for name, field in type(self).model_fields.items():
            default = field.get_default(call_default_factory=True)
            if name not in {"method", "keep", *known} and getattr(self, name) != default:
                raise ValueError(f"{name} has no meaning for method {self.method}")
        return self

    @property
    def scores(self) -> bool:
        """Whether the choice takes a pass over the candidates."""
        return self.method != "random" and self.keep < 1


class RunConfig(_Strict):
    """One run: model, data, budget and how it may be spent."""

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoRAConfig | None = None
    # What a layer keeps for its backward: everything, its input ("layer"), or its input and attention's results
    # ("attention", as `pyeff.checkpoint`). None: everything, or what the planner chooses within `memory`.
    checkpointing: Checkpointing | None = None
    # Bytes of a training step's tensors, such as "20GB"; what is left open above and below is then chosen to fit.
    memory: str | int | None = None
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    batch_tokens: int = Field(default=1024, ge=2)
    # Tokens of one forward and backward; the gradients of a batch are summed over its parts. None: the whole batch,
    # or what the planner chooses within `memory`.
    micro_batch_tokens: int | None = Field(default=None, ge=2)
    budget: str
    # What the budget must return, such as "0.01 per PF" or "0.02 for 10%": a run that no longer does ends early. None:
    # the budget is paid for and is spent whole.
    price: str | None = None
    policy: Literal["governor", "uniform"] = "governor"
    selector: SelectorConfig = SelectorConfig()
    # None: every step is made on the batch that was drawn.
    batch_selection: BatchSelectionConfig | None = None
    # Of the batches after a selection, drawn from the whole pool instead: they measure what the selection is worth.
    control_share: float = Field(default=0.05, ge=0, le=0.5)
    # Evaluation, scoring and probes together take at most `overhead_cap` of the budget: 0.05 unless it says otherwise.
    governor: dict[str, Any] = Field(default_factory=dict)
    # A fifth is where 1-sqrt cooldowns stop improving (Haegele et al., 2024, arXiv:2405.18392).
    cooldown: float = Field(default=0.2, ge=0, lt=1)
    ema_decay: float = Field(default=0.9, ge=0, lt=1)
    checkpoint_every: float = Field(default=0.2, gt=0, le=1)
    # The newest ones that stay on the disk; methods that score along a training take about four.
    keep_checkpoints: int = Field(default=2, ge=1)
    save_model: bool = True
    seed: int = Field(default=0, ge=0, lt=2**31)
    # OpenMP ends the process where it cannot make as many as asked for.
    threads: int | None = Field(default=None, ge=1, le=1024)
    out: Path = Path("runs/latest")

    @field_validator("budget", "price", mode="before")
    @classmethod
    def _a_number_has_a_unit(cls, value: Any, field: ValidationInfo) -> Any:
        if isinstance(value, (int, float)):
            examples = (
                "'4e13F', '5m' or '200k tokens'" if field.field_name == "budget" else "'0.01 per PF' or '0.02 for 10%'"
            )
            raise ValueError(f"a number by itself has no unit: expected text such as {examples}, got {value!r}")
        return value

    @field_validator("budget")
    @classmethod
    def _budget_is_readable(cls, value: str) -> str:
        Budget.parse(value)
        return value

    @field_validator("memory")
    @classmethod
    def _memory_is_a_size(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            try:
                parse_size(value)
            except ValueError as error:  # the key stands before the message
                raise ValueError(str(error).removeprefix("memory ")) from error
        return value

    @field_validator("governor")
    @classmethod
    def _governor_options_exist(cls, value: dict[str, Any]) -> dict[str, Any]:
        known = [field.name for field in dataclasses.fields(GovernorConfig)]
        for name in value:
            if name not in known:
                raise ValueError(f"unknown key {name!r}; there are {', '.join(known)}")
        try:
            GovernorConfig(**value)
        except TypeError as error:
            raise ValueError(str(error)) from error
        return {"overhead_cap": _OVERHEAD_CAP, **value}

    @model_validator(mode="after")
    def _price_is_in_the_budgets_unit(self) -> RunConfig:
        if self.price is not None:
            parse_price(self.price, self.parsed_budget)
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> RunConfig:
        if self.data.max_tokens > self.micro_tokens:
            name = "batch_tokens" if self.micro_batch_tokens is None else "micro_batch_tokens"
            raise ValueError(
                f"{name} ({self.micro_tokens}) must hold a sample of data.max_tokens ({self.data.max_tokens})"
            )
        if self.micro_tokens > self.batch_tokens:
            raise ValueError(
                f"micro_batch_tokens ({self.micro_tokens}) must not exceed batch_tokens ({self.batch_tokens})"
            )
        return self

    @model_validator(mode="after")
    def _candidates_fit_the_memory(self) -> RunConfig:
        chosen = self.batch_selection
        if self.memory is not None and chosen is not None and chosen.scores and chosen.defer:
            raise ValueError(
                "memory does not count the activations that batch_selection keeps until its choice: "
                "set batch_selection.defer to false"
            )
        return self

    @property
    def micro_tokens(self) -> int:
        """Tokens of one forward and backward."""
        return self.micro_batch_tokens or self.batch_tokens

    @property
    def parsed_budget(self) -> Budget:
        """The budget as an amount and a unit."""
        return Budget.parse(self.budget)

    @property
    def parsed_price(self) -> float | None:
        """Nats that a unit of the budget must return; None where nothing is asked of it."""
        return None if self.price is None else parse_price(self.price, self.parsed_budget)

    @property
    def governor_config(self) -> GovernorConfig:
        """The governor's own settings."""
        return GovernorConfig(**self.governor)

    def to_yaml(self) -> str:
        """The complete configuration as YAML, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


Config = TypeVar("Config", bound=BaseModel)


def _known_keys(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Keys of the model at a location, for a suggestion; empty where it cannot be told."""
    model: Any = kind
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
        field = model.model_fields.get(str(part))
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return list(model.model_fields) if model is not None else []


@overload
def parse_config(values: Any, *, name: str = ...) -> RunConfig: ...
@overload
def parse_config(values: Any, *, name: str = ..., kind: type[Config]) -> Config: ...
def parse_config(values: Any, *, name: str = "configuration", kind: type[Any] = RunConfig) -> Any:
    """Check a dictionary read from YAML: a `RunConfig`, or another ``kind``.

    Raises `UserError` with the path of the first key that is unknown, missing or has a bad value.
    """
    if not isinstance(values, dict):
        raise UserError(f"{name}: expected keys and values, got {type(values).__name__}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        first = problems[0]
        where = ".".join(str(part) for part in first["loc"]) or "configuration"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1]), _known_keys(kind, first["loc"][:-1]), n=1)
            message = "unknown key" + (f", did you mean {near[0]!r}?" if near else "")
        elif first["type"] == "missing":
            message = "is missing"
        elif (
            "input" in first
            and not isinstance(first["input"], (dict, list, BaseModel))
            and repr(first["input"]) not in message  # our own messages say what came
        ):
            message += f" (got {first['input']!r})"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{name}: {where}: {message}{more}") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML forbids a key that stands twice; PyYAML takes the last one and says nothing."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


@overload
def load_config(path: str | Path) -> RunConfig: ...
@overload
def load_config(path: str | Path, *, kind: type[Config]) -> Config: ...
def load_config(path: str | Path, *, kind: type[Any] = RunConfig) -> Any:
    """Read a YAML configuration: a `RunConfig`, or another ``kind``.

    Raises `UserError` when the file cannot be read, is not YAML, or a key is unknown, missing or bad.
    """
    return parse_config(load_values(path), name=str(path), kind=kind)


def load_values(path: str | Path) -> Any:
    """Read what a YAML file holds, unchecked.

    Raises `UserError` when the file cannot be read or is not YAML.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}") from error
    try:
        values = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: plain values alone
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UserError(f"{path}{line}: {problem}") from error
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        # What PyYAML lets through of a date without such a month, a number too long, a thousand brackets.
        raise UserError(f"{path}: a value cannot be read as YAML ({error})") from error
    return values
