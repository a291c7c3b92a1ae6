"""A checkpointed model computes what it computes without, keeps what is promised and runs attention once."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

import pyeff
from pyeff.memory import measure_step
from pyeff.memory.attention_interface import (
    AttentionPattern,
    UnsupportedMaskError,
    _attention_forward,
    _make_mask,
    register,
)
from pyeff.memory.stored import compress

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=7),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=7, query_pre_attn_scalar=16),
    # Dropout after attention and in the MLP: the re-run draws the same numbers.
    "gpt2": lambda: transformers.GPT2Config(**GPT2, eos_token_id=2, attn_pdrop=0.0),
}
BATCHES = ["whole", "left", "right", "packed"]


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype).train()


def batch_of(kind: str = "whole", tokens: int = 24) -> dict[str, Any]:
    """Two rows: whole; the first padded before or the second after its tokens; or two samples each."""
    ids = torch.randint(3, 96, (2, tokens), generator=torch.Generator().manual_seed(7))
    batch = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
    if kind in ("left", "right"):
        mask = torch.ones_like(ids)
        if kind == "left":
            mask[0, :9] = 0
        else:
            mask[1, 17:] = 0
        batch["attention_mask"] = mask
        # The first token of a sample is predicted by what stands before it, which padding leaves undefined.
        batch["labels"][(mask * mask.roll(1, 1)) == 0] = -100
    if kind == "packed":
        places = torch.cat([torch.arange(10), torch.arange(tokens - 10)])
        batch["position_ids"] = places[None].expand(2, -1)
    return batch


def gradients(model: nn.Module, batch: dict[str, Any], *, seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def gradients_without_padding(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """Those of the rows' own tokens, one row at a time."""
    if "attention_mask" not in batch:
        return gradients(model, batch)
    total = (batch["labels"][:, 1:] != -100).sum()
    model.zero_grad(set_to_none=True)
    for ids, labels, real in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True):
        places = torch.arange(len(ids))[real][None]
        row = {"input_ids": ids[real][None], "labels": labels[real][None], "position_ids": places, "use_cache": False}
        share = (row["labels"][:, 1:] != -100).sum() / total
        (model(**row).loss * share).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def with_our_attention(model: Any) -> Any:
    """The same kernels without checkpoints."""
    model = copy.deepcopy(model)
    model.config._attn_implementation_internal = register(model.config._attn_implementation)
    return model


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class KernelCalls(TorchDispatchMode):
    """Counts operators, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Layer(nn.Module):
    """A layer with `pyeff.attention`, that knows keywords and returns a tuple."""

    def __init__(self, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return pyeff.attention(q, k, v).flatten(-2)

    def forward(self, scale: float, *, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = hidden + scale * self.out(self.attend(hidden))
        return y, {"mean": y.mean()}


class Stack(nn.Module):
    def __init__(self, layers: int = 2, make: type[nn.Module] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for layer in self.layers:
            x, extra = layer(0.5, hidden=x)
            total = total + extra["mean"]
        return x.square().mean() + total


def stack_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    model(x).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(3))


# ---- gradients


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_without_checkpoints_to_the_bit(family: str, kind: str):
    model, batch = model_of(family), batch_of(kind)
    expected = gradients(with_our_attention(model), batch)
    with pyeff.checkpoint(model), KernelCalls() as kernels:
        found = gradients(model, batch)
    assert_same(found, expected)
    assert kernels.counts["pyeff::attention_forward"] == 2  # one a layer
    assert kernels.counts["pyeff::attention_backward"] == 2


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_as_accurate_as_those_of_transformers_own_attention(family: str, kind: str):
    model, batch = model_of(family), batch_of(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # float64 would draw other numbers
    peer = gradients(model, batch)
    exact = gradients_without_padding(copy.deepcopy(model).double(), batch)
    with pyeff.checkpoint(model):
        found = gradients(model, batch)
    for a, b, c in zip(found, exact, peer, strict=True):
        assert_as_accurate(a, b, c, multiple=8)


def test_torch_checkpoint_runs_attention_twice_and_ours_does_not():
    model, batch = model_of("llama"), batch_of()
    plain = with_our_attention(model)
    plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with KernelCalls() as theirs:
        gradients(plain, batch)
    with pyeff.checkpoint(model) as checkpoints, KernelCalls() as ours:
        gradients(model, batch)
    assert theirs.counts["pyeff::attention_forward"] == 4
    assert ours.counts["pyeff::attention_forward"] == 2
    for runs in checkpoints.attention_runs.values():
        assert (runs.forward, runs.rerun, runs.computed) == (1, 1, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_keeping_nothing_leaves_attention_and_its_dropout_alone(family: str):
    config = CONFIGS[family]()
    if family == "gpt2":
        config.attn_pdrop = 0.1
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    batch = batch_of("left")
    expected = gradients(model, batch)
    with pyeff.checkpoint(model, keep="nothing"), KernelCalls() as kernels:
        assert_same(gradients(model, batch), expected)
    assert kernels.counts["pyeff::attention_forward"] == 0


def test_autocast_is_repeated():
    model, batch = model_of("llama"), batch_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(with_our_attention(model), batch)
        with pyeff.checkpoint(model):
            found = gradients(model, batch)
    assert_same(found, expected)
    # The backward pass outside of it, as it should be called.
    with pyeff.checkpoint(model):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    assert_same([p.grad for p in model.parameters()], expected)


def test_gradients_accumulate_over_forwards_that_wait():
    model, batches = model_of("llama"), [batch_of(), batch_of("packed")]
    plain = with_our_attention(model)
    for batch in batches:
        plain(**batch).loss.backward()
    with pyeff.checkpoint(model):
        losses = [model(**batch).loss for batch in batches]
        for loss in losses:
            loss.backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_a_graph_can_be_differentiated_twice_and_after_removal(x: Tensor):
    model = Stack()
    expected = stack_gradients(model, x)
    with pyeff.checkpoint(model, layers=["layers"]) as checkpoints:
        model.zero_grad()
        loss = model(x)
        loss.backward(retain_graph=True)
        assert_same([p.grad for p in model.parameters()], expected)
    model.zero_grad()
    loss.backward()
    assert_same([p.grad for p in model.parameters()], expected)
    runs = checkpoints.attention_runs["layers.0"]
    assert (runs.forward, runs.rerun, runs.computed) == (1, 2, 1)


def test_keywords_tuples_and_modules_of_ones_own(x: Tensor):
    model = Stack()
    expected = stack_gradients(model, x)
    for layers in (["layers"], model.layers, [model.layers[0], "layers.1"]):
        with pyeff.checkpoint(model, layers=layers) as checkpoints:
            assert checkpoints.layers == ("layers.0", "layers.1")
            assert_same(stack_gradients(model, x), expected)
    leaf = x.clone().requires_grad_()
    with pyeff.checkpoint(model, layers=["layers"]):
        model(leaf).backward()
    other = x.clone().requires_grad_()
    model(other).backward()
    assert torch.equal(leaf.grad, other.grad)


def test_a_layer_may_be_used_twice(x: Tensor):
    model = Stack()
    model.layers[1] = model.layers[0]
    expected = stack_gradients(model, x)
    with pyeff.checkpoint(model, layers=["layers"]) as checkpoints:
        assert_same(stack_gradients(model, x), expected)
    assert checkpoints.attention_runs["layers.0"].computed == 2


def test_a_copy_of_a_checkpointed_model_is_one():
    model, batch = model_of("llama"), batch_of()
    expected = gradients(model, batch)
    with pyeff.checkpoint(model):
        twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with KernelCalls() as kernels:
        assert_same(gradients(twin, batch), expected)
    assert kernels.counts["pyeff::attention_forward"] == 2


def test_generation_is_as_without():
    model = model_of("llama").eval()
    batch = batch_of("left")
    options = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    for cache in ("dynamic", "static"):
        expected = model.generate(**options, cache_implementation=cache)
        with pyeff.checkpoint(model):
            found = model.generate(**options, cache_implementation=cache)
        assert torch.equal(found.sequences, expected.sequences)
        assert_same(list(found.logits), list(expected.logits))


def test_evaluation_without_gradients_is_as_without():
    model = model_of("gemma2").eval()
    batch = batch_of("right")
    with torch.no_grad():
        expected = model(**batch).logits
        with pyeff.checkpoint(model):
            assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("keep", ["attention", "nothing"])
def test_weights_that_changed_before_the_backward_pass_are_refused_as_autograd_refuses_them(keep, x):
    model = Stack()
    weight = model.layers[1].get_parameter(next(name for name, _ in model.layers[1].named_parameters()))
    others = {name: p.detach().mul(0.5).requires_grad_() for name, p in model.named_parameters()}
    with pyeff.checkpoint(model, layers=["layers"], keep=keep):
        loss = model(x)
        with torch.no_grad():
            weight.mul_(2.0)
        with pytest.raises(RuntimeError, match=r"layer 'layers\.1' runs again .* no longer what it was"):
            loss.backward()
        # Its weights are in place in the forward pass alone.
        loss = torch.func.functional_call(model, others, (x,))
        with pytest.raises(RuntimeError, match=r"remove\(\) the checkpoints where torch\.func\.functional_call"):
            torch.autograd.grad(loss, list(others.values()))


def test_caches_are_dropped_and_full_ones_refused():
    model, batch = model_of("gpt2"), batch_of()
    expected = gradients(with_our_attention(model), batch)
    with pyeff.checkpoint(model):
        assert_same(gradients(model, {**batch, "use_cache": True}), expected)
        with torch.no_grad():
            cache = model(batch["input_ids"], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="use_cache=False"):
            model(batch["input_ids"], past_key_values=cache, use_cache=True)
        # Decoding where no_grad was forgotten would see one token at a time.
        cache = model(batch["input_ids"], use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"decode under torch\.no_grad"):
            model(batch["input_ids"][:, :1], past_key_values=cache, use_cache=True)


def test_compiled_models_run_their_layers_outside_the_graph():
    model, batch = model_of("llama"), batch_of()
    expected = gradients(with_our_attention(model), batch)
    with pyeff.checkpoint(model):
        compiled: Any = torch.compile(model, backend="eager")
        assert_same(gradients(compiled, batch), expected)
        torch._dynamo.reset()
        whole: Any = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="outside compiled graphs"):
            whole(**batch)
    torch._dynamo.reset()


def test_observed_samples_are_counted_once():
    model, batch = model_of("llama"), batch_of()
    plain, sketch = with_our_attention(model), pyeff.Sketch(64, seed=1)
    with pyeff.observe(plain, sketch=sketch) as expected:
        plain(**batch).loss.backward()
    with pyeff.checkpoint(model) as checkpoints, pyeff.observe(model, sketch=sketch) as found:
        model(**batch).loss.backward()
    assert torch.equal(found.grad_norms, expected.grad_norms)
    assert torch.equal(found.sketches, expected.sketches)
    assert all(runs.computed == 1 for runs in checkpoints.attention_runs.values())


# ---- what is kept


def saved_bytes(run: Any) -> int:
    """Bytes of storages kept for the backward, parameters aside."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_its_input_and_what_attention_returned(dtype: torch.dtype):
    model = model_of("llama", dtype).model
    batch, tokens, width, heads, size = 2, 24, 64, 4, dtype.itemsize
    inputs = torch.randn(batch, tokens, width, dtype=dtype, requires_grad=True)
    kept = []

    def run() -> None:
        hidden = inputs
        places = model.rotary_emb(hidden, torch.arange(tokens)[None])
        for layer in model.layers:
            hidden = layer(hidden, attention_mask=AttentionPattern(causal=True), position_embeddings=places)
        kept.append(hidden)

    def layers_only(**options: Any) -> int:
        with pyeff.checkpoint(model, **options):
            return saved_bytes(run)

    inputs_of_layers = size * batch * tokens * width
    of_attention = size * batch * tokens * width + 4 * batch * tokens * heads
    assert layers_only(keep="attention") == 2 * (inputs_of_layers + of_attention)


def test_kept_bytes_beside_those_of_torch_checkpoint_and_of_none():
    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 8}
    torch.manual_seed(0)
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes)).train()
    x = torch.randn(1, 32, 512)
    outputs = []

    def kept() -> int:
        return saved_bytes(lambda: outputs.append(model(inputs_embeds=x, use_cache=False).last_hidden_state))

    everything = kept()
    norm = saved_bytes(lambda: outputs.append(model.norm(outputs[0])))
    positions = 2 * 32 * 64 * 4  # cos and sin, which layers that are not checkpointed share
    with pyeff.checkpoint(model):
        ours = kept()
    with pyeff.checkpoint(model, keep="nothing"):
        inputs = kept()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert kept() == inputs  # transformers' own checkpoints, by torch.utils.checkpoint
    assert ours - norm <= 2.1 * (inputs - norm)
    assert ours - norm <= 0.2 * (everything - norm - positions)


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_a_compressed_input_takes_a_byte_an_element_and_a_scale_a_block(to: Any):
    model, batch = model_of("llama", torch.bfloat16), batch_of()
    kept = {}
    for compression in (None, to):
        with pyeff.checkpoint(model, compress=compression):
            kept[compression] = measure_step(model, **batch).forward_end
    elements = 2 * 24 * 64
    assert kept[None] - kept[to] == 2 * (2 * elements - elements * (1 + 4 / 128))


@pytest.mark.parametrize("to", ["int8", "fp8"])
@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 30), elements=st.integers(1, 700))
@settings(max_examples=20, deadline=None)
def test_compression_is_off_by_half_a_step(to: Any, seed: int, exponent: int, elements: int):
    t = torch.randn(elements, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    small = compress(t, to)
    found = small.expand()
    assert found.shape == t.shape
    scale = small.scales.expand(-1, small.codes.shape[1]).flatten()[:elements]
    # e4m3 keeps 3 bits after the first one, and 2^-9 is its smallest step.
    step = scale if to == "int8" else torch.maximum(t.abs() / 8, scale * 2.0**-9)
    rounding = 4 * torch.finfo(torch.float32).eps * t.abs()
    assert ((found - t).abs() <= step / 2 + rounding).all()


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_compression_keeps_zeros_and_passes_on_what_is_not_finite(to: Any):
    t = torch.zeros(512)
    t[130], t[300] = torch.nan, -torch.inf
    found = compress(t, to).expand()
    assert not found[:128].any()
    assert found[128:384].isnan().all()
    assert not found[384:].any()


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_compressed_inputs_give_the_gradient_at_the_compressed_input(to: Any):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)))
    x = torch.randn(5, 32)
    with pyeff.checkpoint(model, layers=["1"], keep="nothing", compress=to):
        model(x).square().sum().backward()
    found = [p.grad for p in model[1].parameters()]
    hidden = model[0](x)
    upstream = 2 * model[1](hidden).detach()
    near = compress(hidden, to).expand()
    assert not torch.equal(near, hidden)
    expected = torch.autograd.grad(model[1](near), list(model[1].parameters()), upstream)
    assert_same(found, list(expected))


def test_offloading_does_nothing_to_tensors_on_the_cpu():
    model, batch = model_of("llama"), batch_of()
    expected = gradients(with_our_attention(model), batch)
    with pyeff.checkpoint(model, offload=True):
        assert_same(gradients(model, batch), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_tensors_come_back_and_leave_the_gpu(dtype: torch.dtype):
    model = model_of("llama", dtype).cuda()
    batch = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in batch_of().items()}
    with _deterministic():
        for compression in (None, "int8", "fp8"):
            with pyeff.checkpoint(model, compress=compression):
                expected = gradients(model, batch)
            for _ in range(3):  # pinned memory is used again
                with pyeff.checkpoint(model, offload=True, compress=compression):
                    assert_same(gradients(model, batch), expected)
    stack, wide = Stack(4).cuda(), torch.randn(8, 512, 64, device="cuda")
    kept = {}
    for offload in (False, True):
        with pyeff.checkpoint(stack, layers=["layers"], offload=offload):
            before = torch.cuda.memory_allocated()
            loss = stack(wide)
            torch.cuda.synchronize()
            kept[offload] = torch.cuda.memory_allocated() - before
            del loss
    # The last layer's output is no layer's input, and stays.
    last = wide.numel() * wide.element_size()
    assert kept[True] - last <= 0.05 * (kept[False] - last)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_on_a_gpu(kind: str, dtype: torch.dtype):
    model = model_of("llama", dtype).cuda()
    batch = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in batch_of(kind).items()}
    with _deterministic():
        expected = gradients(with_our_attention(model), batch)
        with pyeff.checkpoint(model) as checkpoints:
            assert_same(gradients(model, batch), expected)
    for runs in checkpoints.attention_runs.values():
        assert (runs.forward, runs.rerun, runs.computed) == (1, 1, 1)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- what is refused, and undone


class Writing(Layer):
    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        borders = torch.arange(0, x.shape[0] + 1) * x.shape[1]
        out = pyeff.attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens=borders)
        return out.mul_(2).view(x.shape)


class Wavering(Layer):
    """Attends twice, or otherwise, when it runs again."""

    calls = 0
    more = True

    def attend(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 1:
            return super().attend(x)
        if self.more:
            return super().attend(x) + super().attend(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return pyeff.attention(q, k, v, window=2).flatten(-2)


class Foreign(Layer):
    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return nn.functional.scaled_dot_product_attention(q, k, v).flatten(-2)


def test_a_layer_whose_attention_is_not_ours_is_named(x: Tensor):
    model = Stack(make=Foreign)
    expected = stack_gradients(model, x)
    with (
        pyeff.checkpoint(model, layers=["layers"]),
        pytest.raises(pyeff.AttentionRerunError, match=r"'layers\.0' ran no pyeff\.attention"),
    ):
        model(x)
    with pyeff.checkpoint(model, layers=["layers"], strict=False):
        assert_same(stack_gradients(model, x), expected)


@pytest.mark.parametrize(("more", "message"), [(True, "more often"), (False, "other shapes or options")])
def test_a_rerun_that_differs_is_named(x: Tensor, more: bool, message: str):
    model = Stack(1, make=Wavering)
    model.layers[0].more = more
    with (
        pyeff.checkpoint(model, layers=["layers"]),
        pytest.raises(pyeff.AttentionRerunError, match=rf"'layers\.0' calls attention .*{message}"),
    ):
        model(x).backward()


def test_a_checkpoint_around_a_checkpoint_is_named(x: Tensor):
    model = Stack()
    expected = stack_gradients(model, x)
    with pyeff.checkpoint(model, layers=["layers"]):
        loss = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        with pytest.raises(pyeff.AttentionRerunError, match="another checkpoint encloses it"):
            loss.backward()
    with pyeff.checkpoint(model, layers=["layers"], strict=False) as checkpoints:
        model.zero_grad()
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).backward()
    assert_same([p.grad for p in model.parameters()], expected)
    assert checkpoints.attention_runs["layers.0"].computed == 2


def test_a_layer_that_writes_to_what_is_kept_is_named(x: Tensor):
    model = Stack(make=Writing)
    with pyeff.checkpoint(model, layers=["layers"]), pytest.raises(RuntimeError, match=r"'layers\.0' writes"):
        model(x)


def test_attention_dropout_is_refused():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, eos_token_id=2)).train()
    with pyeff.checkpoint(model), pytest.raises(ValueError, match="attn_pdrop"):
        model(**batch_of())


def test_options_and_layers_that_make_no_sense_are_refused():
    model = Stack()
    for options, message in (
        ({}, "layers='auto'"),
        ({"layers": "layers"}, "layers must be"),
        ({"layers": []}, "layers is empty"),
        ({"layers": ["layer"]}, "no module of the model"),
        ({"layers": [nn.Linear(1, 1)]}, "no module of the model"),
        ({"layers": ["layers", "layers.0.qkv"]}, "encloses"),
        ({"layers": ["layers"], "keep": "all"}, "keep must be"),
        ({"layers": ["layers"], "compress": "int4"}, "compress must be"),
    ):
        with pytest.raises(ValueError, match=message):
            pyeff.checkpoint(model, **options)
    for model, options in (
        (Stack(), {"layers": [1]}),
        (Stack(), {"layers": None}),
        (Stack(), {"layers": ["layers"], "offload": "cpu"}),
        (Stack(), {"layers": ["layers"], "strict": None}),
        (torch.sin, {}),
    ):
        with pytest.raises(TypeError, match="must"):
            pyeff.checkpoint(model, **options)


def test_replicas_of_data_parallel_are_refused(monkeypatch: pytest.MonkeyPatch):
    # torch's own walk over the modules, with the copies between GPUs left out.
    replication = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replication, "_broadcast_coalesced_reshape", lambda tensors, *_, **__: [list(tensors)] * 2)
    model = model_of("llama")
    with (
        pyeff.checkpoint(model),
        pytest.raises(RuntimeError, match=r"'model\.layers\.0' .*DistributedDataParallel"),
    ):
        replication.replicate(model, [0, 1])
    assert len(replication.replicate(model, [0, 1])) == 2
    alone = nn.DataParallel(model)  # no GPU or one: nothing is copied
    expected = gradients(with_our_attention(model), batch_of())
    with pyeff.checkpoint(alone) as checkpoints:
        assert checkpoints.layers == ("module.model.layers.0", "module.model.layers.1")
        assert_same(gradients(alone, batch_of()), expected)


def test_a_model_whose_attention_is_its_own_is_refused_with_the_cure():
    config = transformers.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4)
    model = transformers.BloomForCausalLM(config).train()
    with pytest.raises(ValueError, match=r"BloomForCausalLM does not .*AttentionInterface: .*keep='nothing'"):
        pyeff.checkpoint(model)
    expected = gradients(model, batch_of())
    with pyeff.checkpoint(model, keep="nothing"):
        assert_same(gradients(model, batch_of()), expected)


def test_a_model_with_checkpoints_is_refused():
    model = model_of("llama")
    with pyeff.checkpoint(model), pytest.raises(ValueError, match="checkpointed already"):
        pyeff.checkpoint(model)
    with pyeff.checkpoint(model):
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
            model(**batch_of())
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        pyeff.checkpoint(model)


def test_removal_restores_the_model():
    model = model_of("llama")
    before = [dict(layer.__dict__) for layer in model.model.layers]
    with pyeff.checkpoint(model) as checkpoints:
        assert model.config._attn_implementation != "sdpa"
    checkpoints.remove()
    assert model.config._attn_implementation == "sdpa"
    assert [layer.__dict__.keys() for layer in model.model.layers] == [b.keys() for b in before]
    checkpoints = pyeff.checkpoint(model)
    own = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *a, **k: own(*a, **k)
    with pytest.raises(RuntimeError, match="another forward"):
        checkpoints.remove()
    model.model.layers[0].forward = own
    checkpoints.remove()
    assert "forward" not in model.model.layers[0].__dict__


# ---- masks


def dense(pattern: AttentionPattern, rows: int, length: int) -> Tensor:
    """The pattern as [rows, length, length] booleans, from its definition."""
    seen = torch.zeros(rows * length, rows * length, dtype=torch.bool)
    index = torch.arange(rows * length) if pattern.index is None else pattern.index
    borders = range(0, rows * length + 1, length) if pattern.cu_seqlens is None else pattern.cu_seqlens.tolist()
    for start, end in zip(borders, list(borders)[1:], strict=False):
        i, j = torch.meshgrid(torch.arange(start, end), torch.arange(start, end), indexing="ij")
        inside = (j <= i) if pattern.causal else torch.ones_like(i, dtype=torch.bool)
        if pattern.window is not None:
            inside &= (i - j).abs() < pattern.window
        seen[index[i], index[j]] = inside
    return torch.stack([seen[r * length : (r + 1) * length, r * length : (r + 1) * length] for r in range(rows)])


@st.composite
def mask_calls(draw: Any) -> dict[str, Any]:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    window = draw(st.none() | st.integers(1, 14))
    bidirectional = draw(st.booleans())
    if bidirectional:
        function = (
            masking_utils.bidirectional_mask_function
            if window is None
            else masking_utils.sliding_window_bidirectional_mask_function(window)
        )
    elif window is None:
        function = masking_utils.causal_mask_function
    else:
        function = masking_utils.sliding_window_causal_mask_function(window)
    padding = None
    kind = draw(st.sampled_from(["whole", "packed", "padded"]))
    if kind == "packed" and not bidirectional:
        places = []
        for _ in range(rows):
            cut = draw(st.integers(0, length))
            places.append(torch.cat([torch.arange(cut), torch.arange(length - cut)]))
        position_ids = torch.stack(places)
        packed = masking_utils.find_packed_sequence_indices(position_ids)
        if packed is not None:
            function = masking_utils.packed_sequence_compatibility_function(function, position_ids, packed)
    elif kind == "padded":
        padding = torch.zeros(rows, length, dtype=torch.bool)
        for row in range(rows):
            start = draw(st.integers(0, length))
            padding[row, start : draw(st.integers(start, length))] = True
    return {
        "batch_size": rows,
        "q_length": length,
        "kv_length": length,
        "mask_function": function,
        "attention_mask": padding,
    }


@given(call=mask_calls())
@settings(max_examples=80, deadline=None)
def test_patterns_say_what_the_mask_functions_say(call: dict[str, Any]):
    rows, length, padding = call["batch_size"], call["q_length"], call["attention_mask"]
    pattern = _make_mask(**call, original="sdpa")
    expected = masking_utils.sdpa_mask(**call, allow_is_causal_skip=False)[:, 0]
    real = torch.ones(rows, length, dtype=torch.bool) if padding is None else padding
    # Queries at padding have no result.
    assert torch.equal(dense(pattern, rows, length) & real[:, :, None], expected & real[:, :, None])


def _chunks(length: int) -> Any:
    return masking_utils.chunked_causal_mask_function(length, torch.zeros(2, dtype=torch.int64))


def test_unknown_masks_are_honoured_where_a_pattern_says_them_and_refused_elsewhere():
    call: dict[str, Any] = {"batch_size": 2, "q_length": 12, "kv_length": 12, "original": "sdpa"}
    pattern = _make_mask(mask_function=_chunks(5), **call)
    expected = masking_utils.sdpa_mask(2, 12, 12, mask_function=_chunks(5), allow_is_causal_skip=False)[:, 0]
    assert torch.equal(dense(pattern, 2, 12), expected)

    def prefix(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) | (key < 4)

    def all_but_one(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & ~((query == 9) & (key == 2))

    for function in (prefix, all_but_one):
        with pytest.raises(UnsupportedMaskError, match="keep='nothing'"):
            _make_mask(mask_function=function, **call)
    with pytest.raises(UnsupportedMaskError, match="keep='nothing'"):
        _make_mask(mask_function=prefix, use_vmap=True, **call)
    holes = torch.ones(2, 12, dtype=torch.bool)
    holes[0, 5] = False
    window = masking_utils.sliding_window_causal_mask_function(3)
    with pytest.raises(UnsupportedMaskError, match="padding between"):
        _make_mask(mask_function=window, attention_mask=holes, **call)


def test_a_mask_of_other_rows_or_tokens_is_refused():
    model, batch = model_of("llama"), batch_of()
    with pyeff.checkpoint(model):
        for shape, message in (((1, 24), "2 rows, got 1"), ((2, 20), "attention_mask of 24 tokens")):
            mask = torch.ones(shape, dtype=torch.int64)
            mask[0, 0] = 0
            with pytest.raises(UnsupportedMaskError, match=message):
                model(**batch, attention_mask=mask)


def test_a_window_that_comes_without_a_mask_is_not_ignored():
    module = nn.Module()
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    named = {"original": "sdpa", "sliding_window": 3}
    out, _ = _attention_forward(module, q, k, v, None, **named)
    assert torch.equal(out, pyeff.attention(*(t.transpose(1, 2) for t in (q, k, v)), window=3))
    with pytest.raises(UnsupportedMaskError, match="on which side"):
        _attention_forward(module, q, k, v, None, is_causal=False, **named)


def test_a_mask_of_the_callers_own_is_refused():
    model, batch = model_of("llama"), batch_of()
    batch["attention_mask"] = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    with pyeff.checkpoint(model), pytest.raises(UnsupportedMaskError, match="attention_mask"):
        model(**batch)


def test_borders_of_a_collator_are_taken():
    model, batch = model_of("llama"), batch_of("packed")
    batch = {k: v[:1] if isinstance(v, Tensor) else v for k, v in batch.items()}
    expected = gradients(with_our_attention(model), batch)
    borders = torch.tensor([0, 10, 24], dtype=torch.int32)
    with pyeff.checkpoint(model):
        assert_same(gradients(model, {**batch, "cu_seq_lens_q": borders, "cu_seq_lens_k": borders}), expected)


# ---- several processes


def _rank(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batch = {k: v[rank : rank + 1] if isinstance(v, Tensor) else v for k, v in batch_of("packed").items()}
    model = model_of("llama")
    expected = gradients(nn.parallel.DistributedDataParallel(with_our_attention(model)), batch)
    pyeff.checkpoint(model)
    replicated = gradients(nn.parallel.DistributedDataParallel(model), batch)
    found, runs = [], []
    for first in (True, False):
        sharded = model_of("llama")
        if first:
            checkpoints = pyeff.checkpoint(sharded)
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        if not first:
            checkpoints = pyeff.checkpoint(sharded)
        found.append([g.full_tensor() for g in gradients(sharded, batch)])
        runs += [[r.forward, r.rerun, r.computed] for r in checkpoints.attention_runs.values()]
    # Twice the batch in two parts, the first without communication.
    sharded.zero_grad()
    for last in (False, True):
        sharded.set_requires_gradient_sync(last)
        sharded(**batch).loss.backward()
    found.append([p.grad.full_tensor() / 2 for p in sharded.parameters()])
    torch.save([expected, replicated, found, runs], Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_several_processes_share_gradients_as_without(tmp_path: Path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        expected, replicated, sharded, runs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_same(replicated, expected)
        # gloo reduces shards in another order.
        eps = torch.finfo(torch.float32).eps
        for gradients_of_shards in sharded:
            for a, b in zip(gradients_of_shards, expected, strict=True):
                assert (a - b).abs().max() <= 8 * eps * b.abs().max()
        assert runs == [[1, 1, 1]] * 4


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
