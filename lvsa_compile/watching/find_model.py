"""The model around what is being compiled: Dynamo compiles a block while the model's forward runs, so that its call is in progress."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lvsa_compile import compat
from lvsa_compile.forward import context
from lvsa_compile.watching.inputs import ForwardInputs
from lvsa_compile.watching.watch import Watch, left_alone, tick, watch, watch_of


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a module in progress."""

    module: nn.Module
    inputs: ForwardInputs


_NOBODY: Callable[[], None] = lambda: None  # noqa: E731
_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()


def belongs_to(block: nn.Module, model: nn.Module) -> None:
    """Notes the model that a block was compiled for."""
    _owners[block] = weakref.ref(model)


@contextlib.contextmanager
def model_around() -> Iterator[None]:
    """Surroundings of a compile in which the model around it is known; from its next forward on it is followed."""
    parent = context.parent.get()
    if parent is not None:
        parent.block = _path(parent.model, _compiled_module())
        yield
        return
    found, own = find_model(), _compiled_module()
    if found is not None:
        model: Any = found.model
        parent = context.Parent(model, _path(model, own), found, first_forward=True)
    elif own is not None and (model := _owners.get(own, _NOBODY)()) is not None:
        parent = context.Parent(model, _path(model, own), called_by_others=True)
    else:
        yield
        return
    token = context.parent.set(parent)
    try:
        yield
    finally:
        context.parent.reset(token)


def find_model() -> Watch | None:
    """Finds the model around what is compiled or called, and has it followed from its next forward on; None where there is none."""
    found = _find()
    if found is None or left_alone(found.module):
        return None
    if watch_of(found.module) is None:
        tick(compat.uncompiled(found.module), found.inputs)
    return watch(found.module, ticks=True)


def follow_broken() -> None:
    """Has the forwards of the model that is compiled as a whole followed, since one of its graphs ended in a break."""
    calls, own = _calls(), _compiled_module()
    found = next((call for call in calls if _is(call.module, own)), None)
    if found is not None and context.parent.get() is None and not left_alone(found.module):
        watch(found.module, ticks=False)


def _find() -> _Call | None:
    """The call of the model around what is compiled; None where what is compiled is a whole model, or nothing is around it."""
    own = _compiled_module()
    calls = _calls()
    around = [call for call in calls if not _is(call.module, own)]
    if not around or any(_is(call.module, own) and call.inputs.timed and call.inputs.latents() for call in calls):
        return None
    complete = [call for call in around if call.inputs.timed and call.inputs.latents()]
    if complete:
        return complete[-1]
    repeated = own is not None and sum(type(module) is type(own) for module in around[0].module.modules()) > 1
    if any(_is(call.module, own) and call.inputs.timed for call in calls) and not repeated:
        return None
    timed = [call for call in around if call.inputs.timed]
    known = timed or [call for call in around if call.inputs.latents()]
    return known[0] if known and own is not None and (timed or repeated) else None


def _calls() -> list[_Call]:
    """Calls of modules in progress, outermost first, as far as the function that ``torch.compile`` returned."""
    found: list[_Call] = []
    for called, args, kwargs in compat.calls_in_progress():
        if not isinstance(called, nn.Module):
            break
        with contextlib.suppress(TypeError, ValueError):  # a forward whose signature nobody can tell
            found.append(_Call(called, ForwardInputs.of(called, args, kwargs)))
    return found


def _compiled_module() -> nn.Module | None:
    """The module whose call, forward or method is being compiled."""
    entry = compat.compiled_entry()
    owner = entry if isinstance(entry, nn.Module) else getattr(entry, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _is(module: nn.Module, own: nn.Module | None) -> bool:
    return own is not None and (module is own or compat.uncompiled(module) is own)


def _path(model: nn.Module, own: nn.Module | None) -> str:
    """Dotted path of a module in the model; "" if unknown."""
    path = next((name for name, module in model.named_modules() if module is own), "") if own is not None else ""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")
