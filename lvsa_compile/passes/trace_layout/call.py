"""What a rule is told: one ATen call, its tensors and their axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lvsa_compile.compat import size_expression
from lvsa_compile.passes.trace_layout.axes import OP, Axis, Size, Source, axis_of

Axes = tuple[Axis, ...]
"""The axes of one tensor."""


@dataclass(frozen=True)
class Call:
    """One ATen call on fake tensors: its arguments, its outputs, and the axes of every tensor seen before."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    axes_of: Callable[[Tensor], Axes]
    place: str

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def input(self, index: int = 0) -> Axes:
        """Axes of a tensor argument."""
        return self.axes_of(self.args[index])

    def new_axis(self, size: Size, kind: str = OP, axis: int = 0) -> Axis:
        """An axis whose trail starts at this call."""
        return axis_of(Source(kind, self.op, axis, size, self.place))

    def new_axes(self, output: Tensor, kind: str = OP) -> Axes:
        """Axes that all start at this call."""
        return tuple(self.new_axis(size, kind, axis) for axis, size in enumerate(sizes_of(output)))


Rule = Callable[[Call], "Sequence[Axes] | None"]


def sizes_of(tensor: Tensor) -> list[Size]:
    """Sizes of a tensor as ints or expressions."""
    return [size_expression(size) for size in tensor.shape]


def axis_index(dim: int, rank: int) -> int:
    """A dim argument counted from the first axis."""
    return dim % rank if rank else 0


def with_axis(axes: Axes, dim: int, axis: Axis) -> Axes:
    """The axes with one of them replaced."""
    return (*axes[:dim], axis, *axes[dim + 1 :])
