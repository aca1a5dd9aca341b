"""An axis as one input shows it, where several inputs run along it."""

from __future__ import annotations

import sympy

from lvsa_compile.axes.algebra import ARANGE, INPUT, LOST, Axis, Concat, Factor, Size, Source, concat


def narrowed(axis: Axis, node_name: str) -> Axis:
    """The axis as the input ``node_name`` alone shows it, where it shows it: other inputs are forgotten, so that its slices join."""
    result: list[Factor | Concat] = []
    for factor in axis:
        if isinstance(factor, Concat):
            result.extend(concat([narrowed(part, node_name) for part in factor.parts]))
            continue
        own = frozenset(digit for digit in factor.digits if digit.source.node_name == node_name and digit.source.kind == INPUT)
        digits = own | frozenset(digit for digit in factor.digits if digit.source.kind in (ARANGE, LOST))
        result.append(Factor(factor.size, digits) if own else factor)
    return tuple(result)


def in_order(axis: Axis, node_name: str) -> bool:
    """Whether no concatenation along the axis has slices of the input ``node_name`` in another order than the input has them."""
    last: dict[tuple[Source, Size], Size] = {}
    for factor in axis:
        for part in factor.parts if isinstance(factor, Concat) else ():
            if not in_order(part, node_name):
                return False
            here = [d for d in part[0].digits if d.source.node_name == node_name] if part and isinstance(part[0], Factor) else []
            keys = [(digit.source, digit.stride) for digit in here]
            if len(set(keys)) < len(keys):  # two slices of one axis at once
                return False
            for digit, key in zip(here, keys, strict=True):
                if key in last and not _grows(last[key], digit.start):
                    return False
                last[key] = digit.start + digit.size
    return True


def _grows(end: Size, start: Size) -> bool:
    return bool(sympy.sympify(start - end).is_nonnegative)
