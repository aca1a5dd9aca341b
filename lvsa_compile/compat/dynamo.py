"""Dynamo: the compile in progress, tracing apart from it, limits, counters and guards."""

from __future__ import annotations

import collections
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from lvsa_compile.compat.frames import frames
from lvsa_compile.compat.graphs import source_name


def trace_artifact(name: str, content: Callable[[], str]) -> None:
    """Adds a JSON artifact to torch's structured trace of this compile (``TORCH_TRACE``, tlparse); costs nothing where none is taken."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=content)


def capture_failures() -> tuple[type[Exception], ...]:
    """What Dynamo raises under ``fullgraph=True`` where it would otherwise break the graph."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, UncapturedHigherOrderOpError, Unsupported, UserError

    return Unsupported, UserError, UncapturedHigherOrderOpError, FailOnRecompileLimitHit


def is_dynamos(error: Exception) -> bool:
    """Whether an error is Dynamo's own: how it starts an analysis anew, breaks a graph, or tells a user."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def takes_recompile_limit() -> bool:
    """Whether ``torch.compile`` takes a limit of recompiles for one call."""
    return "recompile_limit" in inspect.signature(torch.compile).parameters


def lookup_backend(name: str) -> Callable[..., Any]:
    """A Dynamo backend by name."""
    from torch._dynamo.backends.registry import lookup_backend as lookup

    found: Callable[..., Any] = lookup(name)
    return found


def reset_with_dynamo(backend: Callable[..., Any]) -> None:
    """Has ``torch._dynamo.reset()`` call ``backend.reset``, as it does where Dynamo has called the backend."""
    from torch._dynamo.eval_frame import cached_backends

    cached_backends.setdefault(id(backend), backend)


def compiled_apart(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    """``torch.compile(function)`` under a code object of its own, so that its compiles are counted by themselves."""
    scope: dict[str, Any] = {"function": function}
    exec(compile("def call(*args, **kwargs):\n    return function(*args, **kwargs)\n", f"<lvsa {next(_apart)}>", "exec"), scope)
    compiled: Callable[..., Any] = torch.compile(scope["call"], dynamic=False, **more)
    return compiled


def trace_apart(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile(function, backend)`` that leaves no trace on what ``function`` calls.

    The outermost code object is new at every call, and where torch can keep a call's compiles in a cache of their own, it does, so
    that graph breaks inside a model take nothing from the model's own compile budget.
    """
    isolated = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    compiled = compiled_apart(function, backend=backend, **isolated)

    def run(*args: Any, **kwargs: Any) -> Any:
        import torch._dynamo.pgo as pgo

        remembered = dict(pgo.get_code_state())  # sizes seen, by which later compiles choose what is dynamic
        try:
            return compiled(*args, **kwargs)
        finally:
            state = pgo.get_code_state()
            for code in [code for code in state if code not in remembered]:
                del state[code]

    return run


_apart = itertools.count()


def compile_id() -> str:
    """The compile in progress as torch's logs name it ("0/1"), or "-" outside one."""
    from torch._guards import CompileContext

    return str(CompileContext.current_compile_id() or "-")


def compiles_of_this_code() -> int:
    """How often the code object being compiled has been compiled before."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return current.frame_compile_id or 0 if current is not None else 0


def recompile_reason() -> str:
    """What changed since the code being compiled was compiled last, in Dynamo's words; "" where it is compiled for the first time."""
    compiles = (frame.f_locals for frame in frames() if frame.f_code.co_name == "_compile" and "recompile_reason" in frame.f_locals)
    reason = next((scope["recompile_reason"] for scope in compiles), None)
    return " ".join(str(reason or "").partition(": ")[2].split())


def recompile_limit() -> int:
    """Compiles of one code object after which Dynamo runs new sizes in eager mode."""
    import torch._dynamo.config as config

    limit: int = config.recompile_limit
    return limit


def is_last_compile() -> bool:
    """Whether the compile in progress is the last of its code that Dynamo's limit allows."""
    return compiles_of_this_code() + 1 >= recompile_limit()


def counters() -> collections.Counter[str]:
    """``torch._dynamo.utils.counters["lvsa"]``, the usual place for counts of a backend."""
    from torch._dynamo.utils import counters as all_counters

    return all_counters["lvsa"]


def compiling_ahead() -> bool:
    """Whether ``torch.compile(...).forward.aot_compile(...)`` is at work, which saves what a backend returns."""
    return any(frame.f_code.co_name == "aot_compile_fullgraph" for frame in frames())


def root_scope() -> dict[str, Any]:
    """Names in the function being compiled, locals over globals (``self`` is the model where its forward is compiled)."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # no compile in progress: current_tx is unset, or None
        return {}
    return {**output.global_scope, **output.local_scope}


def argument_scope() -> dict[str, Any]:
    """Names in the function being compiled that are its own: arguments and other locals."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return dict(InstructionTranslator.current_tx().output.local_scope)
    except AttributeError:
        return {}


def guard_self(holds: Callable[[Any], bool], text: str) -> None:
    """Adds a Dynamo guard on the object whose method is compiled, as ``guard_input`` on an input; without one it does nothing."""
    from torch._dynamo.source import LocalSource

    _guard(LocalSource("self") if "self" in argument_scope() else None, holds, text)


def guard_input(node: fx.Node, holds: Callable[[Tensor], bool], text: str) -> None:
    """Adds a Dynamo guard on the input behind a placeholder: the code is compiled again once ``holds(input)`` is false."""
    _guard(getattr(node, "_dynamo_source", None), holds, text)


def guard_together(nodes: Sequence[fx.Node], axes: Sequence[int | None], holds: Callable[..., bool], text: str) -> None:
    """Adds a Dynamo guard on several inputs at once: ``holds`` gets the input of each node, or the size of an axis of it."""
    from torch._guards import Guard, TracingContext

    sources: list[Any] = [getattr(node, "_dynamo_source", None) for node in nodes]
    context = TracingContext.try_get()
    if context is None or not all(sources):
        return
    name = f"___lvsa_{next(_apart)}"
    values = [source_name(source) + ("" if axis is None else f".size()[{axis}]") for source, axis in zip(sources, axes, strict=True)]
    code = f"{name}({', '.join(values)})"

    def create(builder: Any, guard: Any) -> None:
        builder.add_python_lambda_leaf_guard_to_root([code], [f"lvsa: {guard.name} {text}"], {**_closure_of_guards(), name: holds})

    context.guards_context.dynamo_guards.add(Guard(sources[0], create))


def _closure_of_guards() -> dict[str, Any]:
    from torch._dynamo.guards import _get_closure_vars

    return dict(_get_closure_vars())


def _guard(source: Any, holds: Callable[[Any], bool], text: str) -> None:
    from torch._guards import Guard, TracingContext

    context = TracingContext.try_get()
    if context is None or source is None:
        return

    def create(builder: Any, guard: Any) -> None:
        builder.get_guard_manager(guard).add_lambda_guard(holds, [f"lvsa: {guard.name} {text}"], guard.user_stack)

    context.guards_context.dynamo_guards.add(Guard(source, create))
