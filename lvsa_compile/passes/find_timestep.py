"""Finds which input of the graph tells the denoising step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.axes.algebra import INPUT
from lvsa_compile.compat import example_value
from lvsa_compile.forward import context
from lvsa_compile.forward.clock import clock_input_before
from lvsa_compile.forward.timestep_names import rank_of_name, timestep_among
from lvsa_compile.layout.graph_trace import input_kind
from lvsa_compile.passes.compilation import Compilation, Piece, TimestepInput
from lvsa_compile.patterns.site import AttentionSite

_OTHERS = re.compile(r"fps|rate|guidance|scale|strength|shift|motion|size|crop|aesthetic")
"""Names of other numbers that models embed as sinusoids."""

_PLAIN, _UNLIKELY = 10, 100

_CARRY_ON = frozenset(
    "float to type type_as expand unsqueeze squeeze view reshape flatten repeat mul truediv div "
    "getitem neg add sub half double bfloat16 ravel contiguous clone outer einsum reciprocal sigmoid".split()
)
"""Ops on the way from a timestep to the sine and cosine of its embedding."""


def find_timestep(compilation: Compilation) -> Compilation:
    """Fills in ``timestep``: an input with a timestep's name, else the one whose sine or cosine goes through a linear layer.

    An input is a tensor or a number; a number that Dynamo made a constant, which it guards, is known by the name of its argument.

    Of several graphs of one forward the first that sees a timestep moves the clock: what the others get may be made of it.  Where none
    does, as where the model's own function runs in eager code, it is the model's own input.
    """
    root, code, around = context.root_module(), compilation.compile_id.split("/")[0], context.parent.get()
    if (compilation.position.continues or (around is not None and around.ticks)) and clock_input_before(root, code):
        return dataclasses.replace(compilation, clock_before=clock_input_before(root, code))
    placeholders = [node for node in compilation.graph_module.graph.nodes if node.op == "placeholder"]
    candidates = [
        (position, node, name)
        for position, node in enumerate(placeholders)
        if _may_be_timestep(node)
        for kind, name in [input_kind(node)]
        if kind == INPUT
    ]
    ranked = sorted((_rank(node, name), position, name) for position, node, name in candidates)
    if not ranked or ranked[0][0] >= _UNLIKELY:
        if around is not None and around.timestep is not None:
            return dataclasses.replace(compilation, clock_before=around.timestep[0])
        return compilation if compilation.position.continues else dataclasses.replace(compilation, timestep=_constant())
    best, position, name = ranked[0]
    alike = [position for rank, position, _ in ranked if rank == best]
    steps, step_of = _several_steps({position: placeholders[position] for position in alike}, compilation)
    return dataclasses.replace(compilation, timestep=TimestepInput(position, name, steps=steps), step_of=step_of)


def _several_steps(timesteps: Mapping[int, fx.Node], compilation: Compilation) -> tuple[tuple[Piece, ...], dict[fx.Node, int]]:
    """The pieces of ``timesteps``, inputs by position, that a loop over denoising steps uses, in order, and the step that each site is in.

    Nothing where the pieces are no steps: in a loop the sites of a module come again, each time after a further piece.
    """
    pieces: dict[fx.Node, Piece] = {}
    for position, node in timesteps.items():
        taken = {user: at for user in _reached(node, frozenset(("unbind", "iter"))) if (at := _index(user)) is not None}
        whole: dict[fx.Node, Piece] = {node: (position, None)}
        pieces |= {user: (position, at) for user, at in taken.items()} or whole
    order = {node: position for position, node in enumerate(compilation.graph_module.graph.nodes)}
    uses = {node: [order[each] for each in (node.users if node in timesteps.values() else (node,))] for node in pieces}
    steps = tuple(dict.fromkeys(pieces[node] for node in sorted(pieces, key=lambda node: min(uses[node], default=0))))
    latest: dict[fx.Node, int] = {}
    for node in order:
        own = [steps.index(pieces[node])] if node in pieces else []
        latest[node] = max([*own, *(latest[source] for source in node.all_input_nodes)], default=-1)
    step_of = {site.node: max(0, latest[site.query]) for site in compilation.sites if isinstance(site, AttentionSite)}
    named: dict[str, list[int]] = {}
    for node, step in step_of.items():
        named.setdefault(context.module_path(node) or node.name.rpartition("_")[0], []).append(step)
    come_again = any(len(set(steps_of_it)) > 1 for steps_of_it in named.values())
    return (steps, step_of) if come_again else ((), {})


def _index(node: fx.Node) -> int | None:
    """Which element along the first axis a node takes; None where it does anything else."""
    op, *arguments = _op(node), *node.args[1:]
    if op == "getitem" and len(arguments) == 1 and isinstance(arguments[0], int):
        return arguments[0]
    return arguments[1] if op == "select" and len(arguments) == 2 and arguments[0] == 0 and isinstance(arguments[1], int) else None


def _may_be_timestep(node: fx.Node) -> bool:
    """Whether an input is a tensor or a number of its own, not the size of a tensor."""
    value: Any = example_value(node)
    if isinstance(value, Tensor):
        return value.dim() <= 5
    return isinstance(value, (torch.SymInt, torch.SymFloat)) and "(" not in (compat.placeholder_source(node) or "(")


def _constant() -> TimestepInput | None:
    """A number among the arguments of what is compiled that is named as a timestep."""
    numbers = {name: value for name, value in compat.argument_scope().items() if type(value) in (int, float)}
    at = timestep_among(list(numbers))
    return None if at is None else TimestepInput(-1, list(numbers)[at], float(list(numbers.values())[at]))


def _rank(node: fx.Node, name: str) -> int:
    """How likely an input is the timestep, the lowest rank first: by its name, among equals by what becomes of it."""
    short = name.split("[")[0].lower()
    named = rank_of_name(name)
    if named == 0:
        return 0
    value = example_value(node)
    embedded = isinstance(value, Tensor) and value.dim() <= 2 and not _OTHERS.search(short) and _is_embedded_as_sinusoid(node)
    if embedded:
        return 1 if named is None else named
    return _UNLIKELY if named is None else _PLAIN + named


def _is_embedded_as_sinusoid(node: fx.Node) -> bool:
    """Whether the input goes through arithmetic into a sine or cosine, and that, joined at most, into a linear layer."""
    waves = [user for user in _reached(node, _CARRY_ON) if _op(user) in ("sin", "cos")]
    return any(
        _op(user) == "linear"
        for wave in waves
        for user in _reached(wave, frozenset("cat to type type_as getitem stack flatten float view".split()))
    )


def _reached(start: fx.Node, through: frozenset[str]) -> list[fx.Node]:
    """Nodes that use ``start``, following those whose op is in ``through``."""
    found: dict[fx.Node, None] = {}
    waiting = list(start.users)
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found[node] = None
        if _op(node) in through:
            waiting.extend(node.users)
    return list(found)


def _op(node: fx.Node) -> str:
    if node.op == "call_module":
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return "linear" if node.target is torch.nn.functional.linear else str(name)
