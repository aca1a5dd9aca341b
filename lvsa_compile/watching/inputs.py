"""The inputs of a forward as the watch names them, and which of them may hold the generated video before an output has shown it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lvsa_compile import compat
from lvsa_compile.axes.algebra import INPUT, Source, axis_of
from lvsa_compile.axes.call import Axes, sizes_of
from lvsa_compile.axes.carried import of_coordinates
from lvsa_compile.forward.timestep_names import timestep_among
from lvsa_compile.layout.guarded_values import may_be_coordinates


@dataclass(frozen=True)
class ForwardInputs:
    """The arguments of a call of a model: leaves with names, such as ``hidden_states`` and ``latents[0]``."""

    names: tuple[str, ...]
    leaves: tuple[Any, ...]

    @staticmethod
    def of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ForwardInputs:
        """The inputs of ``model(*args, **kwargs)``."""
        kind: Any = type(compat.uncompiled(model))
        return ForwardInputs(*compat.named_leaves(kind.forward, args, kwargs))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the leaves, by name."""
        return {name: leaf for name, leaf in zip(self.names, self.leaves, strict=True) if isinstance(leaf, Tensor)}

    @property
    def timed(self) -> bool:
        """Whether the name of one says that it is the timestep."""
        return timestep_among(self.names) is not None

    @property
    def size(self) -> tuple[Any, ...]:
        """What tells forwards of one size from those of another."""
        return self.names, tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in self.leaves)

    def latents(self) -> list[str]:
        """Names of the inputs whose axes show a video grid: of five axes, or of four in a list."""
        return [name for name, leaf in self.tensors.items() if _is_latent(name, leaf)]

    def packed(self) -> list[str]:
        """Names of the inputs ``[B, N, C]`` that may hold packed tokens."""
        return [name for name, leaf in self.tensors.items() if leaf.dim() == 3 and leaf.is_floating_point()]

    def packed_with_places(self, counted: Collection[Any]) -> list[str]:
        """Those of ``packed`` that have as many tokens as an input may hold coordinates of, or as a rope table runs along."""
        lengths = {size for tensor in self.tensors.values() if may_be_coordinates(tensor) for size in tensor.shape} | set(counted)
        return [name for name in self.packed() if self.tensors[name].shape[1] in lengths]


def _is_latent(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and (tensor.dim() == 5 or (tensor.dim() == 4 and name.endswith("]")))


def axes_of_input(name: str, tensor: Tensor, value: int) -> Axes:
    """The axes of an input; ``value`` is the number of what it holds, where that tells the grid."""
    node_name = of_coordinates(name, value) if may_be_coordinates(tensor) else name
    return tuple(axis_of(Source(INPUT, name, i, size, node_name, tensor.dim())) for i, size in enumerate(sizes_of(tensor)))
