"""Python functions and the arguments of calls."""

from __future__ import annotations

import collections
import dis
import inspect
import itertools
import sys
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from lvsa_compile.compat.frames import TORCH, line_of


class EagerAttention:
    """Lines of Python, other than torch's own and graphs, that call ``scaled_dot_product_attention`` while it is active.

    It does not look while Dynamo compiles, which is slow under a profile and calls no attention.
    """

    def __init__(self) -> None:
        self.lines: collections.Counter[str] = collections.Counter()
        self._inside = 0

    def __enter__(self) -> EagerAttention:
        from torch._dynamo.callback import callback_handler

        self._before, self._thread = sys.getprofile(), threading.get_ident()
        callback_handler.register_start_callback(self._rest)
        callback_handler.register_end_callback(self._look)
        self._look()
        return self

    def __exit__(self, *error: Any) -> None:
        from torch._dynamo.callback import callback_handler

        callback_handler.remove_start_callback(self._rest)
        callback_handler.remove_end_callback(self._look)
        self._rest()

    def _look(self, *_: Any) -> None:
        if threading.get_ident() == self._thread:
            sys.setprofile(self._note)

    def _rest(self, *_: Any) -> None:
        if threading.get_ident() == self._thread:
            sys.setprofile(self._before)

    def _note(self, frame: types.FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called is torch.nn.functional.scaled_dot_product_attention and not self._inside:
            code = frame.f_code
            if not code.co_filename.startswith((TORCH, "<")):
                self.lines[line_of(code.co_filename, frame.f_lineno, code.co_name)] += 1

    def in_graph(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A graph, whose calls are not counted."""

        def inside(*args: Any) -> Any:
            self._inside += 1
            try:
                return run(*args)
            finally:
                self._inside -= 1

        return inside


def uncompiled(function: Any) -> Any:
    """What ``torch.compile`` was given, where a function is what it returned."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def only_looks(function: Any) -> bool:
    """Whether a Python function can be seen to return None always, to assign nothing and to call nothing that writes in place."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None or code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE):
        return False
    steps = list(dis.get_instructions(code))
    returned = [
        before.argval if before.opname == "LOAD_CONST" else code
        for before, step in itertools.pairwise(steps)
        if step.opname == "RETURN_VALUE"
    ]
    returned += [step.argval for step in steps if step.opname == "RETURN_CONST"]
    writes = any(step.opname in ("STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_DEREF", "STORE_SLICE") for step in steps)
    named = any(name.endswith("_") or name in ("data", "setattr", "out") for name in code.co_names)
    return all(value is None for value in returned) and not writes and not named


def hooks_of_all_modules() -> list[Any]:
    """Forward hooks that were put on every module of the process."""
    from torch.nn.modules import module

    return [*module._global_forward_pre_hooks.values(), *module._global_forward_hooks.values()]


def named_leaves(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Names of the leaves among a method's arguments, the leaves, and their structure; see ``tree_unflatten``."""
    import torch.utils._pytree as pytree

    parameters = list(inspect.signature(function).parameters.values())[1:]
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    found, structure = pytree.tree_flatten_with_path((args, dict(kwargs)))
    names = []
    for (side, entry, *inside), _ in found:
        position = entry.idx if side.idx == 0 else None  # type: ignore[attr-defined]
        name = entry.key if position is None else plain[position] if position < len(plain) else f"args[{position}]"  # type: ignore[attr-defined]
        names.append(f"{name}{pytree.keystr(tuple(inside))}")
    return tuple(names), tuple(leaf for _, leaf in found), structure


def tree_leaves(value: Any) -> list[Any]:
    """All leaves of nested lists, tuples, dicts and the output classes of known libraries."""
    import torch.utils._pytree as pytree

    return pytree.tree_leaves(value)


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure with ``function`` of every leaf."""
    import torch.utils._pytree as pytree

    return pytree.tree_map(function, value)


def tree_unflatten(leaves: list[Any], structure: Any) -> Any:
    """The structure with other leaves."""
    import torch.utils._pytree as pytree

    return pytree.tree_unflatten(leaves, structure)
