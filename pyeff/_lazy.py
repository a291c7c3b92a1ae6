"""Packages whose names are imported at first use, because importing pyeff must cost next to nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any


def import_at_first_use(package: str, homes: Mapping[str, str], submodules: Collection[str] = ()) -> None:
    """Let `package` have the names of `homes`, each defined by the module it maps to, and its `submodules`.

    A name that is both a submodule and something which that submodule defines stands for the latter, as in
    `from pyeff.ops import linear_grad`; the module stays within reach of `import_module`.
    """
    module = sys.modules[package]
    module.__dict__["_homes"] = dict(homes)
    module.__dict__["_submodules"] = frozenset(submodules)
    module.__class__ = _LazyPackage


class _LazyPackage(ModuleType):
    _homes: dict[str, str]
    _submodules: frozenset[str]

    def __getattr__(self, name: str) -> Any:
        if name in self._homes:
            value = getattr(importlib.import_module(self._homes[name]), name)
            self.__dict__[name] = value
            return value
        if name in self._submodules:
            return importlib.import_module(f"{self.__name__}.{name}")
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a submodule's name in its package when the submodule has run.
        if isinstance(value, ModuleType) and name in self._homes:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *self._homes, *self._submodules})
