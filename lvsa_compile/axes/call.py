"""The input of a rule: one ATen call, its tensors and their axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from lvsa_compile.axes.algebra import CREATED, INPUT, LOST, Axis, Size, Source, axis_of, axis_size, leaves, origins, repeats
from lvsa_compile.axes.values import Array, Later
from lvsa_compile.compat import size_expression

Axes = tuple[Axis, ...]
"""The axes of one tensor."""


class Noticing(Protocol):
    """Takes note of symbolic sizes that are equal now."""

    def notice(self, axis: Axis, *ends: Size) -> None:
        """Notes which of ``ends`` meet a boundary of the axis now."""

    def runs(self, later: Later, axis: Axis, count: Size) -> list[tuple[Size, Size]] | None:
        """The runs of positions that an input names along the axis."""


@dataclass(frozen=True)
class Call:
    """One ATen call on fake tensors: its arguments, its outputs, the axes of every tensor seen before and the values of some."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    axes_of: Callable[[Tensor], Axes]
    node_name: str
    value_of: Callable[[Tensor], Array | None] = lambda tensor: None
    later_of: Callable[[Tensor], Later | None] = lambda tensor: None
    relations: Noticing | None = None

    def cut_off(self, axis: Axis, *ends: Size) -> None:
        """Notes that the axis could not be cut at ``ends``."""
        if self.relations is not None:
            self.relations.notice(axis, *ends)

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def input(self, index: int = 0) -> Axes:
        """Axes of a tensor argument."""
        return self.axes_of(self.args[index])

    @cached_property
    def all_axes(self) -> tuple[Axis, ...]:
        """Axes of all tensor arguments."""
        return tuple(axis for tensor in tensors_in(self.args, self.kwargs.values()) for axis in self.axes_of(tensor))

    def new_axis(self, size: Size, kind: str = "", axis: int = 0, of: Axis | None = None) -> Axis:
        """An axis whose trail starts at this call.

        By default it is LOST where it may reorder what came from an input, that is any axis of the arguments or the axis ``of`` alone,
        else CREATED.
        """
        counted = self.all_axes if of is None else (of,)
        lost = any(factor.kinds & {INPUT, LOST} for counted_axis in counted for factor in leaves(counted_axis))
        kind = kind or (LOST if lost else CREATED)
        return axis_of(Source(kind, self.op, axis, size, self.node_name, origins=origins(counted) if kind == LOST else frozenset()))

    def uneven(self, axis: Axis, position: int) -> Axis:
        """The axis, or a new one in its place where the axis only said that its positions hold the same."""
        return self.new_axis(axis_size(axis), CREATED, position) if repeats(axis) else axis

    def new_axes(self, output: Tensor, kind: str = "") -> Axes:
        """Axes that all start at this call."""
        return tuple(self.new_axis(size, kind, axis) for axis, size in enumerate(sizes_of(output)))


Rule = Callable[[Call], "Sequence[Axes] | None"]


def tensors_in(*arguments: Iterable[Any]) -> list[Tensor]:
    """The tensors among some arguments, those in lists too."""
    flat = [item for some in arguments for value in some for item in (value if isinstance(value, (list, tuple)) else (value,))]
    return [item for item in flat if isinstance(item, Tensor)]


def sizes_of(tensor: Tensor) -> list[Size]:
    """Sizes of a tensor as ints or expressions."""
    return [size_expression(size) for size in tensor.shape]


def axis_index(dim: int, rank: int) -> int:
    """A dim argument counted from the first axis."""
    return dim % rank if rank else 0


def with_axis(axes: Axes, dim: int, axis: Axis) -> Axes:
    """The axes with one of them replaced."""
    return (*axes[:dim], axis, *axes[dim + 1 :])
