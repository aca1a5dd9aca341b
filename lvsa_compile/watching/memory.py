"""What rules found out in the forwards before: the same op on the same axes gives the same axes again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lvsa_compile.axes.algebra import ARANGE, Axis, Concat, Size, axis_size, leaves
from lvsa_compile.axes.call import Axes
from lvsa_compile.layout.guarded_values import SameValue

MOST = 1 << 14
"""Calls of ops that are remembered; then all is forgotten and found out anew."""


@dataclass
class Found:
    """What a rule gave for a call of an op: the axes of each output, and the values of arguments that decided, by position.

    A count (``arange``) is a source of its own each time: ``times`` holds what each further such call of a forward gave.
    """

    axes: list[Axes]
    values: tuple[tuple[int, SameValue], ...] = ()
    times: list[list[Axes]] = field(default_factory=list)
    number: int = 0


class Memory:
    """Of one model.  Equal axes are one object here, so that comparing them is comparing identities."""

    def __init__(self) -> None:
        self.found: dict[Hashable, Found] = {}
        self.results: dict[Hashable, tuple[tuple[torch.Size, Axes], ...]] = {}  # of whole calls, by op and arguments: shapes and axes
        self.writes: dict[Hashable, tuple[Axes, Axes | None]] = {}  # of writes in place: axes of the target, and of what it is a view of
        self.counted: set[Size] = set()  # sizes of axes that run along three counts, as those of rope tables do
        self.next_number = 0
        self._axes: dict[Axes, Axes] = {}
        self._held: dict[tuple[int, ...], Axes] = {}
        self._annotated: dict[Axes, Axes] = {}
        self._tables: dict[int, tuple[Axes, Axes | None]] = {}
        self._of_graphs: dict[tuple[int, ...], tuple[Axes, Axes]] = {}

    def one(self, axes: Axes) -> Axes:
        """The one object for these axes."""
        return self._axes.setdefault(axes, axes)

    def held(self, shape: torch.Size, axes: Callable[[], Axes]) -> Axes:
        """The axes of a tensor that was made outside of the forward; ``axes`` makes them."""
        known = self._held.get(shape)
        if known is None:
            known = self._held[shape] = self.one(axes())
        return known

    def annotation(self, annotation: Axes, axes: Axes) -> Axes:
        """The one object for the annotation of a tensor with these axes."""
        annotation = self.one(annotation)
        self._annotated.setdefault(annotation, axes)
        return annotation

    def table(self, axes: Axes, annotation: Callable[[Axes], Axes | None]) -> Axes | None:
        """What ``annotation`` says of a tensor with these axes, which are one object here; asked once."""
        if id(axes) not in self._tables:
            found = annotation(axes)
            self._tables[id(axes)] = axes, None if found is None else self.annotation(found, axes)
        return self._tables[id(axes)][1]

    def annotated(self, annotation: Axes) -> Axes | None:
        """The axes of a tensor that was annotated so; None where none was."""
        return self._annotated.get(annotation)

    def of_graph(self, axes: Axes, own: Callable[[], Axes], *inputs: Axes) -> Axes:
        """What ``own`` makes of the axes that a graph has for an output, and those of ``inputs``; made once."""
        key = (id(axes), *map(id, inputs))
        known = self._of_graphs.get(key)
        if known is None or known[0] is not axes:
            if len(self._of_graphs) >= MOST:
                self._of_graphs.clear()
            known = self._of_graphs[key] = axes, self.one(own())
        return known[1]

    def keep(self, key: Hashable, found: Found) -> None:
        """Remembers what a rule gave."""
        if len(self.found) >= MOST:
            self.found.clear()
        self.found[key] = found
        self.next_number += 1
        for axes in found.axes:
            for axis in axes:
                counts = {digit.source for factor in leaves(axis) for digit in factor.digits if digit.source.kind == ARANGE}
                if len(counts) >= 3:
                    self.counted.update(_sizes(axis))


def _sizes(axis: Axis) -> set[Size]:
    """Size of an axis, and of each part where it is a concatenation."""
    parts = [part for factor in axis if isinstance(factor, Concat) for part in factor.parts]
    return {axis_size(axis), *(axis_size(part) for part in parts)}


def is_counted_by(axes: list[Axes], node_name: str) -> bool:
    """Whether axes run along a count that was made at ``node_name``."""
    return any(
        digit.source.kind == ARANGE and digit.source.node_name == node_name
        for each in axes
        for axis in each
        for factor in leaves(axis)
        for digit in factor.digits
    )


AS_THEY_ARE = frozenset((type(None), int, bool, str, torch.dtype, torch.device))


def key_of(value: Any, axes_of: Callable[[Tensor], Axes]) -> Hashable:
    """What of an argument decides what a rule gives: of a tensor its axes and dtype, of a float only that it is one."""
    kind = type(value)
    if kind in AS_THEY_ARE:
        key: Hashable = value
    elif kind is Tensor or isinstance(value, Tensor):
        key = (id(axes_of(value)), value.dtype)
    elif kind is tuple or kind is list:
        if all(type(each) is int for each in value):
            return tuple(value)
        key = tuple([key_of(each, axes_of) for each in value])
    else:
        key = kind.__name__
    return key
