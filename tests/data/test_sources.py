from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from pyeff.data import (
    HFDatasetSource,
    JsonlSource,
    ParquetSource,
    ReasoningGymSource,
    Source,
    load_samples,
)
from pyeff.errors import UserError

ROWS = [{"prompt": f"{i} + 1 =", "answer": str(i + 1), "family": "even" if i % 2 == 0 else "odd"} for i in range(6)]
SMALL_SUMS = {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Files


def test_jsonl_and_parquet_give_the_same_samples(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "sums.jsonl", ROWS)
    parquet = tmp_path / "sums.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), parquet, row_group_size=4)
    options = {"source_column": "family"}
    from_jsonl = load_samples(JsonlSource(path=jsonl, **options))
    assert from_jsonl == load_samples(ParquetSource(path=parquet, **options))
    assert [(s.prompt, s.answer, s.source) for s in from_jsonl[:2]] == [
        ("0 + 1 =", "1", "even"),
        ("1 + 1 =", "2", "odd"),
    ]


def test_a_source_is_named_after_its_file_and_other_columns_can_be_chosen(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "quiz.jsonl", [{"q": "a?", "a": "b", "prompt": "wrong"}])
    (sample,) = load_samples(JsonlSource(path=path, prompt_column="q", answer_column="a"))
    assert (sample.prompt, sample.answer, sample.source, sample.id) == ("a?", "b", "quiz", "quiz:0")


def test_ids_may_come_from_a_column_and_follow_their_rows(tmp_path: Path) -> None:
    rows = [{**row, "name": f"q{i}" if i % 2 else i} for i, row in enumerate(ROWS)]
    moved = rows[::-1]
    read = [
        load_samples(JsonlSource(path=write_jsonl(tmp_path / f"{i}.jsonl", order), id_column="name", limit=6))
        for i, order in enumerate((rows, moved))
    ]
    assert [s.id for s in read[0]] == ["0", "q1", "2", "q3", "4", "q5"]
    assert {s.id: s.prompt for s in read[0]} == {s.id: s.prompt for s in read[1]}
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    both = load_samples(ParquetSource(path=tmp_path / "p.parquet", id_column="prompt", source_column="family"))
    assert [(s.id, s.source) for s in both[:2]] == [("0 + 1 =", "even"), ("1 + 1 =", "odd")]


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        ({}, r'line 2: there is no column "name"'),
        ({"name": "a"}, r"line 2: the id 'a' is that of .*line 1 too"),
        ({"name": ""}, r'line 2: column "name" is empty'),
        ({"name": None}, r'line 2: column "name" should be text, but holds None'),
        ({"name": True}, r'line 2: column "name" should be text, but holds True'),
        ({"name": 1.5}, r'line 2: column "name" should be text, but holds 1.5'),
    ],
)
def test_a_row_without_an_id_of_its_own_is_named(tmp_path: Path, second: dict[str, Any], sentence: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{**ROWS[0], "name": "a"}, {**ROWS[1], **second}])
    with pytest.raises(UserError, match=sentence):
        load_samples(JsonlSource(path=path, id_column="name"))


def test_blank_lines_and_a_byte_order_mark_are_no_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a", "answer": "b"}\n\n{"prompt": "c", "answer": "d"}')
    assert [s.prompt for s in load_samples(JsonlSource(path=path))] == ["a", "c"]


def test_limit_and_max_characters_choose_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x" * n, "answer": "y"} for n in (1, 9, 2, 3)])
    assert [s.id for s in load_samples(JsonlSource(path=path, limit=3, max_characters=5))] == ["x:0", "x:2"]
    with pytest.raises(UserError, match="none of its 4 samples has at most 1 characters"):
        load_samples(JsonlSource(path=path, max_characters=1))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{oops", r"x\.jsonl, line 2: not JSON"),
        ("[1, 2]", r"x\.jsonl, line 2: should be a JSON object, but holds \[1, 2\]"),
        ('{"answer": "b", "text": "c"}', r'line 2: there is no column "prompt"; the columns are: answer, text'),
        ('{"prompt": 3, "answer": "b"}', r'line 2: column "prompt" should be text, but holds 3 \(int\)'),
        ('{"prompt": "a", "answer": null}', r'line 2: column "answer" should be text, but holds None'),
        ('{"prompt": "a", "answer": " "}', r'line 2: column "answer" is empty'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match=sentence):
        load_samples(JsonlSource(path=path))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "ä"}'.encode("latin-1"))
    for source in (JsonlSource, ParquetSource):
        with pytest.raises(UserError, match="nowhere does not exist"):
            load_samples(source(path=tmp_path / "nowhere"))
        with pytest.raises(UserError, match="is a directory, not a file"):
            load_samples(source(path=tmp_path))
    with pytest.raises(UserError, match=r"empty\.jsonl is empty: no rows"):
        load_samples(JsonlSource(path=empty))
    with pytest.raises(UserError, match=r"latin\.jsonl is not UTF-8 text"):
        load_samples(JsonlSource(path=latin))
    with pytest.raises(UserError, match=r"latin\.jsonl cannot be read as Parquet"):
        load_samples(ParquetSource(path=latin))


def test_a_parquet_file_without_the_column_lists_those_it_has(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "response": ["b"]}), path)
    with pytest.raises(UserError, match='no column "answer"; the columns are: prompt, response'):
        load_samples(ParquetSource(path=path))


# Hugging Face datasets


def test_a_dataset_is_loaded_by_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(name: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        calls.append((name, config, options["split"]))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    samples = load_samples(HFDatasetSource(name="owner/sums", config="small", split="test"))
    assert calls == [("owner/sums", "small", "test")]
    assert [s.answer for s in samples] == [row["answer"] for row in ROWS]
    assert samples[0].source == "owner/sums"


def test_a_dataset_that_fails_or_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("Couldn't find it\nat any of these places")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r'^the dataset "x" cannot be loaded: Couldn\'t find it$'):
        load_samples(HFDatasetSource(name="x"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load_samples(HFDatasetSource(name="x"))


# reasoning-gym


def test_the_demo_tasks_give_questions_with_right_answers() -> None:
    source = ReasoningGymSource(
        tasks=[
            {"name": "count_bits", "config": {"max_n": 64}},
            SMALL_SUMS,
            {"name": "spell_backward", "config": {"min_word_len": 3, "max_word_len": 4}},
        ],
        size=30,
        seed=5,
    )
    samples = load_samples(source)
    assert [s.source for s in samples] == ["count_bits"] * 10 + ["chain_sum"] * 10 + ["spell_backward"] * 10
    for sample in samples[:10]:
        number = int(sample.prompt.rstrip("?").split()[-1])
        assert number <= 64
        assert sample.answer == str(bin(number).count("1"))
    for sample in samples[10:20]:
        left, sign, right = sample.prompt.removesuffix(" =").split()[-3:]
        assert int(sample.answer) == int(left) + (int(right) if sign == "+" else -int(right))
    for sample in samples[20:]:
        assert sample.answer == sample.prompt.split()[-1][::-1]


def test_the_same_seed_gives_the_same_samples_and_another_seed_others() -> None:
    def read(seed: int) -> list[Any]:
        return load_samples(ReasoningGymSource(tasks=["chain_sum", "lcm"], size=8, seed=seed))

    assert read(1) == read(1)
    assert {s.prompt for s in read(1)}.isdisjoint({s.prompt for s in read(2)})


def test_two_entries_of_one_task_draw_apart() -> None:
    samples = load_samples(ReasoningGymSource(tasks=["chain_sum", "chain_sum"], size=8))
    assert len({s.prompt for s in samples}) == 8
    assert len({s.id for s in samples}) == 8


@pytest.mark.parametrize(
    ("tasks", "size", "counts"),
    [
        (["chain_sum", "lcm"], 5, {"chain_sum": 3, "lcm": 2}),
        ([{"name": "chain_sum", "weight": 3}, "lcm"], 8, {"chain_sum": 6, "lcm": 2}),
        ([{"name": "chain_sum", "count": 1}, "lcm", "gcd"], 6, {"chain_sum": 1, "lcm": 3, "gcd": 2}),
        ([{"name": "chain_sum", "count": 0}, "lcm"], 2, {"lcm": 2}),
    ],
)
def test_counts_are_kept_and_the_rest_is_shared_by_weight(tasks: Any, size: int, counts: dict[str, int]) -> None:
    samples = load_samples(ReasoningGymSource(tasks=tasks, size=size))
    assert {name: sum(s.source == name for s in samples) for name in counts} == counts
    assert len(samples) == size


def test_questions_are_distinct_unless_repeats_are_allowed() -> None:
    tasks = [{"name": "count_bits", "config": {"max_n": 8}}]
    prompts = [s.prompt for s in load_samples(ReasoningGymSource(tasks=tasks, size=8))]
    assert len(set(prompts)) == 8
    with pytest.raises(UserError, match=r"count_bits gave 8 distinct questions in 180 draws, but 9 are asked for"):
        load_samples(ReasoningGymSource(tasks=tasks, size=9))
    assert len(load_samples(ReasoningGymSource(tasks=tasks, size=9, distinct=False))) == 9


def test_max_characters_filters_while_keeping_the_count() -> None:
    samples = load_samples(ReasoningGymSource(tasks=["basic_arithmetic"], size=6, max_characters=30))
    assert len(samples) == 6
    assert all(len(s.prompt) + len(s.answer) <= 30 for s in samples)


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        (["count_bit"], "no task count_bit; did you mean count_bits"),
        ([{"name": "count_bits", "config": {"bogus": 1}}], "count_bits refuses its options .*bogus"),
        ([{"name": "count_bits", "config": {"max_n": 0}}], "count_bits refuses its options"),
        ([{"name": "count_bits", "config": {"seed": 0}}], "seed belongs to the source"),
        ([{"name": "count_bits", "count": 9}], "add up to 9, but size is 4"),
        ([{"name": "count_bits", "count": 3}], "add up to 3, but size is 4"),
        (["graph_color"], "graph_color has questions without one written answer"),
    ],
)
def test_tasks_that_cannot_be_used_are_named(tasks: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_samples(ReasoningGymSource(tasks=tasks, size=4))


def test_reasoning_gym_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        load_samples(ReasoningGymSource(tasks=["chain_sum"], size=1))


# Corruptions


def test_wrong_answers_are_plausible_and_never_right() -> None:
    clean = ReasoningGymSource(tasks=[SMALL_SUMS, "lcm"], size=40, seed=3)
    right = load_samples(clean)
    wrong = load_samples(clean.model_copy(update={"corrupt": "wrong_answer"}))
    for before, after in zip(right, wrong, strict=True):
        assert after.prompt == before.prompt
        assert after.answer != before.answer
        assert after.answer in {s.answer for s in right if s.source == before.source}
        assert after.source == f"{before.source}/wrong"
        assert after.id == f"{before.id}/wrong"
    assert wrong == load_samples(clean.model_copy(update={"corrupt": "wrong_answer"}))


def test_wrong_answers_need_two_different_answers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": str(i), "answer": "yes"} for i in range(3)])
    with pytest.raises(UserError, match='needs two different answers, but all of x are "yes"'):
        load_samples(JsonlSource(path=path, corrupt="wrong_answer"))


def test_shuffled_words_are_the_same_words_in_another_order(tmp_path: Path) -> None:
    rows = [{"prompt": "one two three  four\nfive", "answer": "six seven"}, {"prompt": "same same", "answer": "x"}]
    path = write_jsonl(tmp_path / "x.jsonl", rows * 5)
    clean = load_samples(JsonlSource(path=path))
    shuffled = load_samples(JsonlSource(path=path, corrupt="shuffle_words"))
    for before, after in zip(clean, shuffled, strict=True):
        assert sorted(after.prompt.split()) == sorted(before.prompt.split())
        assert sorted(after.answer.split()) == sorted(before.answer.split())
        assert after.source == "x/shuffled"
    assert all(s.prompt != "one two three four five" for s in shuffled[::2])
    assert all(s.answer == "seven six" for s in shuffled[::2])
    assert all(s.prompt == "same same" for s in shuffled[1::2])
    assert len({s.prompt for s in shuffled[::2]}) > 1


# Pools


def test_a_pool_is_its_sources_one_after_the_other_with_unique_ids(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    source = JsonlSource(path=path)
    samples = load_samples([source, source, source.model_copy(update={"corrupt": "wrong_answer"})])
    assert len(samples) == len({s.id for s in samples}) == 18
    assert [s.id for s in samples[5:8]] == ["x:5", "x:0#2", "x:1#2"]
    with pytest.raises(UserError, match="no data sources"):
        load_samples([])


def test_sources_are_told_apart_by_kind_and_unknown_keys_are_refused() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Source)
    assert isinstance(adapter.validate_python({"kind": "jsonl", "path": "x"}), JsonlSource)
    assert isinstance(
        adapter.validate_python({"kind": "reasoning_gym", "tasks": ["lcm"], "size": 1}), ReasoningGymSource
    )
    for bad in (
        {"kind": "csv", "path": "x"},
        {"kind": "jsonl", "path": "x", "colour": "red"},
        {"kind": "reasoning_gym", "tasks": [], "size": 1},
        {"kind": "reasoning_gym", "tasks": ["lcm"], "size": 0},
        {"kind": "reasoning_gym", "tasks": [{"name": "lcm", "weight": -1}], "size": 1},
        {"kind": "jsonl", "path": "x", "corrupt": "sabotage"},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)


def test_describing_sources_waits_for_no_heavy_library() -> None:
    code = (
        "import sys; from pyeff.data import ReasoningGymSource; ReasoningGymSource(tasks=['lcm'], size=1);"
        "heavy = {'torch', 'reasoning_gym', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
