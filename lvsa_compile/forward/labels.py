"""The weak map from a tensor to the annotation of its axes: how one graph of a forward tells the next what it found out.

A forward may be several graphs: Dynamo breaks it, or its blocks are compiled one by one.  Nothing is known of tensors that eager code
made of annotated ones.
"""

from __future__ import annotations

import itertools
import threading

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lvsa_compile import compat
from lvsa_compile.axes.algebra import axis_size
from lvsa_compile.axes.call import Axes

_labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
_forward = threading.local()


def begin_forward() -> None:
    """A model's forward begins: what was said before is of another one, and holds no more in this thread."""
    _forward.number = next(_numbers)


_numbers = itertools.count(1)


def say(tensor: Tensor, axes: Axes | None, at_once: bool = False) -> None:
    """Says what the axes of a real tensor are, or that nothing is known any more.

    Writes to tensors of inference mode are not counted, so of those something is said only where the next graph runs ``at_once``.
    """
    if axes is None or (tensor.is_inference() and not at_once):
        _labels.pop(tensor, None)
    elif [axis_size(axis) for axis in axes] == list(tensor.shape):
        _labels[tensor] = (axes, compat.version_of(tensor), getattr(_forward, "number", 0))


def said_of(tensor: Tensor) -> Axes | None:
    """What was said of a tensor's axes in this forward; None where nothing was, or it was written to since."""
    found = _labels.get(tensor)
    return found[0] if found is not None and found[1:] == (compat.version_of(tensor), getattr(_forward, "number", 0)) else None


class SameAxes:
    """Whether a tensor carries the axes a graph was compiled for."""

    def __init__(self, expected: Axes | None) -> None:
        self._expected = expected

    def __call__(self, tensor: Tensor) -> bool:
        """Compares."""
        axes = said_of(tensor)
        return axes is self._expected or axes == self._expected
