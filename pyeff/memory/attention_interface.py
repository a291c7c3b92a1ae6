"""`pyeff.attention` as an attention implementation of transformers, with the masks it can honour.

transformers asks two registries by the name in a model's configuration: one makes the mask from what the model lays
down (causal, window, padding, packed samples), the other computes attention with it. Here a mask is an
`AttentionPattern`, samples and a window in place of T^2 numbers. What no pattern says raises; nothing is ignored.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyeff.ops._packed import remember_borders
from pyeff.ops.attention import attention

# Functions of transformers.masking_utils that only say causal, window and packed samples, alone or together.
_PLAIN_MASKS = frozenset(
    {
        "and_masks.<locals>.and_mask",
        "bidirectional_mask_function",
        "causal_mask_function",
        "packed_sequence_mask_function.<locals>.inner_mask",
        "remap_positions_for_packed_sequence.<locals>.inner_mask",
        "sliding_window_bidirectional_overlay.<locals>.inner_mask",
        "sliding_window_overlay.<locals>.inner_mask",
    }
)
# Pairs of query and key compared at once where a mask is checked one by one.
_CHECKED_PAIRS = 1 << 22

MaskFunction = Callable[[Any, Any, Any, Any], Any]


class UnsupportedMaskError(ValueError):
    """A mask that `pyeff.attention` cannot honour; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class AttentionPattern:
    """Who sees whom: all of a row, or the samples `cu_seqlens` of its tokens `index` (of all rows, flat; None: all)."""

    causal: bool
    window: int | None = None
    cu_seqlens: Tensor | None = None
    index: Tensor | None = None


def register(original: str) -> str:
    """Offer `pyeff.attention` to transformers under a name, which is returned.

    Without gradients, and so in generation with its caches, the implementation named `original` runs instead.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    # Not containing "flash": transformers reads that as a promise about arguments.
    name = "pyeff_" + original.replace("flash", "fl").replace("|", "_")
    # A pattern is found by reading numbers.
    mask = torch.compiler.disable(
        functools.partial(_make_mask, original=original),
        reason="checkpointed layers and their masks are made outside compiled graphs",
    )
    AttentionInterface.register(name, functools.partial(_attention_forward, original=original))
    AttentionMaskInterface.register(name, mask)
    return name


# --------------------------------------------------------------------------------------------------------- attention


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    original: str,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' convention: query [B, H, T, D], key and value [B, G, U, D] to [B, T, H, D]."""
    if not torch.is_grad_enabled() and not isinstance(attention_mask, AttentionPattern):
        if is_causal is not None:
            kwargs["is_causal"] = is_causal
        if softcap is not None:
            kwargs["softcap"] = softcap
        run = _original_attention(module, original)
        result: tuple[Tensor, Tensor | None] = run(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    _refuse_options(module, dropout, kwargs)
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    pattern = _pattern(module, query, key, attention_mask, causal, kwargs.get("sliding_window"))
    pattern = _with_given_borders(pattern, query, kwargs)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    size, value_size = q.shape[-1], v.shape[-1]
    if value_size < size:  # multi-head latent attention
        v = pad(v, (0, size - value_size))
    options: dict[str, Any] = {
        "causal": pattern.causal,
        "window": pattern.window,
        "softcap": softcap,
        "scale": scaling,
    }
    if pattern.cu_seqlens is None:
        out = attention(q, k, v, **options)
    else:
        packed = [t.flatten(0, 1) for t in (q, k, v)]
        if pattern.index is not None:
            packed = [t.index_select(0, pattern.index) for t in packed]
        out = attention(packed[0], packed[1], packed[2], cu_seqlens=pattern.cu_seqlens, **options)
        if pattern.index is not None:
            out = out.new_zeros(q.shape[0] * q.shape[1], *out.shape[1:]).index_copy(0, pattern.index, out)
        out = out.view(q.shape)
    return out[..., :value_size], None


def _original_attention(module: nn.Module, original: str) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if original in ALL_ATTENTION_FUNCTIONS:
        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[original]
        return found
    # "eager" is in no registry: each model's file defines its own under this name.
    eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if eager is None:
        raise ValueError(f"{type(module).__name__} has no attention implementation {original!r}")
    chosen: Callable[..., Any] = eager
    return chosen


def _refuse_options(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout > 0:
        raise ValueError(
            f"{type(module).__name__} drops attention weights with probability {dropout}, and pyeff.attention has no "
            "dropout: set attention_dropout (GPT-2: attn_pdrop) to 0, or checkpoint with keep='nothing'"
        )
    for name in ("s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name}, which pyeff.attention has not: checkpoint with keep='nothing'"
            )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True asks for weights that are never formed: checkpoint with keep='nothing'"
        )


def _pattern(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, causal: bool, window: int | None
) -> AttentionPattern:
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(mask, AttentionPattern):
        if mask.causal and not causal:
            raise UnsupportedMaskError(
                f"{type(module).__name__} is not causal and was given a causal mask: checkpoint with keep='nothing'"
            )
        return mask
    if mask is not None:
        raise UnsupportedMaskError(
            f"{type(module).__name__} was given a mask of its own, {_described(mask)}: pass attention_mask [batch, "
            "tokens] for padding or position_ids for packed samples, or checkpoint with keep='nothing'"
        )
    if causal and queries != keys:
        raise UnsupportedMaskError(
            f"{type(module).__name__} has {keys} keys for {queries} queries and no mask: training on top of a cache is "
            "not supported; pass use_cache=False"
        )
    if window is not None and not causal:
        raise UnsupportedMaskError(
            f"{type(module).__name__} names a sliding window of {window} without a mask that says on which side: "
            "checkpoint with keep='nothing'"
        )
    # Where masks were made without gradients, as flash-attention's are, the window comes by this argument alone.
    return AttentionPattern(causal, window)


def _with_given_borders(pattern: AttentionPattern, query: Tensor, kwargs: dict[str, Any]) -> AttentionPattern:
    """Samples that a collator named by `cu_seq_lens_q`, where the positions have told none."""
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None or pattern.cu_seqlens is not None:
        return pattern
    keys = kwargs.get("cu_seq_lens_k")
    if query.shape[0] != 1 or (keys is not None and keys.shape != borders.shape):
        raise UnsupportedMaskError("cu_seq_lens_q is of one packed row, and must be that of the keys too")
    return AttentionPattern(pattern.causal, pattern.window, borders.to(torch.int32), None)


def _described(mask: Any) -> str:
    return f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"


# -------------------------------------------------------------------------------------------------------------- masks


def _make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    *,
    original: str,
    **kwargs: Any,
) -> Any:
    """What transformers calls for a mask. Cost: as many evaluations of the mask as tokens; of an unknown one, T^2."""
    from transformers import masking_utils

    mask_function = masking_utils.causal_mask_function if mask_function is None else mask_function
    if not torch.is_grad_enabled():
        make = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get(original)
        given = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
        names = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask")
        return None if make is None else make(**dict(zip(names, given, strict=True)), **kwargs)
    if kwargs.get("use_vmap"):
        raise UnsupportedMaskError(
            "the model lays a mask function of its own over the causal one, which pyeff.attention cannot honour: "
            "checkpoint with keep='nothing'"
        )
    padding = attention_mask
    if padding is not None and padding.shape[0] != batch_size:
        raise UnsupportedMaskError(
            f"attention_mask must have the batch's {batch_size} rows, got {padding.shape[0]}: repeat it"
        )
    if padding is not None and bool(padding.all()):
        padding = None
    causal = mask_function is masking_utils.causal_mask_function
    if padding is None and mask_function is masking_utils.bidirectional_mask_function:
        return AttentionPattern(causal=False)
    if q_length != kv_length or kv_offset:
        raise UnsupportedMaskError(
            f"a mask of {q_length} queries and {kv_length} keys is not honoured while gradients are wanted: pass an "
            f"attention_mask of {q_length} tokens and use_cache=False, or checkpoint with keep='nothing'"
        )
    if padding is None and causal:
        return AttentionPattern(causal=True)
    device = torch.device(kwargs.get("device", "cpu"))
    return _probe(mask_function, batch_size, q_length, padding, device)


def _probe(
    mask_function: MaskFunction, rows: int, length: int, padding: Tensor | None, device: torch.device
) -> AttentionPattern:
    """The pattern of a mask over `rows` of `length` tokens, certain to be that of the function."""
    row, token = torch.arange(rows, device=device)[:, None], torch.arange(length, device=device)[None, :]
    head = torch.zeros((), dtype=torch.int64, device=device)

    def seen(query: Tensor, key: Tensor) -> Tensor:
        return torch.as_tensor(mask_function(row, head, query, key), device=device).expand(rows, length)

    begins = ~seen(token, (token - 1).clamp_min(0))
    begins = begins.index_fill(1, torch.zeros(1, dtype=torch.int64, device=device), True)
    ahead = seen(token, (token + 1).clamp_max(length - 1))[:, :-1]
    # One transfer: everything below is decided on the host.
    real = torch.ones_like(begins) if padding is None else padding[:, :length]
    host = torch.stack([begins, real, torch.nn.functional.pad(ahead, (0, 1))]).cpu()
    begins, real, causal = host[0].flatten(), host[1].flatten(), not bool(host[2].any())
    starts = begins.nonzero().flatten()
    ends = torch.cat([starts[1:], torch.tensor([rows * length])])
    window = _window_of(mask_function, starts, ends, length, head)
    pattern = _pattern_of(causal, window, starts, ends, real, length)
    if not _is_plain(mask_function):
        _check_all_pairs(mask_function, AttentionPattern(causal, window), begins.view(rows, length), device)
    return _on_device(pattern, device)


def _window_of(mask_function: MaskFunction, starts: Tensor, ends: Tensor, length: int, head: Tensor) -> int | None:
    """How many keys the last query of the longest sample sees, if not all of them."""
    longest = int((ends - starts).argmax())
    start, end = int(starts[longest]), int(ends[longest])
    row, first = divmod(start, length)
    keys = torch.arange(first, first + end - start, device=head.device)
    seen = mask_function(torch.full_like(keys, row), head, keys[-1], keys)
    count = int(torch.as_tensor(seen).expand(keys.shape).sum())
    return count if count < end - start else None


def _pattern_of(
    causal: bool, window: int | None, starts: Tensor, ends: Tensor, real: Tensor, length: int
) -> AttentionPattern:
    if bool(real.all()):
        if bool((starts % length == 0).all()):
            return AttentionPattern(causal, window)
        return AttentionPattern(causal, window, torch.cat([starts, ends[-1:]]).to(torch.int32))
    counted = torch.nn.functional.pad(real.to(torch.int64).cumsum(0), (1, 0))
    borders = counted[torch.cat([starts, ends[-1:]])]
    index = real.nonzero().flatten()
    if window is not None:
        apart = index.diff() != 1
        inside = torch.searchsorted(ends, index[1:], right=True) == torch.searchsorted(ends, index[:-1], right=True)
        if bool((apart & inside).any()):
            raise UnsupportedMaskError(
                "padding between the tokens of a sample, under a sliding window, is not honoured: put padding first or "
                "last, or checkpoint with keep='nothing'"
            )
    return AttentionPattern(causal, window, borders.unique_consecutive().to(torch.int32), index)


def _on_device(pattern: AttentionPattern, device: torch.device) -> AttentionPattern:
    if pattern.cu_seqlens is None or device.type == "cpu":
        return pattern
    cu_seqlens = pattern.cu_seqlens.to(device)
    remember_borders(cu_seqlens, pattern.cu_seqlens)
    index = None if pattern.index is None else pattern.index.to(device)
    return AttentionPattern(pattern.causal, pattern.window, cu_seqlens, index)


def _is_plain(mask_function: Any) -> bool:
    """Whether it is made of nothing but functions whose meaning `_probe` finds by its samples."""
    if not isinstance(mask_function, FunctionType):
        return False
    if mask_function.__module__ != "transformers.masking_utils" or mask_function.__qualname__ not in _PLAIN_MASKS:
        return False
    return all(_is_plain(inner) for inner in _functions_within(mask_function))


def _functions_within(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        contents = cell.cell_contents
        for value in contents if isinstance(contents, tuple) else (contents,):
            if callable(value):
                yield value


def _check_all_pairs(
    mask_function: MaskFunction, pattern: AttentionPattern, begins: Tensor, device: torch.device
) -> None:
    rows, length = begins.shape
    sample = begins.to(device).cumsum(1)
    row = torch.arange(rows, device=device)[:, None, None, None]
    head = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
    key = torch.arange(length, device=device)[None, None, None, :]
    step = max(1, _CHECKED_PAIRS // (rows * length))
    for first in range(0, length, step):
        query = torch.arange(first, min(first + step, length), device=device)[None, None, :, None]
        expected = sample[:, None, first : first + step, None] == sample[:, None, None, :]
        if pattern.causal:
            expected = expected & (key <= query)
        if pattern.window is not None:
            expected = expected & ((query - key).abs() < pattern.window)
        found = torch.as_tensor(mask_function(row, head, query, key), device=device)
        if not torch.equal(found.expand(expected.shape), expected):
            raise UnsupportedMaskError(
                "the model's mask is not one of samples, causal or not, with or without a window, and pyeff.attention "
                "cannot honour it: checkpoint with keep='nothing'"
            )


__all__ = ["AttentionPattern", "UnsupportedMaskError", "register"]
