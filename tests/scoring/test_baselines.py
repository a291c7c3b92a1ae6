"""The baselines are their definitions, one sample at a time, and the same however packed or interrupted."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from observed_models import VOCABULARY, model_named
from oracle import assert_as_accurate
from torch import Tensor, nn

from pyeff.data import EncodedSample, EncodedSamples, Sample
from pyeff.errors import UserError
from pyeff.scoring import (
    BM25,
    EmbeddingSimilarity,
    HiddenStates,
    Perplexity,
    RandomScore,
    RDSPlus,
    TargetSimilarities,
    language,
    read_features,
    read_scores,
)
from pyeff.selection import per_sample, round_robin

TEXTS = [
    ("one plus one", "two"),
    ("two plus two is", "four"),
    ("capital of France", "Paris"),
    ("the capital, of Spain?", "Madrid"),
    ("1 + 1 =", "2"),
    ("...", "?"),
]


def pool(count: int = 6) -> list[Sample]:
    return [Sample(f"p{i}", *TEXTS[i], "texts") for i in range(count)]


def goals() -> list[Sample]:
    return [Sample("t0", "one plus", "three", "texts"), Sample("t1", "France", "Paris 2", "texts")]


def encoded(count: int = 7, seed: int = 2, name: str = "sample") -> EncodedSamples:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, VOCABULARY, (2 + 4 * i % 9,), generator=generator).tolist() for i in range(count)]
    samples = [Sample(f"{name}-{i}", "", f"{seed} {i}", "tokens") for i in range(count)]
    return EncodedSamples(samples, [EncodedSample(ids, 1 + i % 2, i) for i, ids in enumerate(tokens)])


def hidden_of(model: nn.Module, sample: EncodedSample) -> Tensor:
    with torch.no_grad():
        states = model(torch.tensor([sample.ids]), use_cache=False, output_hidden_states=True).hidden_states[-1]
    return states[0]


@pytest.mark.parametrize("name", ["llama tied", "gemma2", "gpt2"])
def test_perplexity_is_that_of_each_sample_alone(name: str) -> None:
    def alone(dtype: torch.dtype) -> Tensor:
        model, found = model_named(name, dtype).eval(), []
        for sample in encoded():
            with torch.no_grad():
                logits = model(torch.tensor([sample.ids]), use_cache=False).logits[0, sample.prompt_length - 1 : -1]
            targets = torch.tensor(sample.ids[sample.prompt_length :])
            found.append(nn.functional.cross_entropy(logits, targets).exp())
        return torch.stack(found)

    got = Perplexity().score(model_named(name, torch.float32), encoded(), batch_tokens=16, progress=False)
    values = torch.from_numpy(got.values).float()
    whole = ~alone(torch.float64).isnan()
    assert torch.equal(values.isnan(), ~whole)
    assert_as_accurate(values[whole], alone(torch.float64)[whole], alone(torch.float32)[whole], multiple=4.0)


@pytest.mark.parametrize("tokens", ["all", "answer"])
@pytest.mark.parametrize("name", ["llama tied", "gpt2"])
def test_rds_plus_is_the_largest_cosine_of_weighted_means_of_each_sample_alone(name: str, tokens: Any) -> None:
    targets = encoded(3, seed=5, name="target")

    def alone(dtype: torch.dtype) -> Tensor:
        model = model_named(name, dtype).eval()

        def embedding(sample: EncodedSample) -> Tensor:
            states = hidden_of(model, sample)
            states = states if tokens == "all" else states[sample.prompt_length - 1 : -1]
            weights = torch.arange(1, len(states) + 1, dtype=dtype)
            return (weights @ states) / weights.sum()

        def cosines(sample: EncodedSample) -> Tensor:
            own = embedding(sample)
            return torch.stack([nn.functional.cosine_similarity(own, embedding(t), dim=0) for t in targets])

        return torch.stack([cosines(sample).amax() for sample in encoded()])

    method = RDSPlus(targets, tokens=tokens)
    model = model_named(name, torch.float32)
    got = method.score(model, encoded(), batch_tokens=16, progress=False, dtype="float32")
    assert got.ids == [f"sample-{i}" for i in range(7)]
    values = torch.from_numpy(got.values).float()
    assert_as_accurate(values, alone(torch.float64), alone(torch.float32), multiple=4.0)
    one_each = method.score(model, encoded(), batch_tokens=10, progress=False, dtype="float32")
    assert_as_accurate(
        torch.from_numpy(one_each.values).float(), alone(torch.float64), alone(torch.float32), multiple=4.0
    )


def test_rds_plus_leaves_features_for_round_robin_and_goes_on_after_an_interruption(
    tmp_path: Path, monkeypatch
) -> None:
    model, targets = model_named("llama", torch.float32), encoded(3, seed=5, name="target")
    options: dict[str, Any] = {"batch_tokens": 16, "progress": False}
    whole = RDSPlus(targets).score(model, encoded(), path=tmp_path / "whole", **options)
    read, calls = HiddenStates.read, 0

    def broken(self: HiddenStates, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return read(self, *args)

    monkeypatch.setattr(HiddenStates, "read", broken)
    with pytest.raises(KeyboardInterrupt):
        RDSPlus(targets).score(model, encoded(), path=tmp_path / "cut", **options)
    resumed = RDSPlus(targets).score(model, encoded(), path=tmp_path / "cut", **options)
    assert resumed.table.drop(["seconds"]).equals(whole.table.drop(["seconds"]))
    assert read_scores(tmp_path / "cut").table.equals(resumed.table)
    features = [read_features(tmp_path / "cut" / part) for part in ("pool", "targets")]
    similar = TargetSimilarities(*features)
    chosen = [features[0].ids[row] for row in round_robin(similar, 3)]
    assert len(set(chosen)) == 3
    assert per_sample(similar)[np.argsort(features[0].index)].tolist() == whole.values.tolist()
    with pytest.raises(UserError, match="another method"):
        RDSPlus(encoded(3, seed=6)).score(model, encoded(), path=tmp_path / "cut", **options)
    with pytest.raises(UserError, match="holds these scores already"):
        RDSPlus(targets).score(model, encoded(), path=tmp_path / "cut", resume=False, **options)


def test_features_cost_a_forward_pass_without_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"batch_tokens": 16, "progress": False}
    by_formula = HiddenStates().features(model_named("llama", torch.float32), encoded(), **options)
    monkeypatch.setattr(language, "costs_of", lambda model: None)
    counted = HiddenStates().features(model_named("llama", torch.float32), encoded(), **options)
    assert by_formula.flops == counted.flops > 0
    targets = encoded(3, seed=5)
    scores = RDSPlus(targets).score(model_named("llama", torch.float32), encoded(), **options)
    goals_cost = HiddenStates().features(model_named("llama", torch.float32), targets, **options).flops
    assert scores.flops == counted.flops + goals_cost + 7 * 2 * 3 * counted.shape[1]


def plain_bm25(samples: list[Sample], target: Sample, k1: float, b: float) -> list[float]:
    def words(sample: Sample) -> list[str]:
        cut = "".join(c if c.isalnum() else " " for c in f"{sample.prompt}\n{sample.answer}".lower())
        return cut.split()

    texts = [Counter(words(sample)) for sample in samples]
    mean = sum(text.total() for text in texts) / len(texts)
    found = []
    for text in texts:
        score = 0.0
        for word in words(target):
            containing = sum(word in other for other in texts)
            if containing:
                idf = math.log(1 + (len(texts) - containing + 0.5) / (containing + 0.5))
                score += idf * text[word] / (text[word] + k1 * (1 - b + b * text.total() / mean))
        found.append(score)
    return found


def test_bm25_is_its_formula_up_to_rounding() -> None:
    method = BM25(goals(), k1=1.2, b=0.6)
    expected = np.array([plain_bm25(pool(), target, 1.2, 0.6) for target in goals()]).T
    allowed = 16 * np.finfo(np.float32).eps * expected.max()
    np.testing.assert_allclose(method.matrix(pool()), expected, rtol=0, atol=allowed)
    scores = method.score(None, pool(), progress=False)
    np.testing.assert_allclose(scores.values, expected.max(axis=1), rtol=0, atol=allowed)
    assert scores.flops == 0
    assert scores.ids == [sample.id for sample in pool()]


def test_bm25_of_texts_without_a_word_in_common_is_zero() -> None:
    nothing = [Sample("t", "zebra", "stripes", "texts"), Sample("u", "!!", "?", "texts")]
    assert BM25(nothing).score(None, pool(), progress=False).values.tolist() == [0.0] * 6
    assert BM25(goals()).matrix([Sample("a", "!", "?", "x")]).tolist() == [[0.0, 0.0]]


def test_bm25_resumes_its_own_table_alone(tmp_path: Path) -> None:
    first = BM25(goals()).score(None, pool(), path=tmp_path, progress=False)
    assert BM25(goals()).score(None, pool(), path=tmp_path, progress=False).table.equals(first.table)
    with pytest.raises(UserError, match="another method"):
        BM25(goals()[:1]).score(None, pool(), path=tmp_path, progress=False)
    with pytest.raises(UserError, match="another dataset"):
        BM25(goals()).score(None, pool(5), path=tmp_path, progress=False)
    assert read_scores(tmp_path).table.equals(first.table)


def test_random_scores_repeat_with_the_seed_for_every_kind_of_data_set() -> None:
    state = torch.random.get_rng_state()
    sets = [pool(), encoded(6), encoded(6).encoded, (torch.zeros(6, 2), torch.zeros(6, dtype=torch.long)), [(1, 2)] * 6]
    values = {tuple(RandomScore().score(None, data, seed=3, progress=False).values) for data in sets}
    assert len(values) == 1
    assert tuple(RandomScore().score(None, pool(), seed=4, progress=False).values) not in values
    assert torch.equal(torch.random.get_rng_state(), state)
    with_ids = RandomScore().score(None, (["a", "b"], torch.zeros(2, 2), torch.zeros(2)), progress=False)
    assert with_ids.ids == ["a", "b"]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for sample in [*pool(), *goals()] for word in f"{sample.prompt} {sample.answer}".split()})
    vocabulary = {"<pad>": 0, "<unk>": 1, **{word: 2 + i for i, word in enumerate(words)}}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>")


def encoder() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    return BertModel(config).eval()


def test_embedding_similarity_is_that_of_each_text_alone_and_does_not_see_padding() -> None:
    words, model = tokenizer(), encoder()

    def alone(dtype: torch.dtype) -> Tensor:
        own = encoder().to(dtype)

        def embedding(sample: Sample) -> Tensor:
            with torch.no_grad():
                return (
                    own(**words([f"{sample.prompt}\n{sample.answer}"], return_tensors="pt"))
                    .last_hidden_state[0]
                    .mean(0)
                )

        targets = torch.stack([embedding(target) for target in goals()])
        rows = torch.stack([embedding(sample) for sample in pool()])
        return nn.functional.cosine_similarity(rows[:, None], targets[None], dim=2).amax(dim=1)

    method = EmbeddingSimilarity(goals())
    for batch_size in (1, 4):
        got = method.score(model, pool(), tokenizer=words, batch_size=batch_size, dtype="float32", progress=False)
        values = torch.from_numpy(got.values).float()
        assert_as_accurate(values, alone(torch.float64), alone(torch.float32), multiple=4.0)
        assert got.flops > 0
    with pytest.raises(ValueError, match="tokenizer must be given"):
        method.score(model, pool(), progress=False)


def test_an_encoder_with_a_way_of_its_own_is_asked_for_embeddings() -> None:
    class Own(nn.Module):
        def encode(self, texts: list[str]) -> np.ndarray:
            return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    class Sized(Own):
        def get_sentence_embedding_dimension(self) -> int:
            return 2

    rows = np.array([[len("\n".join(text)), 1.0] for text in TEXTS])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for model in (Own(), Sized()):
        values = EmbeddingSimilarity(pool()[:1]).score(model, pool(), progress=False, dtype="float32").values
        np.testing.assert_allclose(values, unit @ unit[0], atol=16 * np.finfo(np.float32).eps)


def test_a_text_is_cut_to_what_an_encoder_takes_that_counts_positions_from_behind_its_padding() -> None:
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = RobertaModel(RobertaConfig(**sizes, intermediate_size=24, max_position_embeddings=8, pad_token_id=1)).eval()
    long = Sample("long", "word " * 30, "answer", "a")
    values = EmbeddingSimilarity(goals()).score(model, [long], tokenizer=tokenizer(), progress=False).values
    assert np.isfinite(values).all()


def test_a_table_beside_directories_replaces_and_hides_no_other_scores(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer(), "path": tmp_path / "s", "progress": False}
    first = EmbeddingSimilarity(goals()).score(encoder(), pool(), **options)
    with pytest.raises(UserError, match="holds scores of another method"):
        EmbeddingSimilarity(goals(), center=True).score(encoder(), pool(), **options)
    assert read_scores(tmp_path / "s").values.tolist() == first.values.tolist()
    RandomScore().score(None, pool(), path=tmp_path / "random", progress=False)
    with pytest.raises(UserError, match="holds scores or features already"):
        EmbeddingSimilarity(goals()).score(encoder(), pool(), **{**options, "path": tmp_path / "random"})


def test_names_tell_variants_and_targets_apart() -> None:
    methods = [
        BM25(goals()),
        BM25(goals()[:1]),
        BM25(goals(), k1=2.0),
        BM25(goals(), reduction="mean"),
        RDSPlus(goals()),
        RDSPlus(goals(), tokens="answer"),
        RDSPlus(goals(), center=True),
        RDSPlus(goals()[1:]),
        EmbeddingSimilarity(goals()),
        Perplexity(),
        RandomScore(),
    ]
    assert len({method.name for method in methods}) == len(methods)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: BM25([]), ValueError, "targets must hold at least one sample"),
        (lambda: RDSPlus([1, 2]), ValueError, "targets must hold at least one sample"),
        (lambda: BM25(goals(), reduction="median"), ValueError, "reduction must be one of"),
        (lambda: RDSPlus(goals(), tokens="prompt"), ValueError, "tokens must be"),
        (
            lambda: BM25(goals()).score(None, encoded(2).encoded, progress=False),
            TypeError,
            "must hold samples with their",
        ),
        (lambda: BM25(goals()).score(None, [], progress=False), ValueError, "dataset is empty"),
        (lambda: BM25(goals()).score(None, pool() * 2, progress=False), ValueError, "is there twice"),
        (lambda: RandomScore().score(None, iter([1]), progress=False), TypeError, "dataset must have a length"),
        (lambda: RDSPlus(goals()).score(None, pool()), TypeError, "model must be a torch.nn.Module"),
        (lambda: RDSPlus(encoded(1)).score(nn.Linear(2, 2), encoded()), TypeError, "must be a causal language model"),
    ],
)
def test_what_a_baseline_cannot_use_is_refused_in_a_sentence(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
