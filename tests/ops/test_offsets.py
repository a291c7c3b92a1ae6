"""Rows that lie further apart than 32 bits count are read as if they stood side by side."""

from __future__ import annotations

from collections.abc import Callable

import backends
import pytest
import torch
from torch import Tensor

import pyeff

pytestmark = backends.quiet_interpreter

FAR = 2**30 + 16

OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "gram_norms": lambda x, g, borders, impl: pyeff.gram_norms(x, g, borders, impl=impl),
    "vector_grad": lambda x, g, borders, impl: pyeff.vector_grad(g, borders, inputs=x, impl=impl).norms_sq,
    "norm_layer_grad": lambda x, g, borders, impl: pyeff.norm_layer_grad(x, g, borders, eps=1.0, impl=impl).input_grad,
    "norm_layer_grad, gain": lambda x, g, borders, impl: (
        pyeff.norm_layer_grad(x, g, borders, eps=1.0, impl=impl).weight.norms_sq
    ),
    "embedding_grad": lambda x, g, borders, impl: (
        pyeff.embedding_grad(torch.tensor([1, 0, 1], device=g.device), g, borders, 2, impl=impl).weight_grad
    ),
}


def spread(rows: Tensor) -> Tensor:
    # Memory that is reserved and never touched but for the rows themselves.
    storage = torch.UntypedStorage(2 * (FAR * (rows.shape[0] - 1) + rows.shape[1]), device=rows.device)
    view = torch.tensor([], dtype=torch.float16, device=rows.device)
    view.set_(storage, 0, rows.shape, (FAR, 1))
    return view.copy_(rows)


@backends.on_every(backends.Backend)
@pytest.mark.parametrize("name", OPERATIONS)
def test_offsets_beyond_32_bits(backend: backends.Backend, name: str) -> None:
    x, g = (torch.randn(3, 16, device=backend.device).half() for _ in range(2))
    borders, run = torch.tensor([0, 1, 3]), OPERATIONS[name]
    near = run(x, g, borders, backend.impl)
    assert torch.equal(run(spread(x), g, borders, backend.impl), near)
    assert torch.equal(run(x, spread(g), borders, backend.impl), near)
