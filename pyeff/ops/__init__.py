"""The operations: functions of tensors, each with several implementations and one meaning.

Eagerly imported so that `pyeff.ops.f` is the function and not the module that defines it; a module of an operation
loads torch and nothing heavier.
"""

from __future__ import annotations

from pyeff.ops._dispatch import Operation

OPERATIONS: dict[str, Operation] = {}
