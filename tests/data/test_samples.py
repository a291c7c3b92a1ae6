from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from pyeff.data import Sample, encode, prompt_ids, split_disjoint, without_prompts_of
from pyeff.errors import UserError

EOS = 257
BOS = 256


def a_sample(number: int = 0, prompt: str = "1 + 1 =", answer: str = "2") -> Sample:
    return Sample(f"s{number}", prompt, answer, "sums")


def test_an_encoded_sample_is_prompt_answer_and_end_token(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    (sample,) = encode([a_sample(prompt="Wörter?", answer="✓ ja")], plain_tokenizer, max_tokens=64)
    assert plain_tokenizer.decode(sample.ids[: sample.prompt_length]) == "Wörter?\n"
    assert plain_tokenizer.decode(sample.ids[sample.prompt_length : -1]) == "✓ ja"
    assert sample.ids[-1] == EOS
    assert sample.answer_length == len("✓ ja".encode()) + 1


def test_the_chat_template_is_used_when_there_is_one(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    (chat,) = encode([a_sample()], chat_tokenizer, max_tokens=64)
    assert chat_tokenizer.decode(chat.ids) == "<user>1 + 1 =</><assistant>2<eos>"
    (plain,) = encode([a_sample()], chat_tokenizer, max_tokens=64, chat_template=False)
    assert chat_tokenizer.decode(plain.ids) == "1 + 1 =\n2<eos>"


def test_generation_starts_from_exactly_the_ids_that_training_showed(
    plain_tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    for tokenizer in (plain_tokenizer, chat_tokenizer):
        (sample,) = encode([a_sample()], tokenizer, max_tokens=64)
        assert prompt_ids("1 + 1 =", tokenizer) == sample.ids[: sample.prompt_length]


def test_a_tokenizers_own_end_token_does_not_cut_prompt_from_answer(tiny) -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    (sample,) = encode([a_sample()], tokenizer, max_tokens=64)
    assert sample.ids[0] == BOS
    assert sample.ids.count(EOS) == 1
    assert sample.ids.count(BOS) == 1


def test_a_sample_that_is_too_long_is_named_with_its_length(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    long = Sample("row-7", "x" * 20, "y", "xs")
    with pytest.raises(UserError, match=r"row-7 is 23 tokens long, more than the 22 allowed"):
        encode([a_sample(), long], plain_tokenizer, max_tokens=22)
    assert len(encode([long], plain_tokenizer, max_tokens=23)) == 1


def test_dropped_samples_leave_no_gap_in_the_indices(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [a_sample(0), a_sample(1, prompt="x" * 99), a_sample(2)]
    encoded = encode(samples, plain_tokenizer, max_tokens=32, drop_long=True)
    assert [sample.id for sample in encoded.samples] == ["s0", "s2"]
    assert [sample.sample_index for sample in encoded] == [0, 1]
    assert [sample.id for sample in encoded.dropped] == ["s1"]
    assert encoded.tokens == sum(encoded.lengths) == sum(len(sample) for sample in encoded)
    with pytest.raises(UserError, match="no samples: all 1 are longer than 5 tokens"):
        encode([samples[1]], plain_tokenizer, max_tokens=5, drop_long=True)


def test_bad_arguments_and_tokenizers_are_refused(tiny, plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        encode([a_sample()], plain_tokenizer, max_tokens=1)
    with pytest.raises(ValueError, match="chat_template must be True, False or"):
        encode([a_sample()], plain_tokenizer, max_tokens=64, chat_template="yes")
    with pytest.raises(UserError, match="has no chat template"):
        encode([a_sample()], plain_tokenizer, max_tokens=64, chat_template=True)
    with pytest.raises(UserError, match="there are no samples"):
        encode([], plain_tokenizer, max_tokens=64)
    broken = tiny.byte_tokenizer(chat_template="{{ raise_exception('system first') }}")
    with pytest.raises(UserError, match="chat template cannot render a prompt: system first"):
        encode([a_sample()], broken, max_tokens=64)
    endless = tiny.byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode([a_sample()], endless, max_tokens=64)


@given(
    prompts=st.lists(st.integers(0, 20), min_size=1, max_size=40),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_split_sets_share_no_prompt(prompts: list[int], seed: int, data: st.DataObject) -> None:
    samples = [a_sample(i, prompt=f"{p} =") for i, p in enumerate(prompts)]
    distinct = len(set(prompts))
    first = data.draw(st.integers(0, distinct))
    second = data.draw(st.integers(0, distinct - first))
    parts = split_disjoint(samples, [first, second], seed=seed)
    assert [len(part) for part in parts] == [first, second]
    seen = [sample.prompt for part in parts for sample in part]
    assert len(set(seen)) == len(seen)
    assert parts == split_disjoint(samples, [first, second], seed=seed)
    left = without_prompts_of(samples, parts[0] + parts[1])
    assert {s.prompt for s in left}.isdisjoint(seen)
    assert {s.prompt for s in left} | set(seen) == {s.prompt for s in samples}


def test_a_split_that_needs_more_prompts_than_there_are_says_how_many() -> None:
    samples = [a_sample(0), a_sample(1), a_sample(2, prompt="2 + 2 =")]
    with pytest.raises(UserError, match=r"3 samples with different prompts are needed \(2 \+ 1\), but .* has 2"):
        split_disjoint(samples, [2, 1], seed=0)


def test_different_seeds_split_differently() -> None:
    samples = [a_sample(i, prompt=str(i)) for i in range(40)]
    assert split_disjoint(samples, [20], seed=0) != split_disjoint(samples, [20], seed=1)
