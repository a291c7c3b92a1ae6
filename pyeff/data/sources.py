"""Where samples come from: files, datasets, procedural tasks; and ways to spoil them on purpose."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from pyeff.data.samples import Sample
from pyeff.errors import UserError

# A task may repeat itself: count_bits up to 64 has 64 questions. By n ln n draws nearly all of n equally
# likely questions have turned up; for the thousands of a large pool that is 10 draws a sample. Past twice
# that a task counts as exhausted.
_CANDIDATES_PER_SAMPLE = 20


class _SourceModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    corrupt: Literal["wrong_answer", "shuffle_words"] | None = Field(
        default=None,
        description="spoil every sample on purpose: give it another sample's answer, or shuffle its words",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the draw and of the corruption")
    max_characters: int | None = Field(
        default=None, gt=0, description="leave out samples whose prompt and answer together are longer"
    )

    @abstractmethod
    def read(self) -> list[Sample]:
        """The samples of this source, before corruption."""

    def _short(self, sample: Sample) -> bool:
        return self.max_characters is None or len(sample.prompt) + len(sample.answer) <= self.max_characters


class _Columns(_SourceModel):
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    source_column: str | None = Field(default=None, description="column that names each sample's origin")
    id_column: str | None = Field(
        default=None, description="column of the samples' own ids, text or whole numbers; by default NAME:ROW"
    )
    limit: int | None = Field(default=None, gt=0, description="read at most this many rows")

    @property
    def _columns(self) -> list[str]:
        """The columns that are read."""
        named = (self.prompt_column, self.answer_column, self.source_column, self.id_column)
        return [column for column in named if column is not None]

    def _sample(self, row: dict[str, Any], where: str, sample_id: str, origin: str) -> Sample:
        values = []
        for column in self._columns:
            if column not in row:
                found = ", ".join(map(str, row)) or "none"
                raise UserError(f'{where}: there is no column "{column}"; the columns are: {found}')
            value = row[column]
            if column == self.id_column and isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str):
                raise UserError(
                    f'{where}: column "{column}" should be text, but holds {_short_repr(value)} '
                    f"({type(value).__name__})"
                )
            if not value.strip():
                raise UserError(f'{where}: column "{column}" is empty')
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise UserError(f'{where}: column "{column}" holds half a surrogate pair, which is no text') from error
            values.append(value)
        prompt, answer, *more = values
        source = more.pop(0) if self.source_column else origin
        return Sample(more[0] if self.id_column else sample_id, prompt, answer, source)

    def _read_rows(self, rows: Iterator[tuple[str, dict[str, Any]]], origin: str, name: str) -> list[Sample]:
        samples: list[Sample] = []
        seen: dict[str, str] = {}
        count = 0
        for where, row in rows:
            if self.limit is not None and count == self.limit:
                break
            sample = self._sample(row, where, f"{origin}:{count}", origin)
            count += 1
            if seen.setdefault(sample.id, where) != where:
                raise UserError(f"{where}: the id {_short_repr(sample.id)} is that of {seen[sample.id]} too")
            if self._short(sample):
                samples.append(sample)
        if not samples:
            why = f"none of its {count} samples has at most {self.max_characters} characters" if count else "no rows"
            raise UserError(f"{name} is empty: {why}")
        return samples


class JsonlSource(_Columns):
    """One JSON object a line. Blank lines are passed over; without ``id_column`` samples are numbered row by row."""

    kind: Literal["jsonl"] = "jsonl"
    path: Path

    def read(self) -> list[Sample]:
        """Read the file.

        Raises:
            UserError: the file is missing, unreadable or empty; a line is not a JSON object or lacks a
                column. The sentence names file and line.
        """
        return self._read_rows(self._rows(), self.path.stem, str(self.path))

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        try:
            with _existing(self.path).open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, start=1):
                    if not line.strip():
                        continue
                    where = f"{self.path}, line {number}"
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
                    except (ValueError, RecursionError) as error:  # a number or a nesting without end
                        raise UserError(f"{where}: not readable as JSON ({_first_line(error)})") from error
                    if not isinstance(row, dict):
                        raise UserError(f"{where}: should be a JSON object, but holds {_short_repr(row)}")
                    yield where, row
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error


class ParquetSource(_Columns):
    """A Parquet file; only the columns named are read."""

    kind: Literal["parquet"] = "parquet"
    path: Path

    def read(self) -> list[Sample]:
        """Read the file.

        Raises:
            UserError: the file is missing, unreadable or empty, or a column is missing or not text.
        """
        return self._read_rows(self._rows(), self.path.stem, str(self.path))

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(_existing(self.path)) as file:
                wanted = set(self._columns)
                present = file.schema_arrow.names
                # A missing column is reported by the row that lacks it, with the columns that exist.
                columns = [c for c in present if c in wanted] if wanted <= set(present) else present
                number = 0
                for batch in file.iter_batches(columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{self.path}, row {number}", row
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path} cannot be read as Parquet: {_first_line(error)}") from error


class HFDatasetSource(_Columns):
    """A dataset of the Hugging Face `datasets` library: a hub name, or a local directory or builder name."""

    kind: Literal["dataset"] = "dataset"
    name: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    data_files: str | list[str] | None = None

    def read(self) -> list[Sample]:
        """Load the dataset; its own scripts are never run.

        Raises:
            UserError: `datasets` is not installed, the dataset cannot be loaded, or a column is missing or
                not text.
        """
        try:
            import datasets
        except ImportError as error:
            raise UserError(f'the dataset "{self.name}" needs the package datasets: pip install datasets') from error
        try:
            table = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, data_files=self.data_files
            )
        except Exception as error:  # the library and its file systems raise many kinds
            raise UserError(f'the dataset "{self.name}" cannot be loaded: {_first_line(error)}') from error
        rows = ((f"{self.name}, row {number}", row) for number, row in enumerate(table, start=1))
        return self._read_rows(rows, self.name, f'the dataset "{self.name}"')


class ReasoningGymTask(BaseModel):
    """One procedural task: its name in reasoning-gym, its options, and its share of the source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    weight: float = Field(default=1.0, gt=0, description="share of what the counted tasks leave")
    count: int | None = Field(default=None, ge=0, description="exact number of samples, in place of a share")
    config: dict[str, Any] = Field(default_factory=dict, description="options of the task itself")


class ReasoningGymSource(_SourceModel):
    """Procedural questions with verifiable answers from the package reasoning-gym.

    `size` samples in all: tasks with a `count` get it, the rest is shared out by `weight` (largest
    remainder). A task given as a bare string has weight 1. Without `distinct: false` no question occurs twice.
    """

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: list[ReasoningGymTask] = Field(min_length=1)
    size: int = Field(gt=0)
    distinct: bool = True

    @field_validator("tasks", mode="before")
    @classmethod
    def _names_are_tasks(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"name": task} if isinstance(task, str) else task for task in value]
        return value

    def read(self) -> list[Sample]:
        """Generate the samples, task after task; deterministic in `seed`.

        Raises:
            UserError: reasoning-gym is not installed; a task is unknown or refuses its options; it has fewer
                distinct questions (within `max_characters`) than asked for; the counts exceed `size`.

        Cost: the first import of reasoning-gym takes about a second, most tasks below a millisecond a sample.
        """
        samples: list[Sample] = []
        for number, (task, count) in enumerate(zip(self.tasks, self._counts(), strict=True)):
            samples += self._generate(task, count, number)
        return samples

    def _counts(self) -> list[int]:
        fixed = sum(task.count for task in self.tasks if task.count is not None)
        total_weight = sum(task.weight for task in self.tasks if task.count is None)
        rest = self.size - fixed
        if rest < 0 or (total_weight == 0 and rest != 0):
            raise UserError(f"the counts of the reasoning-gym tasks add up to {fixed}, but size is {self.size}")
        shares = [rest * t.weight / total_weight if t.count is None else 0.0 for t in self.tasks]
        counts = [int(share) if t.count is None else t.count for t, share in zip(self.tasks, shares, strict=True)]
        by_remainder = sorted(range(len(shares)), key=lambda i: (int(shares[i]) - shares[i], i))
        for i in by_remainder[: self.size - sum(counts)]:
            counts[i] += 1
        return counts

    def _generate(self, task: ReasoningGymTask, count: int, number: int) -> list[Sample]:
        if count == 0:
            return []
        candidates = count * _CANDIDATES_PER_SAMPLE
        # Two entries of one task draw apart, and so do the tasks of two sources with different seeds.
        seed = _seed("reasoning_gym", self.seed, number) % 2**32
        dataset = _reasoning_gym_dataset(task, size=candidates, seed=seed)
        samples: list[Sample] = []
        seen: set[str] = set()
        for i in range(candidates):
            try:
                item = dataset[i]
            except Exception as error:  # generators fail in their own ways
                raise UserError(f"reasoning-gym task {task.name} failed: {_first_line(error)}") from error
            prompt, answer = item["question"], item["answer"]
            if not isinstance(answer, str) or not answer.strip():
                raise UserError(
                    f"reasoning-gym task {task.name} has questions without one written answer: it cannot be trained on"
                )
            sample = Sample(f"{task.name}-{self.seed}.{number}:{i}", prompt, answer, task.name)
            if not self._short(sample) or (self.distinct and prompt in seen):
                continue
            seen.add(prompt)
            samples.append(sample)
            if len(samples) == count:
                return samples
        what = "distinct questions" if self.distinct else "questions"
        short = f" of at most {self.max_characters} characters" if self.max_characters else ""
        raise UserError(
            f"reasoning-gym task {task.name} gave {len(samples)} {what}{short} in {candidates} draws, "
            f"but {count} are asked for: ask for fewer, widen its options"
            + (", or set distinct: false" if self.distinct else "")
        )


Source = Annotated[JsonlSource | ParquetSource | HFDatasetSource | ReasoningGymSource, Field(discriminator="kind")]


def load_samples(spec: _SourceModel | Sequence[_SourceModel]) -> list[Sample]:
    """Read one source, or several one after the other, and apply their corruptions.

    Ids are made unique across the sources by a suffix "#2", "#3", ...

    Raises:
        UserError: a source is missing, malformed or empty; one sentence that names it.

    Example:
        >>> from pyeff.data import ReasoningGymSource, load_samples
        >>> source = ReasoningGymSource(tasks=["chain_sum"], size=2, seed=1)
        >>> [sample.source for sample in load_samples(source)]
        ['chain_sum', 'chain_sum']
    """
    sources = [spec] if isinstance(spec, _SourceModel) else list(spec)
    if not sources:
        raise UserError("there are no data sources")
    samples: list[Sample] = []
    used: dict[str, int] = {}
    for source in sources:
        read = source.read()
        if source.corrupt == "wrong_answer":
            read = _with_wrong_answers(read, source.seed)
        elif source.corrupt == "shuffle_words":
            read = _with_shuffled_words(read, source.seed)
        for sample in read:
            used[sample.id] = used.get(sample.id, 0) + 1
            if used[sample.id] > 1:
                sample = replace(sample, id=f"{sample.id}#{used[sample.id]}")
            samples.append(sample)
    return samples


def _with_wrong_answers(samples: list[Sample], seed: int) -> list[Sample]:
    """Give every sample an answer that another sample of the same origin has and that is not its own."""
    answers: dict[str, list[str]] = {}
    for sample in samples:
        answers.setdefault(sample.source, []).append(sample.answer)
    all_answers = [sample.answer for sample in samples]
    spoilt = []
    for position, sample in enumerate(samples):
        others = [a for a in answers[sample.source] if a != sample.answer]
        others = others or [a for a in all_answers if a != sample.answer]
        if not others:
            raise UserError(
                f'corrupt: wrong_answer needs two different answers, but all of {sample.source} are "{sample.answer}"'
            )
        wrong = others[_seed("wrong_answer", seed, position) % len(others)]
        spoilt.append(replace(sample, id=f"{sample.id}/wrong", answer=wrong, source=f"{sample.source}/wrong"))
    return spoilt


def _with_shuffled_words(samples: list[Sample], seed: int) -> list[Sample]:
    """Put the words of prompts and answers in a random order, one space between them."""

    def shuffled(text: str, key: int) -> str:
        words = text.split()
        generator = np.random.Philox(key=key)
        while len(set(words)) > 1:
            order = np.argsort(generator.random_raw(len(words)), kind="stable")
            mixed = [words[i] for i in order]
            if mixed != words:
                return " ".join(mixed)
        return text

    return [
        replace(
            sample,
            id=f"{sample.id}/shuffled",
            prompt=shuffled(sample.prompt, _seed("shuffle_prompt", seed, position)),
            answer=shuffled(sample.answer, _seed("shuffle_answer", seed, position)),
            source=f"{sample.source}/shuffled",
        )
        for position, sample in enumerate(samples)
    ]


def _reasoning_gym_dataset(task: ReasoningGymTask, *, size: int, seed: int) -> Any:
    reserved = {"size", "seed"} & set(task.config)
    if reserved:
        raise UserError(
            f"reasoning-gym task {task.name}: {', '.join(sorted(reserved))} belongs to the source, "
            "not to the task's config"
        )
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError("reasoning-gym tasks need a package: pip install reasoning-gym") from error
    if task.name not in DATASETS:
        raise UserError(f"reasoning-gym has no task {task.name}{_nearest(task.name, list(DATASETS))}")
    create: Callable[..., Any] = reasoning_gym.create_dataset
    try:
        return create(task.name, size=size, seed=seed, **task.config)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"reasoning-gym task {task.name} refuses its options {task.config}: {_first_line(error)}"
        ) from error


def _seed(purpose: str, seed: int, position: int) -> int:
    """A 64-bit number that depends on all three and on nothing else."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a directory, not a file")
    return path


def _nearest(name: str, names: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
