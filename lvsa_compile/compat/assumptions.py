"""Equalities of symbolic sizes: tried in a trace that leaves nothing behind, then guarded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from lvsa_compile.compat.graphs import example_value
from lvsa_compile.compat.sizes import as_int, known_only_at_run_time, size_expression, symbol_values

Equality = tuple[Any, Any]
"""Two sizes, ints or expressions, that are equal now."""


def symbols_of(size: Any) -> frozenset[Any]:
    """Symbols of a size that an input of the graph shows."""
    if not isinstance(size, torch.SymInt) or known_only_at_run_time(size):
        return frozenset()
    return frozenset(getattr(size_expression(size), "free_symbols", ()))


def symbols_in(sizes: Iterable[Any]) -> frozenset[Any]:
    """Symbols of some sizes, ints or expressions."""
    return frozenset[Any]().union(*(getattr(size, "free_symbols", ()) for size in sizes))


def values_of(symbols: Iterable[Any], fake_mode: Any) -> dict[Any, int]:
    """What symbols stand for in this compile, by symbol; adds no guard."""
    known = symbol_values(fake_mode)
    return {symbol: int(known[symbol]) for symbol in sorted(symbols, key=str) if symbol in known}


def suppose(fake_mode: Any, equalities: Iterable[Equality]) -> None:
    """Has every size computed from now on follow ``equalities``; for an ``isolated_run``, which forgets them."""
    environment = fake_mode.shape_env
    for left, right in equalities:
        difference = sympy.expand(environment.replace(sympy.sympify(left)) - environment.replace(sympy.sympify(right)))
        solutions = {
            symbol: sympy.expand(symbol - difference / difference.coeff(symbol))
            for symbol in sorted(difference.free_symbols, key=str, reverse=True)
            if difference.coeff(symbol) in (1, -1)
        }
        sums = [symbol for symbol, known in solutions.items() if all(n >= 0 for n in known.as_coefficients_dict().values())]
        for symbol in [*sums, *solutions][:1]:  # of a sum it is known that no part is longer than the whole
            environment._set_replacement(symbol, solutions[symbol], "lvsa: tried")


def settle(fake_mode: Any, equalities: Iterable[Equality]) -> None:
    """Adds the guards that make it safe to rely on ``equalities``."""
    for left, right in equalities:
        fake_mode.shape_env.evaluate_expr(sympy.Eq(left, right))


def symbols_of_input(value: Any, first_axis: int = 0) -> frozenset[Any]:
    """Symbols in the sizes of an input from ``first_axis`` on, or of a number."""
    sizes = value.shape[first_axis:] if isinstance(value, Tensor) else (value,)
    return frozenset[Any]().union(*map(symbols_of, sizes))


def replaced(size: Any, fake_mode: Any) -> Any:
    """A size in the symbols that are left after what is known to be equal."""
    return size if isinstance(size, int) else as_int(fake_mode.shape_env.replace(size))


def shown_by(placeholders: Iterable[fx.Node]) -> dict[Any, tuple[fx.Node, int | None]]:
    """Symbols that an input shows by itself: by an axis of a tensor, or as a number, then None."""
    found: dict[Any, tuple[fx.Node, int | None]] = {}
    for node in placeholders:
        value = example_value(node)
        sizes = enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]
        for axis, size in sizes:
            expression = size_expression(size) if isinstance(size, torch.SymInt) else None
            if getattr(expression, "is_Symbol", False):
                found.setdefault(expression, (node, axis))
    return found


def made_numbers(equalities: Iterable[Equality]) -> list[Any]:
    """Symbols that are numbers if ``equalities`` hold."""
    differences = [sympy.sympify(left) - sympy.sympify(right) for left, right in equalities]
    found: dict[Any, None] = {}
    for _ in differences:
        for difference in differences:
            left = difference.free_symbols - found.keys()
            found.update(dict.fromkeys(left) if len(left) == 1 else {})
    return sorted(found, key=str)
