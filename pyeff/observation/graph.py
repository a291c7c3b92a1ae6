"""Finds parameters whose gradient comes, wholly or in part, from something that is not observed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from pyeff.observation.layers import PARAMETER_INPUTS

# Nodes that hand an observed layer's gradient on to the parameter: casts, transposes, shifts by a number and the like.
_CASTS, _SHIFTS = ("ToCopy", "Alias"), ("Add", "Mul")
_VIEWS = ("T", "Transpose", "Permute", "Slice", "Select", "Unsqueeze", "View", "UnsafeView")
_ALIASES = frozenset(f"{name}Backward{number}" for name in (*_CASTS, *_SHIFTS, *_VIEWS) for number in (0, 1))


def unobserved_uses(
    roots: Iterable[Any], parameters: Mapping[int, tuple[str, nn.Parameter]]
) -> tuple[dict[str, str], set[int]]:
    """Name -> node, for each parameter that a node other than an observed layer's reaches below `roots` (grad_fns).

    Beside them the ids of the other tensors that get a gradient.

    Cost: one visit of each node of the graph, about a microsecond each.
    """
    users: dict[Any, list[tuple[Any, int]]] = {}
    leaves: list[tuple[str, Any]] = []
    others: set[int] = set()
    seen = set()
    stack = [node for node in roots if node is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for slot, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            known = users.get(child)
            if known is None:
                users[child] = [(node, slot)]
                variable = getattr(child, "variable", None)
                if variable is None:
                    stack.append(child)
                elif id(variable) in parameters:
                    leaves.append((parameters[id(variable)][0], child))
                else:
                    others.add(id(variable))
            else:
                known.append((node, slot))
    found = {}
    for name, leaf in leaves:
        reached, offenders = [leaf], []
        while reached:
            for node, slot in users.get(reached.pop(), ()):
                if slot in PARAMETER_INPUTS.get(getattr(node, "_forward_cls", None), ()):
                    continue
                if node.name() in _ALIASES and sum(child is not None for child, _ in node.next_functions) == 1:
                    reached.append(node)
                else:
                    offenders.append(node.name())
        if offenders:
            found[name] = f"it enters {offenders[0]}, which is not observed"
    return found, others


def grad_fns(tensors: Iterable[Any]) -> list[Any]:
    """The nodes of tensors or gradient edges."""
    return [t.grad_fn if isinstance(t, Tensor) else getattr(t, "node", None) for t in tensors]
