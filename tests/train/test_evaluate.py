from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pyeff.data import EncodedSample, label_positions, pack
from pyeff.governor import Cost
from pyeff.scoring.language_model import shape_of_model
from pyeff.train.evaluate import generation_work, greedy_answers, sample_losses, summarize_losses, summed_loss


def some_samples(count: int = 7) -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(1)
    lengths = [4 + 3 * i % 11 for i in range(count)]
    return [
        EncodedSample(torch.randint(0, 256, (n,), generator=generator).tolist(), 1 + i % 3, i)
        for i, n in enumerate(lengths)
    ]


@pytest.fixture
def model(tiny: ModuleType):
    return tiny.tiny_model()


def test_a_sample_has_the_loss_it_has_alone_however_it_is_packed(model):
    samples = some_samples()
    expected = []
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample.ids])).logits[0].double()
        targets = torch.tensor(sample.ids[sample.prompt_length :])
        rows = logits[sample.prompt_length - 1 : -1].log_softmax(-1)
        expected.append(-rows[torch.arange(len(targets)), targets].mean().item())
    for max_tokens in (16, 40, 200):
        losses = sample_losses(model, pack(samples, range(len(samples)), max_tokens=max_tokens), len(samples))
        # Rounding of a two-layer float32 forward: far below the square root of its unit.
        allowed = math.sqrt(torch.finfo(torch.float32).eps) * max(expected)
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < allowed


def test_micro_batches_add_up_to_the_loss_and_gradient_of_the_batch(model):
    samples = some_samples()

    def loss_and_gradient(max_tokens: int) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = 0.0
        for batch in pack(samples, range(len(samples)), max_tokens=max_tokens):
            part = summed_loss(model, batch, label_positions(batch))
            part.backward()
            loss += part.item()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, gradient = loss_and_gradient(200)
    for max_tokens in (14, 30):
        loss, other = loss_and_gradient(max_tokens)
        allowed = math.sqrt(torch.finfo(torch.float32).eps)
        assert abs(loss - whole) < allowed * whole
        assert (other - gradient).norm() < allowed * gradient.norm()


def test_greedy_answers_are_those_of_one_prompt_at_a_time(model):
    prompts = [sample.ids for sample in some_samples()]
    together = greedy_answers(model, prompts, max_new_tokens=6, end_tokens=frozenset({257}), pad_token=257)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = list(prompt)
        alone = []
        for _ in range(6):
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == 257:
                break
            alone.append(token)
            ids.append(token)
        assert answer == alone


def test_generation_stops_at_an_end_token_and_charges_what_it_did(model):
    prompts = [sample.ids for sample in some_samples(3)]
    free = greedy_answers(model, prompts, max_new_tokens=5, end_tokens=frozenset(), pad_token=257)
    assert all(len(answer) == 5 for answer in free)
    charged: list[tuple[int, int, int]] = []
    ends = frozenset(answer[1] for answer in free)
    cut = greedy_answers(
        model, prompts, max_new_tokens=5, end_tokens=ends, pad_token=257, charge=lambda *work: charged.append(work)
    )
    for answer, whole in zip(cut, free, strict=True):
        assert answer == whole[: len(answer)]
        assert whole[len(answer)] in ends
    bound = generation_work([len(prompt) for prompt in prompts], 5)
    assert all(sum(work[i] for work in charged) <= bound[i] for i in range(3))


def test_the_charge_of_evaluation_and_generation_is_what_torch_counts(tiny: ModuleType):
    # Eager attention: torch counts fused attention on the CPU as nothing.
    model = tiny.tiny_model(attn_implementation="eager")
    shape = shape_of_model(model)
    forward = Cost(
        shape.forward(1, attention_pairs=0, head_tokens=0),
        shape.forward(0, attention_pairs=1, head_tokens=0),
        shape.forward(0, attention_pairs=0, head_tokens=1),
    )
    total = 0

    def charge(tokens: int, pairs: int, answers: int) -> None:
        nonlocal total
        total += forward(tokens, pairs, answers)

    samples = some_samples()
    with FlopCounterMode(display=False) as counter:
        sample_losses(model, pack(samples, range(7), max_tokens=30), 7, charge=charge)
        greedy_answers(
            model,
            [sample.ids for sample in samples],
            max_new_tokens=4,
            end_tokens=frozenset(),
            pad_token=257,
            charge=charge,
        )
    assert abs(total - counter.get_total_flops()) <= 0.02 * counter.get_total_flops()


def test_a_mean_leaves_out_samples_without_a_loss():
    assert summarize_losses([1.0, math.nan, 3.0]) == summarize_losses([1.0, 3.0])
    assert math.isnan(summarize_losses([math.nan]).loss)
    assert math.isnan(summarize_losses([2.0]).standard_error)
