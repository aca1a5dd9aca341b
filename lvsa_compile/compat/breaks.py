"""Graph breaks: where Dynamo ended a graph, the code that runs eagerly between graphs, and the calls in progress."""

from __future__ import annotations

import collections
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lvsa_compile.compat.frames import TORCH, frames, is_entry, line_of
from lvsa_compile.compat.graphs import LIBRARIES


@dataclass(frozen=True)
class GraphBreak:
    """Why Dynamo ended a graph: the ``line`` of the user's code, Dynamo's words, the first line of them, and whether
    ``torch.set_default_device`` is on the way.
    """

    line: str
    words: str
    by_default_device: bool = False

    @property
    def why(self) -> str:
        """The first line of Dynamo's words."""
        return self.words.partition("\n")[0]

    @property
    def by_disable(self) -> bool:
        """Whether a function under ``torch.compiler.disable`` was to be called."""
        return "torch.compiler.disable" in self.words

    def names(self, function: Any) -> bool:
        """Whether Dynamo's words are about a function."""
        inner = getattr(function, "_torchdynamo_orig_callable", function)
        return any(repr(each) in self.words for each in (function, inner, getattr(inner, "__func__", inner)))


def break_of(graph_module: fx.GraphModule) -> GraphBreak | None:
    """The break that a graph ends in; None where it ends as the function does."""
    reason: Any = getattr(graph_module, "compile_subgraph_reason", None)
    if not getattr(reason, "graph_break", False):
        return None
    stack = list(reason.user_stack or ())
    own = [frame for frame in stack if not f'File "{frame.filename}'.startswith(LIBRARIES)]
    own = own or [frame for frame in stack if not frame.filename.startswith(TORCH)] or stack
    line = line_of(own[-1].filename, own[-1].lineno, own[-1].name) if own else "an unknown line"
    by_device = any(frame.filename.endswith("torch/utils/_device.py") for frame in stack)
    return GraphBreak(line, str(reason.reason).strip(), by_device)


def callables_at_break() -> list[Any]:
    """Functions, methods and modules that the code being compiled was about to call, as far as Dynamo's stack shows them."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        stack = list(InstructionTranslator.current_tx().stack)
    except AttributeError:
        return []
    found = []
    for variable in stack:
        realized = variable.realize() if hasattr(variable, "is_realized") and variable.is_realized() else variable
        if not type(realized).__name__.endswith(("FunctionVariable", "MethodVariable", "ModuleVariable")):
            continue
        held = getattr(realized, "fn", None) or getattr(realized, "value", None)
        owner = getattr(getattr(realized, "obj", None), "value", None)
        if isinstance(held, types.FunctionType) and owner is not None:
            held = types.MethodType(held, owner)
        if callable(held):
            found.append(held)
    return found


def is_disabled(function: Any) -> bool:
    """Whether a function, or the forward of a module, is under ``torch.compiler.disable``."""
    function = function.forward if isinstance(function, torch.nn.Module) else function
    return bool(getattr(function, "_torchdynamo_disable", False))


def given_up() -> list[tuple[types.CodeType, Mapping[str, Any]]]:
    """Functions around the one being compiled that Dynamo gave up, so that they run eagerly: code and names, outermost first."""
    from torch._dynamo.convert_frame import input_codes, output_codes

    frames = [frame for frame in reversed(_frames_up_to_entry()) if not frame.f_code.co_filename.startswith(TORCH)]
    eager = [frame for frame in frames if frame.f_code in input_codes and frame.f_code not in output_codes]
    return [(frame.f_code, collections.ChainMap(frame.f_locals, frame.f_globals)) for frame in eager]


def was_given_up(code: types.CodeType) -> bool:
    """Whether Dynamo tried a function's code and compiled nothing of it, so that it ran eagerly; False of what it compiles just now."""
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        now = InstructionTranslator.current_tx().output.root_tx.f_code
    except AttributeError:
        now = None
    return code is not now and code in input_codes and not _debug_get_cache_entry_list(code)


def calls_in_progress() -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What is being called, with its arguments, outermost first: modules, and the functions that ``torch.compile`` returned."""
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    for frame in frames():
        name, scope = frame.f_code.co_name, frame.f_locals if frame.f_code.co_filename.startswith(TORCH) else {}
        if name in ("_call_impl", "_wrapped_call_impl", "compile_wrapper") and "args" in scope:
            called = scope.get("fn") if name == "compile_wrapper" else scope.get("self")
            found.append((called, tuple(scope["args"]), dict(scope.get("kwargs") or {})))
    return found[::-1]


def innermost_module() -> Any:
    """The innermost module whose call is in progress; None where there is none."""
    for frame in frames():
        if frame.f_code.co_name == "_call_impl" and frame.f_code.co_filename.startswith(TORCH):
            return frame.f_locals.get("self")
    return None


def _frames_up_to_entry() -> list[types.FrameType]:
    """Frames below the compiled function that the user called, innermost first."""
    found = list(frames())
    entries = [number for number, frame in enumerate(found) if is_entry(frame)]
    return found[: entries[-1] + 1] if entries else []
