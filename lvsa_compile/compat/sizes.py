"""Sizes that may be symbols: hints, comparisons, numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from lvsa_compile.compat.fakes import fake_mode_of
from lvsa_compile.compat.graphs import example_value, source_name


def size_hint(size: Any) -> int:
    """An int as it is, a symbolic size as the value it has in this compile; adds no guard."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1 << 40


def statically_true(condition: Any) -> bool:
    """Whether a condition on symbolic sizes holds for all values; never adds a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def holds_here(condition: Any) -> bool:
    """Whether a condition on symbolic sizes holds in this compile, which is guarded; False where only run time shows it."""
    if isinstance(condition, torch.SymBool) and condition.node.hint is None:
        return statically_true(condition)
    return bool(condition)


def size_expression(size: Any) -> Any:
    """An int or an expression as it is, a symbolic size as its sympy expression (hashable, and combinable without guards)."""
    if not isinstance(size, torch.SymInt):
        return size
    return as_int(size.node.expr)


def as_int(expression: Any) -> Any:
    """An expression as an int where it is a number."""
    return int(expression) if expression.is_number else expression


def known_only_at_run_time(size: Any) -> bool:
    """Whether a size comes from a value that was read, so that no input shows it (an unbacked symbol)."""
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    expression = sympy.sympify(size_expression(size))
    return any(symbol_is_type(symbol, SymT.UNBACKED_INT) for symbol in expression.free_symbols)


def symbol_positions(graph_module: fx.GraphModule) -> dict[Any, int]:
    """Symbols of sizes that are inputs of a graph by themselves, and their positions."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    sizes = ((position, example_value(node)) for position, node in enumerate(placeholders))
    return {size_expression(size): position for position, size in sizes if isinstance(size, torch.SymInt)}


def number_of(size: Any, symbols: Mapping[Any, int]) -> int:
    """A size as an int, given what its symbols stand for; -1 where that is not known."""
    value = size if isinstance(size, int) else size.subs(symbols)
    return int(value) if getattr(value, "is_number", True) else -1


def settle_slice(output: Tensor, dim: int, low: Any, high: Any, size: Any) -> None:
    """Says that ``x[low:high]`` of an axis of ``size`` has ``high - low`` elements, where its bounds are sure to lie within the axis.

    torch gives a slice by sizes that only run time knows a new symbol each time it is traced, so that equal lengths look different.
    Only for tensors of a trace of our own: the symbol is forgotten with it.
    """
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    mode, symbol = fake_mode_of(output), size_expression(output.shape[dim])
    if mode is None or isinstance(symbol, int) or not symbol.is_Symbol or not free_unbacked_symbols(output.shape[dim]):
        return
    environment, length = mode.shape_env, high - low
    known = set().union(*(getattr(bound, "free_symbols", ()) for bound in (low, high, size)))
    if symbol not in known and all(isinstance(n, int) or environment.bound_sympy(n).lower >= 0 for n in (low, length, size - high)):
        environment._set_replacement(symbol, sympy.sympify(length), "lvsa: a slice within its axis")


def specialise(size: Any, tensor: Tensor) -> int | None:
    """A symbolic size as the int it has now, with the guard that says so.

    None where the size is known only at run time, and where the user marked an axis dynamic that the guard would fix.
    """
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    expression = size_expression(size)
    if isinstance(expression, int):
        return expression
    mode = fake_mode_of(tensor)
    if mode is None or mode.shape_env is None or free_unbacked_symbols(expression) or marked_dynamic(size, tensor):
        return None
    return int(mode.shape_env.evaluate_expr(expression))


def size_now(size: Any, tensor: Tensor) -> int:
    """A size as it is, an expression as the value it has in this compile, or -1 where only run time knows it; adds no guard."""
    return value_now(size_expression(size), fake_mode_of(tensor))


def value_now(expression: Any, fake_mode: Any) -> int:
    """``size_now`` of an int or an expression in the symbols of a fake mode."""
    if isinstance(expression, int) or fake_mode is None or fake_mode.shape_env is None:
        return expression if isinstance(expression, int) else -1
    value = fake_mode.shape_env.replace(expression).subs(symbol_values(fake_mode))
    return int(value) if value.is_number else -1


def symbol_values(fake_mode: Any) -> Mapping[Any, Any]:
    """What the symbols of a fake mode that inputs show stand for in this compile."""
    environment = fake_mode.shape_env
    found: Mapping[Any, Any] | None = getattr(environment, "backed_var_to_val", None)
    return environment.var_to_val if found is None else found  # the older name warns where there is the newer


def marked_dynamic(size: Any, tensor: Tensor) -> str:
    """The input and axis with ``torch._dynamo.mark_dynamic`` that a guard on a size would fix, as Dynamo would refuse; "" for none."""
    from torch.utils._sympy.solve import try_solve

    expression, mode = size_expression(size), fake_mode_of(tensor)
    environment = None if mode is None else mode.shape_env
    if environment is None or isinstance(expression, int):
        return ""
    now = sympy.Eq(expression, size_now(expression, tensor), evaluate=False)
    for tracked in environment.tracked_fakes or ():
        for axis, mark in enumerate(getattr(tracked.symbolic_context, "constraint_sizes", None) or ()):
            symbol = size_expression(tracked.fake.shape[axis]) if mark is not None and not mark.warn_only else None
            if symbol in expression.free_symbols and try_solve(now, symbol, floordiv_inequality=False):
                return f"axis {axis} of {source_name(tracked.source)}"
    return ""
