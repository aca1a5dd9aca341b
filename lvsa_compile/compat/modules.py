"""The module that is compiled, those around a node, and the one around a block."""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import inspect
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from lvsa_compile.compat.dynamo import argument_scope, root_scope


def module_path(node: fx.Node) -> str:
    """Dotted path of the module a node was traced in, from the root of the compile; "" if unknown.

    The place of a block that is compiled for all of its kind is ``*``: ``blocks.*.attn1``.
    """
    stack, around = node.meta.get("nn_module_stack"), parent.get()
    inside = _path_parts(list(stack.values())[-1][0])[1:] if stack else []
    block = ["*" if part.isdigit() else part for part in around.block.split(".")] if around is not None else []
    return ".".join([*block, *inside])


def compiled_entry() -> Any:
    """The function the user called, compiled, to which the graph being compiled belongs; None if unknown.

    After a graph break the pieces of a model are compiled one by one, all below the same entry.
    """
    frame: types.FrameType | None = sys._getframe()
    entry = None
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.endswith("eval_frame.py"):
            entry = frame.f_locals.get("fn", entry)
        frame = frame.f_back
    return entry


@dataclasses.dataclass
class Parent:
    """The model around a block that is compiled by itself.

    ``block`` is the path of the block that is called, ``problem`` says why nothing is known of what it gets, ``hooks`` are its
    own (Dynamo does not look whether another block of its class has others), and ``token`` is one object per forward.
    ``called_by_others`` says that the block is called while the model's forward is not.
    """

    model: Any
    block: str = ""
    hooks: tuple[int, ...] = ()
    token: object = dataclasses.field(default_factory=object)
    problem: str = ""
    called_by_others: bool = False


parent: contextvars.ContextVar[Parent | None] = contextvars.ContextVar("lvsa_parent", default=None)
"""The model whose blocks are compiled one by one, while its forward runs."""


def hooks_around() -> tuple[int, ...]:
    """The hooks of the block that is called by itself."""
    around = parent.get()
    return around.hooks if around is not None else ()


def root_module() -> Any:
    """The module the user compiled, else the one whose forward is being compiled, or None."""
    if (around := parent.get()) is not None:
        return around.model
    scope, entry = root_scope(), compiled_entry()
    function = scope.get("function")  # what ``trace_apart`` calls
    found = (entry, getattr(entry, "__self__", None), function, getattr(function, "__self__", None), scope.get("self"))
    return next((module for module in found if isinstance(module, torch.nn.Module)), None)


def model_holding(parameter: Tensor, source: str) -> torch.nn.Module | None:
    """The outermost module on the way to a parameter, while compiled code is called: by names of the function that called it."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        along = _along(collections.ChainMap(frame.f_locals, frame.f_globals), source)
        if along and any(held is parameter for held in along[-1]._parameters.values()):
            return along[0]
        frame = frame.f_back
    return None


def is_whole_of_compiled() -> bool:
    """Whether the graph begins where the compiled module begins, rather than after a graph break."""
    scope = root_scope()
    return scope.get("self") is not None and scope.get("self") is root_module() and not _resumes()


def place_in_forward(graph_module: fx.GraphModule) -> tuple[bool, bool, bool]:
    """Whether the graph being compiled continues an earlier one of the same forward, another one may follow it, and it ends in a break."""
    scope, entry = root_scope(), compiled_entry()
    root = root_module()
    at_root = scope.get("self") is root if root is not None and "function" not in scope else True
    continues = _resumes() or (bool(scope) and entry is not None and not at_root)
    breaks = getattr(getattr(graph_module, "compile_subgraph_reason", None), "graph_break", False)
    return continues, continues or bool(breaks), bool(breaks)


def _resumes() -> bool:
    """Whether the code being compiled is what Dynamo made of a function after a graph break."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().f_code.co_name.startswith("torch_dynamo_resume_in")
    except AttributeError:
        return False


def modules_around(node: fx.Node) -> list[tuple[type, Any]]:
    """Classes of the modules that a node was traced in, outermost first, each with the module where it can be reached, else None."""
    scope, root = root_scope(), root_module()
    found: list[tuple[type, Any]] = [] if root is None else [(type(root), root)]
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        along = _along(scope, path)
        found.extend((type(module), module) for module in along)
        if isinstance(kind, type) and not (along and type(along[-1]) is kind):
            found.append((kind, None))
    return found


def required_parameters(module_class: type) -> tuple[str, ...]:
    """Names of the parameters that a module's forward cannot do without."""
    try:
        parameters = inspect.signature(module_class.forward).parameters  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return ()
    return tuple(name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty)


def modules_among_arguments() -> list[torch.nn.Module]:
    """Modules that the arguments of the function being compiled are or hold, for a function that is called with a model."""
    values = list(argument_scope().values())
    return [each for value in values for each in (value, *_held_by(value)) if isinstance(each, torch.nn.Module)]


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    return list((value if isinstance(value, Mapping) else getattr(value, "__dict__", {})).values())


def _path_parts(path: str) -> list[str]:
    """``L['self'].__dict__['_modules']['blocks'].0.attn1`` as ``["self", "blocks", "0", "attn1"]``."""
    import re

    parts = re.findall(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)", path)
    names = ["".join(part) for part in parts]
    return [name for name in names if name not in ("__dict__", "_modules", "_parameters", "__self__")]


def _along(scope: Mapping[str, Any], path: str) -> list[torch.nn.Module]:
    """The modules on the way along a path in the scope of the function being compiled."""
    current: Any = scope
    found: list[torch.nn.Module] = []
    for name in _path_parts(path):
        current = _inside(getattr(current, "__self__", current), name)
        if isinstance(current, torch.nn.Module):
            found.append(current)
    return found


def _inside(value: Any, name: str) -> Any:
    """What an object holds under a name or a place of a path; None where there is nothing."""
    if isinstance(value, torch.nn.Module) and name in value._modules:
        return value._modules[name]
    if isinstance(value, Mapping):
        return value.get(name)
    if isinstance(value, (list, tuple)) and name.isdigit():
        return value[int(name)] if int(name) < len(value) else None
    return getattr(value, name, None)
