"""Ways to hold a tensor from the forward pass to the backward: in fewer bits, or in the host's memory."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Compression = Literal["fp8", "int8"]

BLOCK_SIZE = 128
_TYPES = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}


@dataclass(frozen=True)
class Compressed:
    """Codes of a byte each and the fp32 scale of every `BLOCK_SIZE` consecutive elements."""

    codes: Tensor  # [blocks, BLOCK_SIZE]
    scales: Tensor  # [blocks, 1]
    shape: torch.Size
    dtype: torch.dtype

    def expand(self) -> Tensor:
        """The tensor again, within half a step of int8 (scale / 2) or of fp8 (2^-4 of the element)."""
        flat = (self.codes.float() * self.scales).flatten()[: self.shape.numel()]
        return flat.to(self.dtype).view(self.shape)


def compress(t: Tensor, to: Compression) -> Compressed:
    """x = scale * code, scale = max |x| / largest code over a block: 1 + 4 / 128 bytes an element.

    A NaN or an infinity makes NaN of its block, so that a broken activation breaks the gradient too.
    """
    dtype, largest = _TYPES[to]
    flat = t.detach().float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scales = blocks.abs().amax(1, keepdim=True) / largest
    scales = torch.where(scales.isinf(), torch.nan, scales)
    codes = torch.where(scales > 0, blocks / scales, 0.0).clamp_(-largest, largest)
    return Compressed((codes.round_() if to == "int8" else codes).to(dtype), scales, t.shape, t.dtype)


class Offload:
    """Tensors of one device in pinned host memory, copied there and back on a stream of their own.

    Whoever takes the first tensor of a layer back starts the way back of the layer before it, the next that the
    backward pass will ask for.
    """

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.last: weakref.ref[OffloadedLayer] | None = None

    def layer(self) -> OffloadedLayer:
        """Where the tensors of the layer that runs next go."""
        made = OffloadedLayer(self, self.last)
        self.last = weakref.ref(made)
        return made

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The copies' stream."""
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        return self.streams[device]


class OffloadedLayer:
    """Tensors of one layer's forward pass, on their way or in host memory."""

    def __init__(self, offload: Offload, before: weakref.ref[OffloadedLayer] | None) -> None:
        self.offload, self.before = offload, before
        self.tensors: list[weakref.ref[OffloadedTensor]] = []
        self.fetched = False

    def put(self, t: Tensor) -> OffloadedTensor:
        """Start to copy `t`; its memory is free once the copy is done and nobody else holds it."""
        stream = self.offload.stream(t.device)
        stream.wait_stream(torch.cuda.current_stream(t.device))
        with torch.cuda.stream(stream):
            host = torch.empty_like(t, device="cpu", pin_memory=True)
            host.copy_(t, non_blocking=True)
        t.record_stream(stream)
        stored = OffloadedTensor(host, t.device, self)
        self.tensors.append(weakref.ref(stored))
        return stored

    def fetch(self) -> None:
        """Start the way back of everything, the first time."""
        if self.fetched:
            return
        self.fetched = True
        for reference in self.tensors:
            stored = reference()
            if stored is not None:
                stored.fetch()


class OffloadedTensor:
    """One tensor in host memory."""

    def __init__(self, host: Tensor, device: torch.device, layer: OffloadedLayer) -> None:
        self.host, self.device, self.layer = host, device, layer
        self.back: tuple[Tensor, torch.cuda.Event] | None = None

    def fetch(self) -> None:
        """Start the copy back, unless it runs."""
        if self.back is None:
            stream = self.layer.offload.stream(self.device)
            # Behind the copy to the host, which went by the same stream.
            with torch.cuda.stream(stream):
                self.back = self.host.to(self.device, non_blocking=True), stream.record_event()

    def take(self) -> Tensor:
        """The tensor on its device, for the current stream; taken again, it is copied again."""
        self.layer.fetch()
        self.fetch()
        before = None if self.layer.before is None else self.layer.before()
        if before is not None:
            before.fetch()
        assert self.back is not None
        (found, ready), self.back = self.back, None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        found.record_stream(current)
        return found


class Storing:
    """How the tensors of one layer's forward pass are held: `pack` and `unpack` of saved tensor hooks.

    `inputs` are the tensors to compress; everything on a GPU is offloaded if there is an `offload`.
    """

    def __init__(self, inputs: list[Tensor], compression: Compression | None, offload: Offload | None) -> None:
        self.compression = compression
        # Hooks see detached tensors, so that inputs are known by where they lie.
        self.inputs = set() if compression is None else {_place(t) for t in inputs}
        self.layer = None if offload is None else offload.layer()

    def pack(self, t: Tensor) -> Any:
        """What stands for `t` until the backward."""
        if self.compression is not None and _place(t) in self.inputs:
            small = compress(t, self.compression)
            return Compressed(self._put(small.codes), self._put(small.scales), small.shape, small.dtype)
        return self._put(t)

    def unpack(self, stored: Any) -> Tensor:
        """The tensor, or as near to it as was kept."""
        if isinstance(stored, Compressed):
            codes, scales = self._take(stored.codes), self._take(stored.scales)
            return Compressed(codes, scales, stored.shape, stored.dtype).expand()
        return self._take(stored)

    def _put(self, t: Tensor) -> Any:
        return self.layer.put(t) if self.layer is not None and t.is_cuda else t

    def _take(self, stored: Any) -> Tensor:
        found: Tensor = stored.take() if isinstance(stored, OffloadedTensor) else stored
        return found


def _place(t: Tensor) -> tuple[int, torch.Size, torch.dtype]:
    return t.data_ptr(), t.shape, t.dtype


__all__ = ["BLOCK_SIZE", "Compressed", "Compression", "Offload", "Storing", "compress"]
