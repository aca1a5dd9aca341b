"""Reads a setting of a model, whatever kind of object holds its config: dicts, dataclasses, pydantic, omegaconf, class attributes."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lvsa_compile.horizons import Read, Unreadable

_CONFIGS = ("config", "cfg", "model_config", "arch_config", "hparams", "params", "args")
"""Attributes of a model that hold its settings."""
_DEPTH = 2
_MISSING: Any = object()
_NOBODYS = "a_setting_that_no_model_has"
_PLAIN = (int, float, str, type(None))
_NO_CONFIG = (*_PLAIN, bytes, Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def reader(model: Any) -> Read:
    """Reads settings of ``model``: from its configs and attributes, which must agree, else from configs inside its configs."""

    def read(names: Sequence[str]) -> Any:
        configs = [config for name in _CONFIGS if (config := _attribute(model, name)) is not _MISSING and _is_config(config)]
        attributes = [vars(model) if model is not None else {}, *(vars(kind) for kind in type(model).__mro__)]
        for level in ([*configs, *attributes], *_inside(configs)):
            found = [value for holder in level for name in names if isinstance(value := _entry(holder, name), _PLAIN)]
            if found:
                if any(value != found[0] for value in found):
                    break
                return found[0]
        raise Unreadable(" or ".join(names))

    return read


def _inside(configs: list[Any]) -> Iterator[list[Any]]:
    """The configs inside some, then those inside these, and so on."""
    for _ in range(_DEPTH):
        configs = [inside for config in configs for inside in _values(config) if _is_config(inside)]
        yield configs


def _is_config(value: Any) -> bool:
    return not isinstance(value, (*_NO_CONFIG, list, set, frozenset)) and type(value) is not tuple


def _entry(holder: Any, name: str) -> Any:
    """What an object holds under a name, as an item or as an attribute of any kind."""
    if isinstance(holder, Mapping):
        return _attempt(lambda: holder.get(name, _MISSING))
    if _attribute(holder, _NOBODYS) is not _MISSING:  # it answers whatever it is asked, so that an answer says nothing
        return _attempt(lambda: object.__getattribute__(holder, name))
    return _attribute(holder, name)


def _attribute(holder: Any, name: str) -> Any:
    return _attempt(lambda: getattr(holder, name, _MISSING))


def _values(config: Any) -> list[Any]:
    """All that a config holds, as far as it can be listed."""
    if isinstance(config, Mapping):
        names: list[Any] = _attempt(lambda: list(config))
        return [] if names is _MISSING else [_entry(config, name) for name in names]
    own = getattr(config, "__dict__", {})
    names = [*own, *getattr(type(config), "__slots__", ()), *(name for kind in type(config).__mro__[:-1] for name in vars(kind))]
    return [_attribute(config, name) for name in dict.fromkeys(names) if isinstance(name, str) and not name.startswith("__")]


def _attempt(get: Callable[[], Any]) -> Any:
    """What ``get`` returns; a config that cannot say, whatever it raises, holds nothing."""
    try:
        return get()
    except Exception:
        return _MISSING
