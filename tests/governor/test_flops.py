"""The ledger's FLOP formulas against torch's counter on real models, where that counter is right."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyeff
from pyeff.governor import TransformerShape, attention_pairs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402


def agrees(ours, counted, *, tokens=24, head_dim=32):
    """Equal but for the rotary embedding: positions x frequencies may be a product, once a pass and its repetition."""
    return abs(ours - counted) <= 2 * tokens * head_dim and abs(ours - counted) <= 0.02 * counted


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only lose by threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama(layers=3, **options):
    config = transformers.LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=307,
        attn_implementation="eager",
        **options,
    )
    return transformers.LlamaForCausalLM(config), shape_of(config, kv_heads=2, intermediate=256, gated=True)


def qwen2():
    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=211,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return transformers.Qwen2ForCausalLM(config), shape_of(config, kv_heads=4, intermediate=176, gated=True)


def wide_heads():
    """Heads wider together than the residual stream, as Qwen3 and Gemma have."""
    config = transformers.Qwen3Config(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=211,
        attn_implementation="eager",
    )
    return transformers.Qwen3ForCausalLM(config), shape_of(
        config, kv_heads=2, intermediate=176, gated=True, head_dim=32
    )


def gpt2():
    config = transformers.GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=4,
        vocab_size=211,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
    )
    return transformers.GPT2LMHeadModel(config), shape_of(config, kv_heads=4, intermediate=256, gated=False)


def shape_of(config, *, kv_heads, intermediate, gated, head_dim=None):
    heads = config.num_attention_heads
    head_dim = head_dim or config.hidden_size // heads
    return TransformerShape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        query_width=heads * head_dim,
        kv_width=kv_heads * head_dim,
        intermediate_size=intermediate,
        gated_mlp=gated,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
    )


def counted(model, *, batch=1, length=24, backward, logits_to_keep=0, **inputs):
    ids = torch.arange(batch * length).reshape(batch, length) % 200
    with FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(backward):
            logits = model(input_ids=ids, logits_to_keep=logits_to_keep, use_cache=False, **inputs).logits
        if backward:
            logits.float().square().mean().backward()
    return counter.get_total_flops()


MODELS = {"llama": llama, "qwen2": qwen2, "qwen3": wide_heads, "gpt2": gpt2}


@pytest.mark.parametrize("name", MODELS)
def test_forward_agrees_with_the_counter(name):
    model, shape = MODELS[name]()
    assert agrees(shape.forward(24), counted(model, backward=False))


@pytest.mark.parametrize("name", MODELS)
def test_full_training_step_agrees_with_the_counter(name):
    model, shape = MODELS[name]()
    assert agrees(shape.train(24), counted(model.train(), backward=True))


def test_rows_of_a_batch_attend_apart():
    model, shape = llama()
    expected = counted(model, batch=3, length=16, backward=False)
    assert agrees(shape.forward(48, attention_pairs=attention_pairs([16] * 3)), expected)


def test_a_packed_row_under_a_dense_mask_executes_every_pair():
    model, shape = llama()
    positions = torch.cat([torch.arange(length) for length in (5, 19)])[None]
    expected = counted(model, backward=False, position_ids=positions)
    assert agrees(shape.forward(24), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backward", [False, True])
def test_the_head_is_charged_only_where_logits_are_computed(name, backward):
    model, shape = MODELS[name]()
    keep = torch.tensor([3, 4, 11])
    count = shape.train if backward else shape.forward
    expected = counted(model.train(backward), backward=backward, logits_to_keep=keep)
    assert agrees(count(24, head_tokens=3), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_embedding_still_owes_the_first_layers_input_gradient_to_its_trained_norm(name):
    model, shape = MODELS[name]()
    model.get_input_embeddings().weight.requires_grad_(False)  # and a head tied to it
    expected = counted(model.train(), backward=True)
    assert agrees(shape.train(24, frozen_embedding=True), expected)


LLAMA_NAMES = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
TARGETS = [("q", "v"), ("k",), ("v",), ("o",), ("down",), ("gate", "up"), tuple(LLAMA_NAMES)]


def with_lora(model, targets, rank=8):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=rank, target_modules=[LLAMA_NAMES[t] for t in targets], lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
def test_lora_step_agrees_with_the_counter(targets, layers):
    # One layer is the hard case: nothing below the first adapter needs a gradient, and here that is half the model.
    model, shape = llama(layers)
    expected = counted(with_lora(model, targets).train(), backward=True)
    got = shape.train(24, trainable="lora", lora_rank=8, lora_targets=targets)
    assert agrees(got, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("targets", [None, *TARGETS], ids=lambda t: "-".join(t or ("full",)))
def test_checkpointed_step_agrees_with_the_counter(targets, reentrant):
    model, shape = llama()
    options = {}
    if targets:
        model = with_lora(model, targets)
        options = {"trainable": "lora", "lora_rank": 8, "lora_targets": targets}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if targets:
        # transformers does so when checkpointing is switched on for a model with adapters, reentrant or not.
        options["input_requires_grad"] = True
    expected = counted(model.train(), backward=True)
    got = shape.train(24, checkpointing=True, early_stop=not reentrant, **options)
    assert agrees(got, expected)


@pytest.mark.parametrize("targets", [None, *TARGETS], ids=lambda t: "-".join(t or ("full",)))
def test_a_step_that_keeps_attention_agrees_with_the_counter(targets):
    model, shape = llama()
    options = {}
    if targets:
        model = with_lora(model, targets)
        options = {"trainable": "lora", "lora_rank": 8, "lora_targets": targets}
    with pyeff.checkpoint(model):
        expected = counted(model.train(), backward=True)
    # The counter knows no products of `pyeff.attention`.
    assert agrees(shape.train(24, attention_pairs=0, checkpointing=True, keep_attention=True, **options), expected)


def test_input_gradients_can_be_asked_for():
    model, shape = llama(1)
    model = with_lora(model, ("q", "v"))
    model.enable_input_require_grads()
    expected = counted(model.train(), backward=True)
    got = shape.train(24, trainable="lora", lora_rank=8, input_requires_grad=True)
    assert agrees(got, expected)


def test_micro_batches_sum_to_the_batch():
    model, shape = llama()
    whole = counted(model.train(), batch=4, length=12, backward=True)
    parts = sum(counted(model, batch=1, length=12, backward=True) for _ in range(4))
    assert whole == parts
    together = shape.train(48, attention_pairs=4 * 144)
    assert together == 4 * shape.train(12)
    assert agrees(together, whole)


SHAPES = st.builds(
    TransformerShape,
    layers=st.integers(1, 12),
    hidden_size=st.integers(1, 512),
    query_width=st.integers(1, 512),
    kv_width=st.integers(1, 512),
    intermediate_size=st.integers(1, 2048),
    gated_mlp=st.booleans(),
    vocab_size=st.integers(1, 50_000),
    tied_embeddings=st.booleans(),
)
WORK = st.tuples(*[st.integers(0, 10**6)] * 3)


@given(SHAPES, WORK)
def test_full_training_is_three_forwards(shape, work):
    tokens, pairs, heads = work
    forward = shape.forward(tokens, attention_pairs=pairs, head_tokens=heads)
    assert shape.train(tokens, attention_pairs=pairs, head_tokens=heads) == 3 * forward


@given(SHAPES, st.lists(WORK, max_size=5), st.booleans(), st.booleans())
def test_cost_is_additive_and_exact_at_any_size(shape, parts, lora, checkpointing):
    cost = shape.train_cost(
        trainable="lora" if lora else "full", lora_rank=4, lora_targets=("q",), checkpointing=checkpointing
    )
    total = [sum(column) for column in zip(*parts, strict=True)] if parts else [0, 0, 0]
    assert cost(*total) == sum(cost(*part) for part in parts)


@given(SHAPES, WORK, st.sets(st.sampled_from(["q", "k", "v", "o", "up", "down"]), min_size=1))
def test_less_trained_never_costs_more(shape, work, targets):
    tokens, pairs, heads = work

    def train(**options):
        return shape.train(tokens, attention_pairs=pairs, head_tokens=heads, **options)

    forward = shape.forward(tokens, attention_pairs=pairs, head_tokens=heads)
    lora = {"trainable": "lora", "lora_targets": targets}
    assert forward <= train(lora_rank=1, **lora) <= train(lora_rank=2, **lora)
    assert train(lora_rank=2, **lora) <= train(lora_rank=2, input_requires_grad=True, **lora)
    assert train(frozen_embedding=True) <= train() <= train(checkpointing=True) <= 4 * forward
    kept = train(checkpointing=True, keep_attention=True)
    assert kept == train(checkpointing=True) - shape.forward(0, attention_pairs=pairs, head_tokens=0)
    assert train(checkpointing=True) <= train(checkpointing=True, early_stop=False) <= 4 * forward


def test_wrong_arguments_are_named():
    _, shape = llama()
    with pytest.raises(ValueError, match="tokens must be a whole number"):
        shape.forward(-1)
    with pytest.raises(ValueError, match="head_tokens"):
        shape.forward(4, head_tokens=1.5)
    with pytest.raises(ValueError, match="trainable must be 'full' or 'lora'"):
        shape.train(4, trainable="half")
    with pytest.raises(ValueError, match="lora_rank must be a positive integer"):
        shape.train(4, trainable="lora")
    with pytest.raises(ValueError, match="lora_targets must name some of q, k, v, o, gate, up, down"):
        shape.train(4, trainable="lora", lora_rank=2, lora_targets=("q_proj",))
    with pytest.raises(ValueError, match="hidden_size must be a positive integer, got 0"):
        dataclasses.replace(shape, hidden_size=0)
    with pytest.raises(TypeError, match="gated_mlp"):
        dataclasses.replace(shape, gated_mlp=1)


@given(st.lists(st.integers(0, 300), max_size=6))
def test_causal_pairs_are_the_ones_on_and_below_the_diagonal(lengths):
    expected = sum(1 for length in lengths for query in range(length) for key in range(query + 1))
    assert attention_pairs(lengths, causal=True) == expected


def test_model_flops_leave_out_masked_pairs_and_recomputation():
    _, shape = llama()
    lengths = [16, 8]
    model = shape.model_flops(lengths)
    assert model == shape.train(24, attention_pairs=attention_pairs(lengths, causal=True))
    assert model < shape.train(24, attention_pairs=attention_pairs(lengths)) < shape.train(24)
    assert shape.train(24) < shape.train(24, checkpointing=True)


@pytest.mark.parametrize("backward", [False, True])
def test_a_mixture_of_experts_agrees_with_the_counter(backward):
    config = transformers.MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=211,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = transformers.MixtralForCausalLM(config)
    dense = shape_of(config, kv_heads=2, intermediate=2 * 96, gated=True)
    shape = dataclasses.replace(dense, experts=4)
    ours = shape.train(24) if backward else shape.forward(24)
    found = counted(model, backward=backward)
    assert agrees(ours, found)
    assert not agrees(dense.train(24) if backward else dense.forward(24), found)  # the router is seen
