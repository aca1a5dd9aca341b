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

_annotations: WeakIdKeyDictionary = WeakIdKeyDictionary()
_forward = threading.local()


def begin_forward() -> None:
    """A model's forward begins: earlier annotations belong to another forward and no longer hold in this thread."""
    _forward.number = next(_numbers)


_numbers = itertools.count(1)


def annotate(tensor: Tensor, axes: Axes | None, at_once: bool = False) -> None:
    """Annotates a real tensor with its axes; None forgets them.

    Tensors of inference mode have no version counter, so that a stale annotation would go unnoticed: they are annotated only where the next
    graph runs ``at_once``.
    """
    if axes is None or (tensor.is_inference() and not at_once):
        _annotations.pop(tensor, None)
    elif [axis_size(axis) for axis in axes] == list(tensor.shape):
        _annotations[tensor] = (axes, compat.version_of(tensor), getattr(_forward, "number", 0))


def annotation_of(tensor: Tensor) -> Axes | None:
    """The annotation of a tensor in this forward; None where there is none, or the tensor was written to since."""
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
