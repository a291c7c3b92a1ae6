"""What the layers of one forward pass note about its samples while its gradient is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pyeff.observation.deferral import Held, HeldSamples, Selection
from pyeff.observation.features import Noted
from pyeff.observation.rows import Batch, Rows
from pyeff.ops import VectorGrad

if TYPE_CHECKING:
    from pyeff.observation.observer import GradientObservation

# A tied head reads this many bytes of its logits' gradient at a time.
_PIECE_BYTES = 32 << 20

Kind = Literal["linear", "embedding", "vector"]


class Use:
    """One use of a parameter in a forward pass, and where its squared norms go.

    `scale` is the derivative of the tensor the layer was given by the parameter (1 for the parameter itself);
    `transposed` says that the layer was given the transposed parameter.
    """

    __slots__ = ("_head_rows", "done", "forward", "ids", "kind", "name", "rows", "scale", "size", "transposed")

    def __init__(
        self, forward: Forward, name: str, kind: Kind, rows: Rows, scale: float, size: int, transposed: bool
    ) -> None:
        self.forward, self.name, self.kind, self.rows, self.scale = forward, name, kind, rows, scale
        self.size, self.transposed = size, transposed
        self.ids: Tensor | None = None
        self.done = False
        self._head_rows: Tensor | None = None

    @property
    def open(self) -> bool:
        """Whether anybody still wants this use's norms."""
        observation = self.forward.observation
        return observation.is_open and self.name not in observation.unobserved

    @property
    def deferred(self) -> bool:
        """Whether the gradient is to be formed later: the layer leaves what that takes by `hold`, and returns None."""
        return self.open and self.forward.observation.defer

    def add_norms_sq(self, norms_sq: Tensor | None) -> None:
        """Note the squared norms [S] of the gradient of what the layer was given, if they are wanted."""
        self._begin()
        if norms_sq is not None:
            self.forward.add(self.name, norms_sq * self.scale**2)

    def hold(self, held: Held) -> None:
        """Keep what the gradient of the tensor that the layer was given takes, if it is `deferred`."""
        if self.deferred:
            self.forward.held.setdefault(self.name, []).append((self, held))

    def of_parameter(self, gradient: Tensor) -> Tensor:
        """The parameter's gradient [...] from that of the tensor that the layer was given."""
        observation = self.forward.observation
        parameter = observation.parameter(self.name)
        if self.transposed:
            gradient = gradient.reshape(parameter.t().shape).t()
        if gradient.numel() != parameter.numel():
            raise AssertionError(f"a part of {self.name} was deferred")
        gradient = gradient.reshape(parameter.shape)
        return gradient if self.scale == 1.0 else gradient * self.scale

    @property
    def shared(self) -> bool:
        """Whether a vector's gradients are kept: the forward pass uses it elsewhere too, so that they add up before
        they are squared, or they are wanted for more than their norm."""
        observation = self.forward.observation
        if self.kind == "vector" and (observation.features is not None or observation.defer):
            return True
        return any(use is not self for use in self.forward.uses.get(self.name, ()))

    def add_vector(self, grad: VectorGrad) -> None:
        """Note the gradient of a vector: its `sample_grads` if the use is `shared`, else its `norms_sq`."""
        shared = self.shared
        self._begin()
        if not shared:
            assert grad.norms_sq is not None
            self.forward.add(self.name, grad.norms_sq * self.scale**2)
            return
        assert grad.sample_grads is not None
        gradients = grad.sample_grads * self.scale
        observation = self.forward.observation
        whole = observation.parameter(self.name)
        if (observation.features is not None or observation.defer) and gradients.shape[1] != whole.numel():
            observation.refuse(self.name, "a part of it is used, which is neither sketched nor deferred", now=True)
        if (
            self.transposed and whole.ndim == 2 and gradients.shape[1] == whole.numel()
        ):  # entries in the parameter's own order
            gradients = gradients.unflatten(1, whole.t().shape).mT.flatten(1)
        partial = self.forward.partials.get(self.name)
        self.forward.partials[self.name] = gradients if partial is None else partial + gradients

    def add_features(self, noted: Noted) -> None:
        """Note sketches and dots of the gradient of what the layer was given."""
        if self.scale != 1.0:
            features = self.forward.observation.features
            if noted.sketches is not None and features is not None and not features.linear:
                self.forward.observation.refuse(self.name, "a multiple of it is used, and AdamW's map is not linear")
                return
            noted = Noted(*(None if part is None else part * self.scale for part in noted))
        self.forward.add_features(self.name, noted)

    def _begin(self) -> None:
        if self.done:
            self.forward.observation.refuse(self.name, "the gradient of one forward pass was computed twice", now=True)
        self.done = True
        self.forward.device = self.rows.borders.device
        self.forward.contributed(self.name)
        if self not in self.forward.uses.setdefault(self.name, []):
            # A re-entrant checkpoint of an unknown make, which ran the forward pass anew inside the backward pass.
            self.forward.observation.require_one_pending()
            self.forward.register(self)

    def add_product(self, inputs: Tensor, outputs: Tensor) -> None:
        """For a head whose weight is also the embedding: keep what the cross term of both needs.

        With E_t the embedding's gradient at token t and H = outputs^T inputs the head's, <H, E> = sum_t H[id_t] . E_t:
        the rows id_t of H are kept, as many numbers as the embedding has outputs. Cost 2 T^2 D FLOPs a sample.
        """
        if self.transposed:
            inputs, outputs = outputs, inputs
        self.add_columns(inputs, lambda rows, ids: outputs[rows].index_select(1, ids))

    def add_columns(self, inputs: Tensor, columns: Callable[[slice, Tensor], Tensor]) -> None:
        """`add_product`, where `columns(rows, ids)` are the outputs of some rows for the classes `ids`: [T, C]."""
        embedding = self.forward.partner(self)
        if embedding is None or not self.forward.observation.norms:
            return
        if embedding.done or embedding.ids is None:
            self.forward.observation.refuse(self.name, "its embedding's gradient came before its head's", now=True)
            return
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        ids = embedding.ids
        kept = torch.empty(ids.shape[0], inputs.shape[1], dtype=dtype, device=inputs.device)
        for head, tokens in zip(self.rows.spans(), embedding.rows.spans(), strict=True):
            length = max(1, head.stop - head.start)
            step = max(1, _PIECE_BYTES // (length * dtype.itemsize))
            x = inputs[head].to(dtype)
            for begin in range(tokens.start, tokens.stop, step):
                piece = slice(begin, min(begin + step, tokens.stop))
                kept[piece] = columns(head, ids[piece]).to(dtype).t() @ x
        embedding._head_rows = kept * (self.scale * embedding.scale)

    def add_cross_term(self, gradients: Tensor, padding_idx: int) -> None:
        """Note the cross term with the head, from the embedding's own output gradients [N, D]."""
        kept, self._head_rows = self._head_rows, None
        if kept is None or self.ids is None:
            return
        products = (kept * gradients).sum(1, keepdim=True)
        if padding_idx >= 0:
            products.masked_fill_((self.ids == padding_idx).unsqueeze(1), 0.0)
        self.forward.add(self.name, 2.0 * self.rows.sum_by_sample(products).squeeze(1))


class Forward:
    """One forward pass: its samples, the uses of each parameter in it, and the squared norms noted so far."""

    def __init__(self, batch: Batch, observation: GradientObservation) -> None:
        self.batch, self.observation = batch, observation
        self.uses: dict[str, list[Use]] = {}
        self.partials: dict[str, Tensor] = {}
        self.norms_sq: dict[str, Tensor] = {}
        self.held: dict[str, list[tuple[Use, Held]]] = {}
        self.accumulated = False
        self.device = torch.device("cpu")
        self._noted = Noted(None, None)
        self._factored: dict[str, Tensor] = {}
        self.began_backward = False

    def contributed(self, name: str) -> None:
        """Note that the backward pass of this forward pass has reached a parameter."""
        self.began_backward = True
        self.observation.count_contribution(name)

    def register(self, use: Use) -> None:
        """Add a use, and refuse the parameter when the norms of all its uses cannot be combined."""
        uses = self.uses.setdefault(use.name, [])
        late = any(earlier.done for earlier in uses)
        uses.append(use)
        if len(uses) == 1:
            return
        kinds = sorted(u.kind for u in uses)
        vectors = set(kinds) == {"vector"} and len({u.size for u in uses}) == 1 and use.size > 0
        features = self.observation.features
        if kinds == ["embedding", "linear"] and features is not None and not features.linear:
            reason = "it is embedding and head at once, and AdamW's direction of the sum is not the sum of directions"
            self.observation.refuse(use.name, reason, now=late)
        if late or not (vectors or kinds == ["embedding", "linear"]):
            self.observation.refuse(
                use.name, f"it is used {len(uses)} times in one forward pass ({', '.join(kinds)})", now=late
            )

    def partner(self, use: Use) -> Use | None:
        """The embedding that shares a head's weight."""
        return next((u for u in self.uses[use.name] if u is not use and u.kind == "embedding"), None)

    def add(self, name: str, norms_sq: Tensor) -> None:
        """Add to the squared norms [S] of a parameter."""
        norms_sq = norms_sq.to(torch.promote_types(norms_sq.dtype, torch.float32))
        known = self.norms_sq.get(name)
        self.norms_sq[name] = norms_sq if known is None else known + norms_sq

    def add_features(self, name: str, noted: Noted) -> None:
        """Add to the sketches and the dots of the samples' gradients."""
        self._noted = Noted(_sum(self._noted.sketches, noted.sketches), _sum(self._noted.dots, noted.dots))
        if noted.factored is not None:
            self._factored[name] = noted.factored + self._factored.get(name, 0.0)

    def features(self) -> tuple[Noted, dict[str, Tensor]]:
        """The sketches [S, dim] and dots [S], those of vectors among them, and each matrix's factored sketches."""
        features, noted, factored = self.observation.features, self._noted, dict(self._factored)
        for name, grads in self.partials.items() if features is not None else ():
            if features is not None and name not in self.observation.unobserved:
                found = features.of_sample_grads(name, grads)
                noted = Noted(_sum(noted.sketches, found.sketches), _sum(noted.dots, found.dots))
                if found.factored is not None:
                    factored[name] = found.factored
        return noted, factored

    def held_tensors(self) -> Iterator[tuple[str, Iterable[Tensor]]]:
        """What is kept for each parameter whose gradient is yet to be formed, in the order it came."""
        for name, uses in self.held.items():
            yield name, [t for _, held in uses for t in held.tensors()]
        if self.observation.defer and not self.accumulated:
            for name, grads in self.partials.items():
                yield name, (grads,)

    def take_held(self, name: str, selection: Selection) -> list[Tensor]:
        """The selected samples' gradients of a parameter, one for each use; what was kept for them goes."""
        found = [use.of_parameter(held.gradient(selection)) for use, held in self.held.pop(name, ())]
        if name in self.partials:
            grads = self.partials[name]
            found.append(HeldSamples(grads).gradient(selection).view(self.observation.parameter(name).shape))
        return found

    def result(self) -> dict[str, Tensor]:
        """The squared norms [S] by parameter; rounding in a cross term cannot make them negative."""
        left_out = self.observation.unobserved
        result = {name: norms_sq.clamp(min=0.0) for name, norms_sq in self.norms_sq.items() if name not in left_out}
        result |= {name: sums.square().sum(1) for name, sums in self.partials.items() if name not in left_out}
        return result


def _sum(known: Tensor | None, more: Tensor | None) -> Tensor | None:
    if known is None or more is None:
        return more if known is None else known
    return known + more.to(known.device)
