"""Stand-ins for packages that a host imports and that its Wan transformer does not need on a CPU."""

from __future__ import annotations

import abc
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import pytest


class _Anything(abc.ABCMeta):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


class _Base(metaclass=_Anything):
    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __init_subclass__(cls, **kwargs: object) -> None: ...

    def __class_getitem__(cls, item: object) -> type:
        return cls

    def __call__(self, *args: Any, **kwargs: object) -> Any:
        return args[0] if args and callable(args[0]) else None


class _StandIn(types.ModuleType):
    """A module that has every name: classes for capitalised ones, None for constants, functions that do nothing for others."""

    real: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self.__name__}.{name}"
        if path in self.real:
            value = self.real[path]
        elif path in sys.modules:
            value = sys.modules[path]
        elif name.isupper():
            value = None
        else:
            value = _Anything(name, (_Base,), {"__module__": self.__name__}) if name[0].isupper() else lambda *args, **kwargs: None
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, roots: tuple[str, ...], real: dict[str, Any]) -> None:
        self.roots, self.real = roots, real

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.roots else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _StandIn(spec.name)
        module.__path__, module.real = [], self.real
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...


def needs(host: str) -> str:
    """The folder of a host's package; without it the tests of a file are skipped, and nothing is stood in for."""
    spec = importlib.util.find_spec(host)
    if spec is None:
        pytest.skip(f"{host} is not installed: make test-hosts", allow_module_level=True)
    return spec.submodule_search_locations[0]


def stand_in(*packages: str, real: dict[str, Any] | None = None) -> None:
    """Has packages that are not installed importable; ``real`` holds, by dotted path, what they must really have."""
    sys.meta_path.append(_Finder(packages, real or {}))


def package(name: str, path: str) -> types.ModuleType:
    """A package of which the ``__init__`` is not run, so that its modules can be imported one by one."""
    module = types.ModuleType(name)
    module.__path__, module.__spec__ = [path], importlib.machinery.ModuleSpec(name, None, is_package=True)
    sys.modules[name] = module
    return module
