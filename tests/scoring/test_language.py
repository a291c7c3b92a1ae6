"""Scores of language models are those of their samples one at a time, however they are packed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observed_models import VOCABULARY, model_named
from oracle import assert_as_accurate
from torch import Tensor, nn

from pyeff.data import EncodedSample, EncodedSamples, JsonlSource, Sample
from pyeff.errors import UserError
from pyeff.scoring import EL2N, GraNd, LastLayerGraNd, ScoreMethod, Scores, language

METHODS: list[ScoreMethod] = [
    EL2N(),
    EL2N(reduction="sum"),
    GraNd(),
    GraNd(reduction="sum"),
    LastLayerGraNd(),
    LastLayerGraNd(reduction="sum"),
]


def samples(count: int = 7) -> EncodedSamples:
    generator = torch.Generator().manual_seed(2)
    encoded = [
        EncodedSample(torch.randint(1, VOCABULARY, (2 + 4 * i % 9,), generator=generator).tolist(), 1 + i % 2, i)
        for i in range(count)
    ]
    return EncodedSamples([Sample(f"sample-{i}", "", "", "tokens") for i in range(count)], encoded)


def score(method: ScoreMethod, model: nn.Module, data: Any, **options: Any) -> Scores:
    return method.score(model, data, **{"batch_tokens": 16, "progress": False, **options})


def one_by_one(method: ScoreMethod, model: nn.Module, data: EncodedSamples) -> Tensor:
    """Each score from its definition: the sample alone, its whole logits, its whole gradient."""
    model.eval()
    found = []
    for sample in data:
        model.zero_grad()
        ids = torch.tensor([sample.ids])
        logits = model(ids, use_cache=False).logits[0, sample.prompt_length - 1 : -1]
        targets = ids[0, sample.prompt_length :]
        if len(targets) == 0:
            found.append(torch.tensor(math.nan, dtype=logits.dtype))
            continue
        reduction = "sum" if "sum" in method.name else "mean"
        if isinstance(method, EL2N):
            errors = (logits.softmax(1) - nn.functional.one_hot(targets, VOCABULARY)).norm(dim=1)
            found.append(getattr(errors, reduction)().detach())
            continue
        if isinstance(method, LastLayerGraNd):
            hidden = model(ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
            weight = model.get_output_embeddings().weight.detach().clone().requires_grad_()
            logits = nn.functional.linear(hidden.detach()[0, sample.prompt_length - 1 : -1], weight)
            cap = getattr(model.config, "final_logit_softcapping", None)
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            parameters: list[Tensor] = [weight]
        else:
            parameters = list(model.parameters())
        nn.functional.cross_entropy(logits, targets, reduction=reduction).backward()
        found.append(torch.stack([p.grad.square().sum() for p in parameters if p.grad is not None]).sum().sqrt())
    return torch.stack(found).detach()


def agree(got: Scores, method: ScoreMethod, name: str, data: EncodedSamples) -> None:
    exact = one_by_one(method, model_named(name), data)
    peer = one_by_one(method, model_named(name, torch.float32), data)
    assert_as_accurate(torch.from_numpy(got.values).float(), exact, peer, multiple=4.0)


@pytest.mark.parametrize("name", ["llama tied", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_scores_are_those_of_one_sample_at_a_time(method: ScoreMethod, name: str) -> None:
    agree(score(method, model_named(name, torch.float32), samples()), method, name, samples())


def test_the_mean_over_tokens_is_not_rounded_to_16_bits() -> None:
    model, data = model_named("llama", torch.bfloat16), samples()
    mean, total = (torch.from_numpy(score(LastLayerGraNd(reduction=r), model, data).values) for r in ("mean", "sum"))
    answers = torch.tensor([len(sample.ids) - sample.prompt_length for sample in data])
    torch.testing.assert_close(mean * answers, total, rtol=64 * torch.finfo(torch.float32).eps, atol=0)


def test_experts_are_scored_and_their_flops_counted() -> None:
    got = score(GraNd(), model_named("mixtral", torch.float32), samples())
    agree(got, GraNd(), "mixtral", samples())
    assert got.flops > 0


@settings(max_examples=6, deadline=None)
@given(st.integers(10, 60), st.permutations(range(7)))
def test_neither_packing_nor_order_change_a_score(batch_tokens: int, order: list[int]) -> None:
    data = samples()
    shuffled = EncodedSamples([data.samples[i] for i in order], [data.encoded[i] for i in order])
    method = LastLayerGraNd()
    got = score(method, model_named("llama", torch.float32), shuffled, batch_tokens=batch_tokens)
    assert got.ids == [f"sample-{i}" for i in order]
    exact = one_by_one(method, model_named("llama"), data)[order]
    peer = one_by_one(method, model_named("llama", torch.float32), data)[order]
    assert_as_accurate(torch.from_numpy(got.values).float(), exact, peer, multiple=4.0)


@pytest.mark.parametrize("name", ["llama tied", "llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS[::2], ids=lambda m: m.name)
def test_flops_by_formula_are_those_torch_counts(
    method: ScoreMethod, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = samples()
    by_formula = score(method, model_named(name, torch.float32), data)
    monkeypatch.setattr(language, "costs_of", lambda model: None)
    counted = score(method, model_named(name, torch.float32), data)
    assert by_formula.flops == counted.flops > 0


def test_samples_share_the_cost_of_their_batch_by_their_tokens() -> None:
    data = samples()
    costs = score(EL2N(), model_named("llama", torch.float32), data, batch_tokens=100).table["flops"].to_pylist()
    tokens = data.lengths.tolist()
    whole = sum(costs)
    # Whole numbers: within one of the exact share.
    assert all(abs(c - whole * t / sum(tokens)) <= 1 for c, t in zip(costs, tokens, strict=True))


def test_a_sample_without_an_answer_is_nan() -> None:
    encoded = [EncodedSample([3, 4, 5], 3, 0), EncodedSample([3, 4, 5], 1, 1), EncodedSample([6], 1, 2)]
    for method in METHODS:
        for batch_tokens in (3, 16):
            values = score(method, model_named("llama", torch.float32), encoded, batch_tokens=batch_tokens).values
            assert [math.isnan(value) for value in values] == [True, False, True]


def test_the_model_and_its_gradients_are_left_as_they_were() -> None:
    model = model_named("llama tied", torch.float32).train()
    for method in METHODS:
        score(method, model, samples())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_sources_are_read_and_encoded(tmp_path: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, "one": 1, "plus": 2, "is": 3, "two": 4}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one plus one is", "answer": "two"}\n' * 2)
    source = JsonlSource(kind="jsonl", path=tmp_path / "a.jsonl")
    model = model_named("llama", torch.float32)
    for data in (source, [source]):
        scores = score(EL2N(), model, data, tokenizer=tokenizer)
        assert len(set(scores.ids)) == len(scores) == 2
        assert scores.values[0] == scores.values[1]
    with pytest.raises(ValueError, match="tokenizer must be given"):
        score(EL2N(), model, source)
    with pytest.raises(TypeError, match="samples of one kind"):
        score(EL2N(), model, [Sample("a", "one", "two", "s"), 3], tokenizer=tokenizer)


def test_bad_data_is_refused_in_a_sentence() -> None:
    model, data = model_named("llama", torch.float32), samples()
    twice = EncodedSamples([data.samples[0], *data.samples[:6]], data.encoded)
    without = EncodedSamples([Sample("", "", "", ""), *data.samples[1:]], data.encoded)
    for bad, words in (
        (twice, "'sample-0' of sample 1 is there twice"),
        (without, "sample 0 of the dataset has no id"),
        (EncodedSamples([], []), "dataset is empty"),
    ):
        with pytest.raises(ValueError, match=words):
            score(EL2N(), model, bad)
    with pytest.raises(TypeError, match="must be a causal language model of transformers"):
        score(EL2N(), nn.Linear(2, 2), data)
    with pytest.raises(ValueError, match="a sample is never split"):
        score(EL2N(), model, data, batch_tokens=5)
    with pytest.raises(ValueError, match="reduction must be"):
        GraNd(reduction="max")  # type: ignore[arg-type]


def test_a_model_that_changes_its_logits_after_the_head_is_scored_by_grand_alone() -> None:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    model = CohereForCausalLM(
        CohereConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            logit_scale=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    for method in (EL2N(), LastLayerGraNd()):
        with pytest.raises(UserError, match="changes its logits after the output head"):
            score(method, model, samples())
    exact = one_by_one(GraNd(), model.double(), samples())
    peer = one_by_one(GraNd(), model.float(), samples())
    got = torch.from_numpy(score(GraNd(), model, samples()).values).float()
    assert_as_accurate(got, exact, peer, multiple=4.0)
