"""Where the code that runs or is compiled stands in a forward: the model, the block that is called, the graphs before and after."""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import itertools
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from lvsa_compile import compat


@dataclasses.dataclass
class Parent:
    """The model around a block that is compiled by itself.

    ``block`` is the path of the block that is being compiled, ``problem`` says why nothing is known of what it gets, and ``token`` is
    one object per forward.  ``called_by_others`` says that the block is called while the model's forward is not, ``first_forward`` that
    the forward had begun before the model was found.  ``ticks`` says that no graph of the model as a whole moves the clock, ``ticked``
    that it has moved in this forward; ``timestep`` is the name and the value of the input that tells the step, None where none is
    named so, and ``size`` that of the video, None where no input shows it.  ``unconfirmed`` says
    that no output has shown yet which of several videos is generated: attention is dense until one has.  ``times`` counts what is called
    in this forward, ``given`` says which first frames of a video were seen in it to attend only each other.
    """

    model: Any
    block: str = ""
    token: object = dataclasses.field(default_factory=object)
    problem: str = ""
    called_by_others: bool = False
    first_forward: bool = False
    ticks: bool = True
    ticked: bool = False
    timestep: tuple[str, Tensor] | None = None
    size: Hashable = None
    unconfirmed: bool = False
    given: frozenset[Any] = frozenset()
    times: collections.Counter[Hashable] = dataclasses.field(default_factory=collections.Counter)

    def time(self, called: Hashable) -> int:
        """How often ``called`` was called before in this forward; this is one more call."""
        self.times[called] += 1
        return self.times[called] - 1


parent: contextvars.ContextVar[Parent | None] = contextvars.ContextVar("lvsa_parent", default=None)
"""The model whose blocks are compiled one by one, while its forward runs."""


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a graph stands in a forward.

    Whether it ``continues`` an earlier graph, whether another one may follow (``leads_on``), and whether it ends in a graph break.
    """

    continues: bool = False
    leads_on: bool = False
    breaks: bool = False


def root_module() -> Any:
    """The module the user compiled, else the one whose forward is being compiled, or None."""
    if (around := parent.get()) is not None:
        return around.model
    scope, entry = compat.root_scope(), compat.compiled_entry()
    function = scope.get("function")  # what ``trace_apart`` calls
    found = (entry, getattr(entry, "__self__", None), function, getattr(function, "__self__", None), scope.get("self"))
    return next((module for module in found if isinstance(module, nn.Module)), None)


def model_holding(parameter: Tensor, source: str) -> nn.Module | None:
    """The outermost module on the way to a parameter, while compiled code is called: by names of the function that called it."""
    for frame in compat.frames():
        along = compat.modules_along(collections.ChainMap(frame.f_locals, frame.f_globals), source)
        if along and compat.holds_parameter(along[-1], parameter):
            return along[0]
    return None


_numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of modules, and of parameters whose module is known
_next_number = itertools.count(1)


def number_of(module: object) -> int:
    """A number for a module, the same as long as it lives; 0 where there is none."""
    if module is None:
        return 0
    if module not in _numbers:
        _numbers[module] = next(_next_number)
    return int(_numbers[module])


def module_number(parameter: Tensor, source: str) -> int:
    """A number for the module that holds a parameter, the same as long as the module lives, whatever parameter it holds.

    Where no module is found, a number for the parameter itself.
    """
    number = _numbers.get(parameter)
    if number is None:
        holders = (compat.modules_along(collections.ChainMap(f.f_locals, f.f_globals), source) for f in compat.frames())
        module = next((along[-1] for along in holders if along and compat.holds_parameter(along[-1], parameter)), None)
        number = _numbers[parameter] = number_of(parameter if module is None else module)
    return int(number)


def is_whole_of_compiled() -> bool:
    """Whether the graph begins where the compiled module begins, rather than after a graph break."""
    scope = compat.root_scope()
    return scope.get("self") is not None and scope.get("self") is root_module() and not compat.resumes()


def position_of(graph_module: fx.GraphModule) -> Position:
    """Where the graph being compiled stands in its forward."""
    scope, entry = compat.root_scope(), compat.compiled_entry()
    root = root_module()
    at_root = scope.get("self") is root if root is not None and "function" not in scope else True
    continues = compat.resumes() or (bool(scope) and entry is not None and not at_root) or bool(compat.given_up())
    breaks = compat.ends_in_break(graph_module)
    return Position(continues, continues or breaks, breaks)


def module_path(node: fx.Node) -> str:
    """Dotted path of the module a node was traced in, from the root of the compile; "" if unknown.

    The number of a block that is compiled for all of its kind is ``*``: ``blocks.*.attn1``.
    """
    stack, around = compat.module_stack(node), parent.get()
    inside = compat.path_parts(stack[-1][0])[1:] if stack else []
    block = ["*" if part.isdigit() else part for part in around.block.split(".")] if around is not None else []
    return ".".join([*block, *inside])


def modules_around(node: fx.Node) -> list[tuple[type, Any]]:
    """Classes of the modules that a node was traced in, outermost first, each with the module where it can be reached, else None."""
    scope, root = compat.root_scope(), root_module()
    found: list[tuple[type, Any]] = [] if root is None else [(type(root), root)]
    for path, kind in compat.module_stack(node):
        along = compat.modules_along(scope, path)
        found.extend((type(module), module) for module in along)
        if isinstance(kind, type) and not (along and type(along[-1]) is kind):
            found.append((kind, None))
    return found


def modules_among_arguments() -> list[nn.Module]:
    """Modules that the arguments of the function being compiled are or hold, for a function that is called with a model."""
    values = list(compat.argument_scope().values())
    return [each for value in values for each in (value, *_contents(value)) if isinstance(each, nn.Module)]


def _contents(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    return list((value if isinstance(value, Mapping) else getattr(value, "__dict__", {})).values())


def given_tensors() -> set[int]:
    """Identities of the tensors that the compiled function was called with, or the model whose blocks are compiled one by one."""
    around, calls = parent.get(), compat.calls_in_progress()
    entry = next((number for number, (called, _, _) in enumerate(calls) if callable(called) and not isinstance(called, nn.Module)), 0)
    own = calls[: entry + 1] if around is None else [call for call in calls if call[0] is around.model]
    return {id(leaf) for _, args, kwargs in own for leaf in compat.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
