"""Values of small tensors, computed only when a rule asks: indices, masks and counts that no axis can tell.

A value is known where every tensor it is made of is: counts and constants made in the graph, and inputs that the caller gives real
tensors for.  Which inputs were read is noted, since what was read must be guarded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy.typing
import torch
from torch import Tensor

from lvsa_compile import compat

Array = numpy.typing.NDArray[Any]
_LARGEST_VALUE = 1 << 26
_INDEX_DTYPES = frozenset((torch.int32, torch.int64))
_COPIES = frozenset(("_to_copy", "clone", "detach", "alias"))
"""Elements of the largest value that is computed."""


class Expectation(Protocol):
    """What is expected of the value of an input, in terms of ``sizes`` that may be symbolic."""

    @property
    def sizes(self) -> tuple[Any, ...]:
        """The sizes that it speaks of."""

    def holds(self, values: Array, number: Callable[[Any], int]) -> bool:
        """Whether ``values`` are as expected, given what each size is as a ``number``."""


class Later:
    """A value that is computed at most once, when it is asked for; None where it cannot be.

    ``constant`` says that no input has a part in it.
    """

    def __init__(self, compute: Callable[[], Tensor | None], constant: bool) -> None:
        self.constant = constant
        self._compute: Callable[[], Tensor | None] | None = compute
        self._value: Tensor | None = None

    def value(self) -> Tensor | None:
        """The real tensor, which must not be written to."""
        if self._compute is not None:
            compute, self._compute = self._compute, None
            self._value = compute()
        return self._value

    def peek(self) -> Array | None:
        """The value of an input, without relying on it; None where this is not an input's."""
        return None

    def rely_on(self, expected: Expectation) -> None:
        """Notes what of the value of an input that was peeked at decided something."""

    def array(self) -> Array | None:
        """The value as an array."""
        value = self.value()
        if value is None or value.is_complex():
            return None
        with compat.no_modes():
            array: Array = (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).cpu().numpy()
        return array


View = tuple[compat.OpOverload, Any, Any, int]
"""A call that made a view of its first argument: op, arguments, and which of its outputs."""


class KnownValues:
    """Which tensors of a trace have a value that could be computed."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Later]] = {}

    def of(self, tensor: Tensor) -> Array | None:
        """The value of a tensor as an array, or None."""
        later = self.later(tensor)
        return None if later is None else later.array()

    def later(self, tensor: Tensor) -> Later | None:
        """The value that a tensor has now, whatever is written to it afterwards; None where it is not known."""
        held: Later | None = self._real_arguments(tensor)
        return held

    def set(self, tensor: Tensor, later: Later | None) -> None:
        """Says what a tensor's value is, or that it is not known any more."""
        if later is None:
            self._known.pop(id(tensor), None)
        else:
            self._known[id(tensor)] = (tensor, later)

    def real(self, arguments: Any) -> Any:
        """Arguments of a call with the real tensors in place of fakes; None where one is not known."""
        held = self._real_arguments(arguments)
        return None if held is None else _real(held)

    def result(self, func: compat.OpOverload, args: Any, kwargs: Any, position: int | None, like: Tensor) -> Later | None:
        """What a call would return at ``position``; None where an argument is not known, or chance decides."""

        copied = compat.name_of_op(func) in _COPIES and isinstance(args[0], Tensor)
        if copied and like.dim() == 1 and {args[0].dtype, like.dtype} <= _INDEX_DTYPES:
            return self.later(args[0])  # the same whole numbers

        def compute(real: Any) -> Tensor | None:
            found = func(*real[0], **real[1])
            chosen = found if position is None else found[position]
            return chosen if isinstance(chosen, Tensor) else None

        return self._deferred(func, (args, kwargs), like, compute)

    def written(self, func: compat.OpOverload, args: Any, kwargs: Any, root: Tensor, views: Sequence[View]) -> Later | None:
        """What an in-place call on a view of ``root``, reached by ``views`` in turn, leaves in ``root``."""

        def compute(real: Any) -> Tensor:
            whole: Tensor = real[0].clone()
            target: Any = whole
            for (view, _, view_kwargs, position), view_args in zip(views, real[3], strict=True):
                target = view(target, *view_args, **view_kwargs)
                target = target[position] if isinstance(target, (tuple, list)) else target
            func(target, *real[1], **real[2])
            return whole

        return self._deferred(func, (root, list(args[1:]), kwargs, [list(view_args[1:]) for _, view_args, _, _ in views]), root, compute)

    def _deferred(self, func: compat.OpOverload, arguments: Any, like: Tensor, compute: Callable[[Any], Tensor | None]) -> Later | None:
        """What ``compute`` makes of the real ``arguments`` of a call; None where one is not known, or chance decides."""
        held = self._real_arguments(arguments)
        if held is None or torch.Tag.nondeterministic_seeded in func.tags or not _is_small(like):
            return None

        def later() -> Tensor | None:
            real: Any = _real(held)
            if real is None:
                return None
            with compat.no_modes():
                return compute(real)

        return Later(later, _is_constant(held))

    def _real_arguments(self, arguments: Any) -> Any:
        """Arguments with every tensor as the ``Later`` it is now; None where one is not known."""
        if isinstance(arguments, Tensor):
            known = self._known.get(id(arguments))
            constant = compat.constant_of(arguments) if known is None else None
            return Later(lambda: constant, True) if constant is not None else None if known is None else known[1]
        if isinstance(arguments, torch.SymInt):
            number = compat.size_expression(arguments)
            return _Plain(number) if isinstance(number, int) else None
        if isinstance(arguments, (torch.SymFloat, torch.SymBool)):
            return None
        if isinstance(arguments, (list, tuple)):
            held = [_NOTHING if argument is None else self._real_arguments(argument) for argument in arguments]
            return None if any(each is None for each in held) else held
        if isinstance(arguments, dict):
            values = self._real_arguments(list(arguments.values()))
            return None if values is None else dict(zip(arguments, values, strict=True))
        return _Plain(arguments)


class _Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


_NOTHING = _Plain(None)


def _real(held: Any) -> Any:
    """Held arguments with their values; None where one cannot be computed."""
    if isinstance(held, Later):
        return held.value()
    if isinstance(held, list):
        real = [_real(each) for each in held]
        return None if any(a is None and b is not _NOTHING for a, b in zip(real, held, strict=True)) else real
    if isinstance(held, dict):
        values = _real(list(held.values()))
        return None if values is None else dict(zip(held, values, strict=True))
    return held.value


def _is_constant(held: Any) -> bool:
    if isinstance(held, dict):
        held = list(held.values())
    return all(map(_is_constant, held)) if isinstance(held, list) else not isinstance(held, Later) or held.constant


def _is_small(tensor: Tensor) -> bool:
    sizes = [compat.size_expression(size) for size in tensor.shape]
    return all(isinstance(size, int) for size in sizes) and math.prod(sizes) <= _LARGEST_VALUE
