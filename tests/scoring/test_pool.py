from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyeff.data import EncodedSample, pack
from pyeff.scoring import FIELDS, answer_embeddings, cosine_similarity, score_batches

HIDDEN, VOCABULARY = 8, 40


def samples(count: int = 9) -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(3)
    return [
        EncodedSample(torch.randint(0, VOCABULARY, (3 + 5 * i % 7,), generator=generator).tolist(), 1 + i % 2, i)
        for i in range(count)
    ]


def table() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(VOCABULARY, HIDDEN, generator=generator),
        torch.randn(VOCABULARY, HIDDEN, generator=generator),
    )


def scores_of(max_tokens: int, pool: list[EncodedSample]):
    # A model without context, so that a hidden state depends on its token alone.
    hidden, weight = table()
    batches = pack(pool, range(len(pool)), max_tokens=max_tokens, window=4)
    return score_batches(batches, lambda batch: hidden[batch.input_ids[0]], weight, samples=len(pool))


def test_scores_are_the_means_of_their_definitions_over_the_answer():
    pool = samples()
    hidden, weight = (tensor.double() for tensor in table())
    found = scores_of(20, pool)
    for i, sample in enumerate(pool):
        rows = hidden[torch.tensor(sample.ids)][sample.prompt_length - 1 : -1]
        targets = torch.tensor(sample.ids[sample.prompt_length :])
        p = (rows @ weight.T).softmax(-1)
        error = p - torch.nn.functional.one_hot(targets, VOCABULARY)
        expected = {
            "nll": -p[torch.arange(len(targets)), targets].log().mean(),
            "el2n": error.norm(dim=-1).mean(),
            "entropy": -(p * p.log()).sum(-1).mean(),
            "head_grad_norm": (error.norm(dim=-1) * rows.norm(dim=-1)).mean(),
        }
        # Float32 sums of HIDDEN products and VOCABULARY exponentials.
        allowed = 4 * (HIDDEN + VOCABULARY) * torch.finfo(torch.float32).eps
        for name in FIELDS:
            value = expected[name].item()
            assert abs(found.fields[name][i] - value) <= allowed * max(1.0, abs(value)), name
        weights = torch.arange(1, len(targets) + 1, dtype=torch.float64)
        mean = (rows * weights[:, None]).sum(0) / weights.sum()
        assert np.abs(found.embeddings[i] - mean.numpy()).max() <= allowed * rows.abs().max().item()


def test_packing_changes_no_score():
    pool = samples()
    a, b = scores_of(9, pool), scores_of(60, pool)
    allowed = 4 * (HIDDEN + VOCABULARY) * torch.finfo(torch.float32).eps
    for name in FIELDS:
        assert np.abs(a.fields[name] - b.fields[name]).max() <= allowed * np.abs(a.fields[name]).max()
    assert np.abs(a.embeddings - b.embeddings).max() <= allowed * np.abs(a.embeddings).max()


def test_samples_in_no_batch_have_no_score():
    pool = samples()
    hidden, weight = table()
    batches = pack(pool, [0, 2], max_tokens=60)
    found = score_batches(batches, lambda batch: hidden[batch.input_ids[0]], weight, samples=len(pool))
    scored = [i for i in range(len(pool)) if not math.isnan(found.fields["nll"][i])]
    assert scored == [0, 2]
    assert np.isnan(found.embeddings[1]).all()


def test_every_batch_is_charged_with_its_answers():
    pool = samples()
    hidden, weight = table()
    charged = []
    score_batches(
        pack(pool, range(len(pool)), max_tokens=20),
        lambda batch: hidden[batch.input_ids[0]],
        weight,
        samples=len(pool),
        after_batch=lambda batch, answers: charged.append((batch.tokens, answers)),
    )
    assert sum(tokens for tokens, _ in charged) == sum(len(sample.ids) for sample in pool)
    assert sum(answers for _, answers in charged) == sum(sample.answer_length for sample in pool)


def test_an_index_beyond_the_pool_is_refused():
    hidden, weight = table()
    batches = pack(samples(), [8], max_tokens=60)
    with pytest.raises(ValueError, match="samples is 3"):
        score_batches(batches, lambda batch: hidden[batch.input_ids[0]], weight, samples=3)


def test_an_empty_sample_has_no_embedding():
    found = answer_embeddings(torch.ones(2, 3), torch.tensor([0, 0, 2]))
    assert torch.isnan(found[0]).all()
    assert torch.equal(found[1], torch.ones(3))


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 100), st.booleans())
def test_cosines_ignore_the_scale_of_embeddings(seed: int, scale: float, center: bool):
    rng = np.random.default_rng(seed)
    pool, target = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)
    cosines = cosine_similarity(pool, target, center=center)
    scaled = cosine_similarity(pool * np.float32(scale), target * np.float32(scale), center=center)
    assert np.abs(cosines).max() <= 1 + 8 * np.finfo(np.float64).eps
    # The inputs are rounded to float32 after scaling.
    assert np.allclose(cosines, scaled, rtol=0, atol=64 * np.finfo(np.float32).eps)


def test_centering_takes_out_a_direction_all_samples_share():
    rng = np.random.default_rng(0)
    pool, target = rng.normal(size=(20, 4)), rng.normal(size=(2, 4))
    common = np.array([1000.0, 0, 0, 0])
    moved = cosine_similarity((pool + common).astype(np.float32), (target + common).astype(np.float32))
    plain = cosine_similarity(pool.astype(np.float32), target.astype(np.float32))
    # 1000 in float32 leaves about 1000 * eps of each coordinate.
    assert np.allclose(moved, plain, rtol=0, atol=100 * 1000 * np.finfo(np.float32).eps)


def test_what_cannot_be_compared_is_nan_or_refused():
    cosines = cosine_similarity(
        np.array([[1, 0], [0, 0], [np.nan, 1]], dtype=np.float32),
        np.array([[2, 0]], dtype=np.float32),
        center=False,
    )
    assert cosines[0, 0] == 1
    assert cosines[1, 0] == 0
    assert np.isnan(cosines[2, 0])
    with pytest.raises(ValueError, match="pool and target"):
        cosine_similarity(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32))
