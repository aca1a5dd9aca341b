"""Modules as Dynamo and ``torch.nn`` hold them: paths in a graph's metadata, what a compile began with, calls and hooks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from lvsa_compile.compat.frames import frames, is_entry


def compiled_entry() -> Any:
    """The function the user called, compiled, to which the graph being compiled belongs; None if unknown.

    After a graph break the pieces of a model are compiled one by one, all below the same entry.
    """
    entry = None
    for frame in frames():
        if is_entry(frame):
            entry = frame.f_locals.get("fn", entry)
    return entry


def resumes() -> bool:
    """Whether the code being compiled is what Dynamo made of a function after a graph break."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().f_code.co_name.startswith("torch_dynamo_resume_in")
    except AttributeError:
        return False


def ends_in_break(graph_module: fx.GraphModule) -> bool:
    """Whether a graph ends in a graph break."""
    return bool(getattr(getattr(graph_module, "compile_subgraph_reason", None), "graph_break", False))


def module_stack(node: fx.Node) -> list[tuple[str, Any]]:
    """Path, as Dynamo writes it, and class of the modules that a node was traced in, outermost first."""
    return list((node.meta.get("nn_module_stack") or {}).values())


def path_parts(path: str) -> list[str]:
    """``L['self'].__dict__['_modules']['blocks'].0.attn1`` as ``["self", "blocks", "0", "attn1"]``."""
    parts = re.findall(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)", path)
    names = ["".join(part) for part in parts]
    return [name for name in names if name not in ("__dict__", "_modules", "_parameters", "__self__")]


def modules_along(scope: Mapping[str, Any], path: str) -> list[torch.nn.Module]:
    """The modules on the way along a path in the scope of the function being compiled."""
    current: Any = scope
    found: list[torch.nn.Module] = []
    for name in path_parts(path):
        current = _inside(getattr(current, "__self__", current), name)
        if isinstance(current, torch.nn.Module):
            found.append(current)
    return found


def _inside(value: Any, name: str) -> Any:
    """What an object holds under a name or a number of a path; None where there is nothing."""
    if isinstance(value, torch.nn.Module) and name in value._modules:
        return value._modules[name]
    if isinstance(value, Mapping):
        return value.get(name)
    if isinstance(value, (list, tuple)) and name.isdigit():
        return value[int(name)] if int(name) < len(value) else None
    return getattr(value, name, None)


def holds_parameter(module: torch.nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter is one of a module's own."""
    return any(held is parameter for held in module._parameters.values())


def uncompiled(module: Any) -> Any:
    """The module that ``torch.compile`` wrapped; any other one as it is."""
    return getattr(module, "_orig_mod", module)


def parameter_names(module_class: type) -> tuple[str, ...]:
    """Names of all parameters of a module's forward."""
    return tuple(_parameters(module_class))


def required_parameters(module_class: type) -> tuple[str, ...]:
    """Names of the parameters that a module's forward cannot do without."""
    return tuple(name for name, parameter in _parameters(module_class).items() if parameter.default is inspect.Parameter.empty)


def _parameters(module_class: type) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(module_class.forward).parameters  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return {}


def plain_call(module: torch.nn.Module) -> Callable[..., Any]:
    """A module's call with its hooks, past a compiled call that it may have."""
    return module._call_impl


_hooks_of: WeakIdKeyDictionary = WeakIdKeyDictionary()


def forward_hooks(module: torch.nn.Module) -> tuple[int, ...]:
    """Identities of the forward hooks of a module and of those in it, which Dynamo compiles with it and does not guard."""
    held = _hooks_of.get(module)
    if held is None:
        held = _hooks_of[module] = [hooks for each in module.modules() for hooks in (each._forward_pre_hooks, each._forward_hooks)]
    return tuple([id(hook) for hooks in held if hooks for hook in hooks.values()])


def compiled_call(module: torch.nn.Module) -> Callable[..., Any] | None:
    """Where a module's calls go, as ``module.compile()`` has it; None where they go to the module itself."""
    return vars(module).get("_compiled_call_impl")


def set_compiled_call(module: torch.nn.Module, call: Callable[..., Any] | None) -> None:
    """Has a module's calls go to ``call``; copies and pickles of the module know nothing of it."""
    if call is None:
        vars(module).pop("_compiled_call_impl", None)
    else:
        vars(module)["_compiled_call_impl"] = call
