"""Python functions and the arguments of calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

_Function = TypeVar("_Function", bound=Callable[..., Any])


def not_compiled(function: _Function) -> _Function:
    """A function that Dynamo never compiles, and nothing below it; imports nothing before it is called."""
    from torch._compile import _disable_dynamo

    guarded: Any = _disable_dynamo(function)
    return cast("_Function", guarded)


def named_leaves(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Names of the leaves among a method's arguments, such as ``hidden_states`` and ``latents[0]``, and the leaves."""
    import torch.utils._pytree as pytree

    plain = _named_by_position(function)
    given = [(plain[i] if i < len(plain) else f"args[{i}]", value) for i, value in enumerate(args)]
    names, leaves = [], []
    for name, value in (*given, *kwargs.items()):
        if value is None or isinstance(value, (torch.Tensor, int, float, str)):
            names.append(name)
            leaves.append(value)
            continue
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            names.append(f"{name}{pytree.keystr(path)}")
            leaves.append(leaf)
    return tuple(names), tuple(leaves)


@functools.lru_cache(maxsize=256)
def _named_by_position(method: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def tree_leaves(value: Any) -> list[Any]:
    """All leaves of nested lists, tuples, dicts and the output classes of known libraries."""
    import torch.utils._pytree as pytree

    return pytree.tree_leaves(value)
