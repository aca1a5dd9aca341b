"""Dispatch modes on the stack of this thread, and whether an op runs inside a compiled graph."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback, set_eval_frame
from torch._ops import OpOverload as OpOverload
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from lvsa_compile.compat.frames import TORCH


def push_mode(mode: TorchDispatchMode) -> None:
    """Puts a mode on the stack of this thread; unlike ``with mode:`` it touches nothing that other threads see."""
    torch._C._push_on_torch_dispatch_stack(mode)


def modes_on_stack() -> list[Any]:
    """The modes of this thread, the one that sees an op first last."""
    return [torch._C._get_dispatch_stack_at(i) for i in range(torch._C._len_torch_dispatch_stack())]


def take_mode(mode: TorchDispatchMode) -> list[Any] | None:
    """Takes a mode off the stack, wherever it is; returns the modes above it, which stay, or None where it is not on the stack."""
    if not any(each is mode for each in modes_on_stack()):
        return None
    above: list[Any] = []
    while (top := torch._C._pop_torch_dispatch_stack(None)) is not mode:
        above.append(top)
    for each in reversed(above):
        torch._C._push_on_torch_dispatch_stack(each)
    return above


@contextlib.contextmanager
def mode_on(mode: TorchDispatchMode) -> Iterator[None]:
    """Surroundings in which a mode sees the ops of this thread; however they are left, it is off the stack, and no other mode is."""
    push_mode(mode)
    try:
        yield
    finally:
        take_mode(mode)


@contextlib.contextmanager
def mode_away(mode: TorchDispatchMode) -> Iterator[None]:
    """Surroundings without a mode, which is afterwards where it was in the stack; the other modes see what runs."""
    above = take_mode(mode)
    try:
        yield
    finally:
        if above is not None:
            kept = [each for each in above if any(each is now for now in modes_on_stack())]
            for _ in kept:
                torch._C._pop_torch_dispatch_stack(None)
            for each in (mode, *reversed(kept)):
                torch._C._push_on_torch_dispatch_stack(each)


@functools.cache
def _disabled() -> types.CodeType:
    """Code of the function around every function under ``torch.compiler.disable``, Dynamo's own graphs among them."""
    code: types.CodeType = torch.compiler.disable(lambda: None).__code__
    return code


@functools.lru_cache(maxsize=4096)
def _graphs_called(code: types.CodeType) -> tuple[str, ...]:
    """Names of the graphs that code made by Dynamo calls."""
    return tuple(name for name in code.co_names if name.startswith("__compiled_fn"))


class KeepsDynamoAwayItself:
    """Of a mode: torch need not wrap its ``__torch_dispatch__`` to keep Dynamo away, which takes as long as a small op."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@functools.cache
def skip_by_dynamo(code: types.CodeType) -> None:
    """Has Dynamo not compile a function; what it calls it would."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(code)


def dynamo_away() -> Any:
    """Has Dynamo look at nothing that this thread calls; returns what ``dynamo_back`` needs, None where it looked at nothing.

    The cheapest way, for what runs at each op.
    """
    before = get_eval_frame_callback()
    if before is not None:
        set_eval_frame(None)
    return before


def dynamo_back(before: Any) -> None:
    """Has Dynamo look again at what this thread calls."""
    if before is not None:
        set_eval_frame(before)


_MOST_CODES = 4096
_EAGER_CODE = f"{TORCH}nn/modules/"
_may_run_graphs: dict[int, tuple[types.CodeType, bool]] = {}  # by identity: hashing code is slow


def _may_be_of_graph(code: types.CodeType) -> bool:
    """Whether code that calls an op may be that of a compiled graph, or be called by one: torch's own, and what compilers wrote."""
    found = _may_run_graphs.get(id(code))
    if found is None:
        if len(_may_run_graphs) >= _MOST_CODES:
            _may_run_graphs.clear()
        file = code.co_filename
        may = file.startswith("<") or "torchinductor" in file or (file.startswith(TORCH) and not file.startswith(_EAGER_CODE))
        found = _may_run_graphs[id(code)] = code, may or file.startswith(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or "<")
    return found[1]


def in_compiled_graph(end: types.CodeType | None) -> bool:
    """Whether a compiled graph, anybody's, is being run by the call in progress; looks outwards as far as a frame of the code ``end``.

    To be called by the ``__torch_dispatch__`` of a mode.
    """
    frame: types.FrameType | None = sys._getframe(2)
    if frame is not None and not _may_be_of_graph(frame.f_code):
        return False
    disabled = _disabled()
    while frame is not None and frame.f_code is not end:
        outer = frame.f_back
        if frame.f_code is disabled and outer is not None and (names := _graphs_called(outer.f_code)):
            called, scope = frame.f_locals.get("fn"), outer.f_globals
            if any(getattr(scope.get(name), "_torchdynamo_orig_callable", None) is called for name in names):
                return True
        frame = outer
    return False


@functools.lru_cache(maxsize=4096)
def is_composite(operator: OpOverload) -> bool:
    """Whether an op is made of other ops for every device, so that under ``torch.inference_mode`` it comes whole, else as those."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), torch._C.DispatchKey.CompositeImplicitAutograd)


def decomposed(operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a composite op gives, run op by op."""
    return operator.decompose(*args, **kwargs)
