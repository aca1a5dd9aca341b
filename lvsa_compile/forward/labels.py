"""The annotation of a tensor's axes: how one graph of a forward tells the next what it found out.

A forward may be several graphs: Dynamo breaks it, or its blocks are compiled one by one.  Where the forward is watched, the watch knows
the axes of all its tensors; elsewhere graphs annotate their outputs in a weak map, and nothing is known of tensors that eager code made
of annotated ones.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import threading
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lvsa_compile import compat
from lvsa_compile.axes.algebra import axis_size
from lvsa_compile.axes.call import Axes
from lvsa_compile.axes.values import Array


class WatchedForward(Protocol):
    """A forward in progress whose tensors are followed."""

    def annotate(self, tensor: Tensor, axes: Axes | None) -> None:
        """Says what a graph knows of the axes of an output; None where it knows nothing."""

    def pass_on(self, tensor: Tensor, axes: Axes, inputs: Mapping[str, Tensor]) -> None:
        """Says what the axes of an output of a graph are in terms of those of its inputs, given by name."""

    def annotation_of(self, tensor: Tensor) -> Axes | None:
        """What a graph should know of the axes of an input; None where nothing of use is known."""

    def attend_by(self, attend: Any) -> None:
        """Says how attention that no graph holds is compiled, where nobody has said it before."""

    def looking_away(self) -> contextlib.AbstractContextManager[None]:
        """Surroundings in which ops are not followed."""

    def peek(self, node_name: str) -> Array | None:
        """The value of an input of the forward, by its name in annotations."""

    def rely_on(self, node_name: str) -> None:
        """Notes that what was peeked at decided something: annotations are others from where the value is another."""


watched_forward: contextvars.ContextVar[WatchedForward | None] = contextvars.ContextVar("lvsa_watched_forward", default=None)
"""The forward that is followed now, if any."""

_annotations: WeakIdKeyDictionary = WeakIdKeyDictionary()
_forward = threading.local()


def begin_forward() -> None:
    """A model's forward begins: earlier annotations belong to another forward and no longer hold in this thread."""
    _forward.number = next(_numbers)


_numbers = itertools.count(1)


def annotate(tensor: Tensor, axes: Axes | None) -> None:
    """Annotates a real tensor with its axes; None forgets them.

    Tensors of inference mode have no version counter, so that a stale annotation would go unnoticed: only a watch annotates them.
    """
    watched = watched_forward.get()
    if watched is not None:
        watched.annotate(tensor, axes)
    elif axes is None or tensor.is_inference():
        _annotations.pop(tensor, None)
    elif [axis_size(axis) for axis in axes] == list(tensor.shape):
        _annotations[tensor] = (axes, compat.version_of(tensor), getattr(_forward, "number", 0))


def annotation_of(tensor: Tensor) -> Axes | None:
    """The annotation of a tensor in this forward; None where there is none, or the tensor was written to since."""
    watched = watched_forward.get()
    if watched is not None:
        return watched.annotation_of(tensor)
    found = _annotations.get(tensor)
    return found[0] if found is not None and found[1:] == (compat.version_of(tensor), getattr(_forward, "number", 0)) else None


class SameAnnotation:
    """Whether a tensor has the annotation that a graph was compiled for."""

    def __init__(self, expected: Axes | None) -> None:
        self._expected = expected

    def __call__(self, tensor: Tensor) -> bool:
        """Compares."""
        axes = annotation_of(tensor)
        return axes is self._expected or axes == self._expected
