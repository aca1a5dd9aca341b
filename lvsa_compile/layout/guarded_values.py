"""Values read from the inputs a model was called with, and the guards that make it safe to rely on them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.axes.values import Array, Expectation, Later
from lvsa_compile.forward.labels import WatchedForward

_LARGEST_INPUT = 1 << 24
"""Elements of the largest input that is read."""


class Reader:
    """Reads the inputs of a graph or a model, by name, and remembers which; those of the forward around it are read ``elsewhere``."""

    def __init__(self, inputs: Mapping[str, Any], elsewhere: WatchedForward | None = None) -> None:
        self._elsewhere = elsewhere
        self._real = {node_name: value for node_name, value in inputs.items() if isinstance(value, Tensor) and can_be_read(value)}
        self._read: dict[str, Tensor] = {}
        self._looked_at: dict[str, Array] = {}
        self.expected: dict[str, dict[Expectation, None]] = {}

    def later(self, node_name: str) -> Later | None:
        """The value of an input, read when it is asked for."""
        return _OfInput(self, node_name) if node_name in self._real else None

    def look(self, node_name: str) -> Array | None:
        """The value of an input, without a guard: say with ``expect`` what of it is relied on."""
        with compat.no_modes():
            return Later(lambda: self._real[node_name].detach().cpu(), constant=False).array()

    def expect(self, node_name: str, expected: Expectation) -> None:
        """Notes what of the value of an input is relied on."""
        self.expected.setdefault(node_name, {})[expected] = None

    def read(self, node_name: str) -> Tensor | None:
        """The value of an input, on the CPU; None where the caller gave no real tensor."""
        if node_name not in self._real:
            if self._elsewhere is not None:
                self._elsewhere.rely_on(node_name)
            return None
        if node_name not in self._read:
            with compat.no_modes():
                self._read[node_name] = self._real[node_name].detach().to("cpu", copy=True)
        return self._read[node_name]

    def peek(self, node_name: str) -> Array | None:
        """Peeks at an input that may be coordinates (an axis of three), without a guard: ``read`` it before depending on the value."""
        tensor = self._real.get(node_name)
        if tensor is None and self._elsewhere is not None:
            return self._elsewhere.peek(node_name)
        if tensor is None or not may_be_coordinates(tensor):
            return None
        if node_name not in self._looked_at:
            with compat.no_modes():
                self._looked_at[node_name] = tensor.detach().to("cpu", torch.float64).numpy()
        return self._looked_at[node_name]

    @property
    def relied_on(self) -> Mapping[str, Tensor]:
        """The inputs that were read, by name, and what they held."""
        return self._read


class _OfInput(Later):
    """The value of an input of a graph."""

    def __init__(self, reader: Reader, node_name: str) -> None:
        super().__init__(lambda: reader.read(node_name), constant=False)
        self._reader, self._node_name = reader, node_name

    def peek(self) -> Array | None:
        """The value, without relying on it."""
        return self._reader.look(self._node_name)

    def rely_on(self, expected: Expectation) -> None:
        """Notes what of the value decided something."""
        self._reader.expect(self._node_name, expected)


def may_be_coordinates(tensor: Tensor) -> bool:
    """Whether a tensor may hold a place ``(t, h, w)`` for each token."""
    return 2 <= tensor.dim() <= 4 and 3 in tensor.shape and not tensor.is_complex()


def can_be_read(tensor: Tensor) -> bool:
    """Whether a tensor has values, and not too many to look at."""
    return compat.fake_mode_of(tensor) is None and tensor.device.type != "meta" and tensor.numel() <= _LARGEST_INPUT


def _waits(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values waits for a device."""
    return tensor.device.type != "cpu"


@dataclass(frozen=True)
class _Last:
    """The last tensor that was looked at; on another device than the CPU, looking at it again would wait for nothing new.

    (Writes that torch does not count, through ``.data``, are seen on the CPU alone.)
    """

    tensor: weakref.ref[Tensor]
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Last:
        """The tensor as it is now."""
        return cls(weakref.ref(tensor), compat.version_of(tensor))

    def is_still(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is this one, on another device, and was not written to since."""
        return _waits(tensor) and self.tensor() is tensor and self.version == compat.version_of(tensor) >= 0


class SameValue:
    """Whether a tensor holds what it should; see ``_Last`` for when it is not compared again."""

    def __init__(self, expected: Tensor) -> None:
        self._expected = expected
        self._last: _Last | None = None

    def __call__(self, tensor: Tensor) -> bool:
        """Compares, or remembers."""
        if self._last is not None and self._last.is_still(tensor):
            return True
        here = tensor.detach().to("cpu")
        if here.shape != self._expected.shape or here.dtype != self._expected.dtype or not bool((here == self._expected).all()):
            return False
        self._last = _Last.of(tensor)
        return True


class SameStructure:
    """Whether a tensor's values are as expected, given the sizes that symbols stand for in a call; see ``_Last``."""

    def __init__(self, expected: Sequence[Expectation], sizes: Mapping[Any, Any], symbols: Sequence[Any]) -> None:
        self._expected, self._sizes, self._symbols = expected, sizes, symbols
        self._last: tuple[_Last, Array] | None = None

    def __call__(self, tensor: Tensor, *numbers: int) -> bool:
        """Compares."""
        known = dict(zip(self._symbols, numbers, strict=True))
        if self._last is not None and self._last[0].is_still(tensor):
            values = self._last[1]
        else:
            here = tensor.detach()
            values = (here.double() if here.is_floating_point() else here).cpu().numpy()
            self._last = (_Last.of(tensor), values) if _waits(tensor) else None

        def number(size: Any) -> int:
            size = self._sizes[size]
            return size if isinstance(size, int) else int(size.subs(known))

        return all(each.holds(values, number) for each in self._expected)
