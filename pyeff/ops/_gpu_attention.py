"""Attention by the GPU kernels of torch and of flash-attn, brought to one meaning.

They differ in what a causal mask means where queries and keys differ in number, in what lse is for a query that sees
nothing, and in what zero tokens do to them. Here each is asked only what it answers rightly.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from pyeff.ops._gpu_attention_kernels import BACKWARD, FORWARD, MODULES, Call
from pyeff.ops._lse_gradient import EXTRA_COLUMNS, Grads, backward_with_lse
from pyeff.ops._packed import samples_of

# In the order of preference.
IMPLEMENTATIONS = ("flash_attn_3", "flash_attn_4", "cudnn", "flash_attn_2", "flash")


def forward(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out and lse by a kernel for GPUs."""
    q, k, v = _aligned(q, k, v)
    pack = _Pack.of(q, k, cu_seqlens, cu_seqlens_k)
    call = pack.call(causal, scale, window, softcap)
    if pack.longest_q == 0:
        return q.new_zeros(q.shape), q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
    # Some of these kernels ask the current device for its stream and capability.
    with torch.cuda.device_of(q):
        out, lse = FORWARD[impl](pack.queries(q), pack.keys(k), pack.keys(v), call)
    if pack.more_queries:
        # Kernels disagree about the sign.
        lse = lse.masked_fill(lse == float("inf"), float("-inf"))
    if pack.own_q is not None:
        whole = q.new_zeros(q.shape)
        whole_lse = lse.new_full((q.shape[1], q.shape[0]), float("-inf"))
        return whole.index_copy_(0, pack.own_q, out), whole_lse.index_copy_(1, pack.own_q, lse)
    return out.contiguous(), lse.contiguous()


def backward(
    impl: str,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    grad_lse: Tensor | None,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
) -> Grads:
    """The gradients by that kernel's own backward."""
    pack = _Pack.of(q, k, cu_seqlens, cu_seqlens_k)
    call = replace(pack.call(causal, scale, window, softcap), deterministic=deterministic)
    if pack.longest_q == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    if pack.more_queries:
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))

    def of_out(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Grads:
        grad_out, q, k, v, out = _aligned(grad_out, q, k, v, out)
        with torch.cuda.device_of(q):
            return BACKWARD[impl](grad_out, q, k, v, out, lse, call)

    shapes = (q.shape, k.shape, v.shape)
    grad_out, q, out = (pack.queries(t) for t in (grad_out, q, out))
    k, v = pack.keys(k), pack.keys(v)
    if pack.own_q is not None:
        lse = lse.index_select(1, pack.own_q)
        grad_lse = None if grad_lse is None else grad_lse.index_select(1, pack.own_q)
    found = backward_with_lse(of_out, grad_out, q, k, v, out, lse=lse.contiguous(), grad_lse=grad_lse)
    if pack.own_q is None or pack.own_k is None:
        return found[0].contiguous(), found[1].contiguous(), found[2].contiguous()
    dq, dk, dv = (q.new_zeros(shape) for shape in shapes)
    return (
        dq.index_copy_(0, pack.own_q, found[0]),
        dk.index_copy_(0, pack.own_k, found[1]),
        dv.index_copy_(0, pack.own_k, found[2]),
    )


@dataclass(frozen=True)
class _Pack:
    """Samples as kernels want them: none without a query or without a key."""

    cu_q: Tensor | None
    cu_k: Tensor | None
    longest_q: int
    longest_k: int
    more_queries: bool  # some sample has more queries than keys, so some queries may see nothing
    own_q: Tensor | None = None  # tokens of the samples that are left, where some were not
    own_k: Tensor | None = None

    @staticmethod
    def of(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> _Pack:
        if cu_seqlens is None:
            return _Pack(None, None, q.shape[1], k.shape[1], q.shape[1] > k.shape[1])
        cuts_q = samples_of(cu_seqlens, q.shape[0]).cuts
        cuts_k = cuts_q if cu_seqlens_k is None else samples_of(cu_seqlens_k, k.shape[0]).cuts
        cut = list(zip(pairwise(cuts_q), pairwise(cuts_k), strict=True))
        kept = [(own_q, own_k) for own_q, own_k in cut if own_q[0] < own_q[1] and own_k[0] < own_k[1]]
        lengths = [(own_q[1] - own_q[0], own_k[1] - own_k[0]) for own_q, own_k in kept]
        longest_q, longest_k = (max(of, default=0) for of in ([a for a, _ in lengths], [b for _, b in lengths]))
        more_queries = any(a > b for a, b in lengths)
        if len(kept) == len(cut):
            cu_q = cu_seqlens.to(q.device, torch.int32)
            cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.to(q.device, torch.int32)
            return _Pack(cu_q, cu_k, longest_q, longest_k, more_queries)
        cu_q, cu_k = (
            torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).to(q.device, torch.int32) for i in (0, 1)
        )
        own_q, own_k = (
            torch.cat([torch.arange(0), *(torch.arange(*sample[i]) for sample in kept)]).to(q.device) for i in (0, 1)
        )
        return _Pack(cu_q, cu_k, longest_q, longest_k, more_queries, own_q, own_k)

    def call(self, causal: bool, scale: float, window: int | None, softcap: float | None) -> Call:
        # A window wider than all samples is none, and its borders need not fit the kernels' 32 bits.
        left = -1 if window is None or window >= max(self.longest_q, self.longest_k) else window - 1
        borders = (self.cu_q, self.cu_k, self.longest_q, self.longest_k)
        return Call(causal, scale, softcap or 0.0, left, 0 if causal else left, *borders)

    def queries(self, t: Tensor) -> Tensor:
        return t if self.own_q is None else t.index_select(0, self.own_q)

    def keys(self, t: Tensor) -> Tensor:
        return t if self.own_k is None else t.index_select(0, self.own_k)


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """Kernels read 16 bytes of a head at a time; rows that begin elsewhere are copied."""
    elements = 16 // tensors[0].element_size()
    return [
        t
        if t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and not any(stride % elements for stride in t.stride()[:-1])
        else t.clone(memory_format=torch.contiguous_format)
        for t in tensors
    ]


@functools.cache
def problem(impl: str) -> str | None:
    """Why this environment has no such kernel for GPUs, or None; found without importing it."""
    if impl == "flash":
        return None if torch.backends.cuda.is_flash_attention_available() else "this torch was built without it"
    if impl == "cudnn":
        return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"
    try:
        found = importlib.util.find_spec(MODULES[impl]) is not None
    except ImportError:
        found = False
    return None if found else f"{MODULES[impl]} is not installed"


def limits(
    impl: str,
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    packed: bool,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
    lse_gradient: bool = False,
) -> str | None:
    """Why the kernel `impl` for GPUs cannot take these arguments, or None; `lse_gradient`: in a backward that is given
    one, which takes columns of its own."""
    head_size, capability = q.shape[-1], torch.cuda.get_device_capability(q.device)
    most = 128 if impl == "cudnn" or (impl == "flash_attn_4" and capability[0] == 10) else 256
    columns = head_size + (EXTRA_COLUMNS if lse_gradient else 0)
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, and q is {q.dtype}"
    if head_size % 8 or head_size > most:
        return f"it takes head sizes up to {most} that are multiples of 8, and q has {head_size}"
    if columns > most:
        return (
            f"lse has a gradient, which it carries in {EXTRA_COLUMNS} columns beside those of a head: {columns} of at "
            f"most {most}"
        )
    if capability < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    if softcap is not None and impl in ("flash", "cudnn"):
        return "it has no softcap"
    if impl == "flash" and columns > 192 and capability in ((8, 6), (8, 9), (12, 0)):
        return f"its backward needs an A100 or H100 for more than 192 columns, and these are {columns}"
    if impl == "flash" and deterministic and not torch.are_deterministic_algorithms_enabled():
        return "its backward is deterministic only under torch.use_deterministic_algorithms"
    if impl == "flash_attn_3" and capability[0] != 9:
        return "it needs a Hopper GPU"
    if impl == "flash_attn_4" and capability[0] not in (9, 10):
        return "it needs a Hopper or Blackwell GPU"
    if impl == "flash_attn_4" and softcap is not None and packed:
        return "its backward has no softcap of packed samples"
    if impl == "cudnn":
        if packed:
            return "it takes no packed samples"
        if window is not None:
            return "it has no window"
        if causal and q.shape[1] != k.shape[1]:
            return "its causal mask meets the first key, not the last"
        if q.shape[1] == 1 or k.shape[1] == 1:
            return "it does not take a single token"
        if deterministic:
            return "its backward is not deterministic, which was asked for"
    return None
