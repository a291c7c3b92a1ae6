"""Samples of a prompt and its answer, and their token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pyeff.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One training example: what the model is shown and what it should say.

    `id` is unique within what one call of :func:`pyeff.data.load_samples` returns. `source` names where the
    sample came from and, after a corruption, how it was spoilt ("chain_sum/wrong"): reports group by it.
    """

    id: str
    prompt: str
    answer: str
    source: str


@dataclass(frozen=True)
class EncodedSample:
    """Token ids of a sample: `ids[:prompt_length]` is the prompt, the rest the answer and its end token.

    `sample_index` is the position of the sample in :class:`EncodedSamples`.
    """

    ids: list[int]
    prompt_length: int
    sample_index: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer_length(self) -> int:
        """Number of tokens that carry a label: the answer's and the end token."""
        return len(self.ids) - self.prompt_length


@dataclass(frozen=True)
class EncodedSamples(Sequence[EncodedSample]):
    """A sequence of encoded samples beside the samples they came from.

    `samples[i]` and `self[i]` belong together and `self[i].sample_index == i`. `dropped` holds the samples
    left out for their length; they have no index.
    """

    samples: list[Sample]
    encoded: list[EncodedSample]
    dropped: list[Sample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: Any) -> Any:
        return self.encoded[index]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample, int64 [n]."""
        return np.asarray([len(sample.ids) for sample in self.encoded], dtype=np.int64)

    @property
    def answer_lengths(self) -> np.ndarray:
        """Labelled tokens of every sample, int64 [n]."""
        return np.asarray([sample.answer_length for sample in self.encoded], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Tokens of all samples together."""
        return int(self.lengths.sum())


def prompt_ids(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: bool | str = "auto",
    separator: str = "\n",
) -> list[int]:
    """Token ids of a prompt, ending where the answer begins: what :func:`encode` puts before the answer.

    Generation from exactly these ids continues what training showed. With a chat template the prompt is the
    user's turn, followed by the opening of the assistant's; without one it is the text and `separator`, after
    the beginning-of-sequence token if the tokenizer puts one.

    Raises:
        ValueError: `chat_template` is neither a bool nor "auto".
        UserError: a chat template was asked for and the tokenizer has none, or it cannot render the prompt.
    """
    if chat_template not in (True, False, "auto"):
        raise ValueError(f'chat_template must be True, False or "auto", got {chat_template!r}')
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat_template is True and not has_template:
        raise UserError("chat_template is true, but the tokenizer of this model has no chat template")
    if has_template and chat_template:
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # jinja raises its own kinds, templates raise through it
            raise UserError(f"the model's chat template cannot render a prompt: {error}") from error
        # The template writes the special tokens itself.
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(prompt + separator)["input_ids"])
    # Some tokenizers close every text; an end token between prompt and answer would cut them apart.
    while ids and ids[-1] == tokenizer.eos_token_id and ids[-1] != tokenizer.bos_token_id:
        ids.pop()
    return ids


def encode(
    samples: Iterable[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    chat_template: bool | str = "auto",
    separator: str = "\n",
    drop_long: bool = False,
) -> EncodedSamples:
    """Turn samples into token ids: prompt, answer, end token.

    Prompt and answer are tokenised apart, so the ids of a prompt are the same here and in generation, and no
    token straddles the border.

    Args:
        samples: the samples, in an order that is kept.
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        max_tokens: the longest sample allowed, in tokens.
        chat_template: "auto" uses the tokenizer's chat template when it has one.
        separator: text between prompt and answer where no chat template is used.
        drop_long: leave out samples longer than `max_tokens` (kept in `.dropped`) instead of raising.

    Raises:
        ValueError: `max_tokens` < 2, or a bad `chat_template`.
        UserError: a sample is longer than `max_tokens` (named, with its length) and `drop_long` is off;
            nothing is left; the tokenizer has no end-of-sequence token.

    Cost: one tokenizer call a text; 10 to 20 thousand short samples a second on one core.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"1 + 1 =\\n": 0, "2": 1, "</s>": 2}, unk_token="</s>"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> encoded = encode([Sample("a", "1 + 1 =", "2", "sums")], tokenizer, max_tokens=8)
        >>> encoded[0].ids, encoded[0].answer_length
        ([0, 1, 2], 2)
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, so an answer could not end")
    kept: list[Sample] = []
    encoded: list[EncodedSample] = []
    dropped: list[Sample] = []
    for sample in samples:
        prompt = prompt_ids(sample.prompt, tokenizer, chat_template=chat_template, separator=separator)
        answer = list(tokenizer(sample.answer, add_special_tokens=False)["input_ids"])
        ids = [*prompt, *answer, int(tokenizer.eos_token_id)]
        if len(ids) > max_tokens:
            if not drop_long:
                raise UserError(
                    f"sample {sample.id} is {len(ids)} tokens long, more than the {max_tokens} allowed: "
                    "raise max_tokens, shorten the sample, or set drop_long"
                )
            dropped.append(sample)
            continue
        encoded.append(EncodedSample(ids=ids, prompt_length=len(prompt), sample_index=len(kept)))
        kept.append(sample)
    if not kept:
        why = f": all {len(dropped)} are longer than {max_tokens} tokens" if dropped else ""
        raise UserError(f"there are no samples{why}")
    return EncodedSamples(samples=kept, encoded=encoded, dropped=dropped)


def split_disjoint(samples: Sequence[Sample], sizes: Sequence[int], *, seed: int) -> list[list[Sample]]:
    """Draw disjoint sets of the given sizes; samples with one prompt never land in two of them.

    Sets that judge a run (anchors, holdout) must not share a question with each other: equal prompts stay
    together, and each set keeps one sample of a prompt. Deterministic in `seed`.

    Raises:
        UserError: there are fewer distinct prompts than asked for.

    Example:
        >>> from pyeff.data import Sample, split_disjoint
        >>> samples = [Sample(str(i), f"{i} + 1 =", str(i + 1), "sums") for i in range(10)]
        >>> anchors, holdout = split_disjoint(samples, [3, 5], seed=0)
        >>> len(anchors), len(holdout), len({s.prompt for s in anchors + holdout})
        (3, 5, 8)
    """
    if any(size < 0 for size in sizes):
        raise ValueError(f"sizes must not be negative, got {list(sizes)}")
    first_of: dict[str, Sample] = {}
    for sample in samples:
        first_of.setdefault(sample.prompt, sample)
    distinct = list(first_of.values())
    needed = sum(sizes)
    if needed > len(distinct):
        raise UserError(
            f"{needed} samples with different prompts are needed ({' + '.join(map(str, sizes))}), "
            f"but the source has {len(distinct)}"
        )
    keys = np.random.Philox(key=seed).random_raw(len(distinct))
    shuffled = [distinct[i] for i in np.argsort(keys, kind="stable")]
    parts: list[list[Sample]] = []
    start = 0
    for size in sizes:
        parts.append(shuffled[start : start + size])
        start += size
    return parts


def without_prompts_of(samples: Iterable[Sample], held_out: Iterable[Sample]) -> list[Sample]:
    """The samples whose prompt occurs nowhere in `held_out`: keeps a pool clean of what judges it.

    Example:
        >>> from pyeff.data import Sample, without_prompts_of
        >>> pool = [Sample("a", "1 + 1 =", "2", "sums"), Sample("b", "1 + 2 =", "3", "sums")]
        >>> [s.id for s in without_prompts_of(pool, pool[:1])]
        ['b']
    """
    seen = {sample.prompt for sample in held_out}
    return [sample for sample in samples if sample.prompt not in seen]
