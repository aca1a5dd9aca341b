"""The model around what is being compiled: Dynamo compiles a block while the model's forward runs, so that its call is in progress."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lvsa_compile import compat
from lvsa_compile.errors import RegionError
from lvsa_compile.forward import context
from lvsa_compile.forward.clock import clock_input_before, size_of_video
from lvsa_compile.forward.labels import watched_forward
from lvsa_compile.forward.timestep_names import timestep_among
from lvsa_compile.watching.eager_call import Attend
from lvsa_compile.watching.inputs import ForwardInputs
from lvsa_compile.watching.watch import Watch, left_alone, tick, timestep_of, watch, watch_of


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a module in progress."""

    module: nn.Module
    inputs: ForwardInputs


_NOBODY: Callable[[], None] = lambda: None  # noqa: E731
_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()


def denoisers_in(model: object, function: str) -> list[nn.Module]:
    """The denoisers in a module, or in the modules that an object holds: outermost modules whose forward names a timestep.

    A module in which none does stands for itself.

    Raises:
        RegionError: ``model`` is no module and holds no denoiser; names ``function``, which was called with it.
    """
    found = _denoisers(model)
    if not found:
        problem = "neither a module nor an object that holds one whose forward gets a timestep"
        raise RegionError("model", type(model).__name__, problem, "Give the transformer, such as pipe.transformer.", function)
    return found


def _denoisers(model: object) -> list[nn.Module]:
    if isinstance(model, nn.Module):
        whole: Any = compat.uncompiled(model)
        return [next((module for module in whole.modules() if is_timed(module)), whole)]
    components = getattr(model, "components", None)
    held = components.values() if isinstance(components, Mapping) else getattr(model, "__dict__", {}).values()
    modules = dict.fromkeys(compat.uncompiled(each) for each in held if isinstance(each, nn.Module))
    return [found for module in modules for found in _denoisers(module) if is_timed(found)]


def is_timed(module: nn.Module) -> bool:
    """Whether the forward of a module names a timestep."""
    return timestep_among(compat.parameter_names(type(module))) is not None


def belongs_to(block: nn.Module, model: nn.Module) -> None:
    """Notes the model that a block was compiled for."""
    _owners[block] = weakref.ref(model)


@contextlib.contextmanager
def model_around(attend: Attend | None) -> Iterator[None]:
    """Surroundings of a compile in which the model around it is known; from its next forward on it is followed.

    ``attend`` compiles attention of the model that no graph holds.
    """
    parent, watched = context.parent.get(), watched_forward.get()
    if watched is not None:
        watched.attend_by(attend)
    if parent is not None:
        parent.block = path_in(parent.model, _compiled_module())
        yield
        return
    found, own = find_model(attend), _compiled_module()
    if found is not None:
        model: Any = found.model
        parent = context.Parent(model, path_in(model, own), found, first_forward=True)
    elif own is not None and (model := _owners.get(own, _NOBODY)()) is not None:
        parent = context.Parent(model, path_in(model, own), called_by_others=True)
    else:
        yield
        return
    token = context.parent.set(parent)
    try:
        yield
    finally:
        context.parent.reset(token)


def find_model(attend: Attend | None) -> Watch | None:
    """Finds the model around what is compiled or called, and has it followed from its next forward on; None where there is none."""
    found = _find()
    if found is None or left_alone(found.module):
        return None
    if watch_of(found.module) is None:
        _tick(found)
    return watch(found.module, ticks=True, attend=attend)


_LOOKING = 16
"""Forwards in which it is looked for attention that no graph holds; caches may skip all of it for some."""


def follow_broken(attend: Attend | None, unseen: str, only_looking: bool) -> bool:
    """Has the forwards of the model that is compiled as a whole followed, since one of its graphs ended in a break; whether it can.

    ``unseen`` is what the user is warned of where the next forward shows no attention; ``only_looking`` has them followed only once one
    shows attention that no graph holds.
    """
    calls, own = _calls(), _compiled_module()
    found = next((call for call in calls if _is(call.module, own)), None)
    if found is None or context.parent.get() is not None or left_alone(found.module):
        return False
    before = watch_of(found.module)
    begins = (before is None or before.looking) and not only_looking
    if begins and found.inputs.timed and not clock_input_before(compat.uncompiled(found.module), ""):
        _tick(found)  # as no graph has in this forward
    present = watch(found.module, ticks=False, attend=attend, looking=_LOOKING if only_looking else 0)
    present.unseen = present.unseen or unseen
    return True


def _tick(call: _Call) -> None:
    """Moves the clock of the model whose call is in progress."""
    tick(compat.uncompiled(call.module), timestep_of(call.inputs), size_of_video(call.inputs.leaves))


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


def path_in(model: nn.Module, own: nn.Module | None) -> str:
    """Dotted path of a module in the model; "" if unknown."""
    path = next((name for name, module in model.named_modules() if module is own), "") if own is not None else ""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")
