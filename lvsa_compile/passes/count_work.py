"""How much a graph computes as it came from Dynamo, all of it dense: so that a report can say what sparse attention is worth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from lvsa_compile.compat import example_value
from lvsa_compile.passes.compilation import Compilation


def _by_inner_size(argument: int) -> Callable[[Tensor, list[Tensor]], float]:
    """A matrix product whose operand at ``node_name`` ends in the axis that is summed over."""
    return lambda out, given: 2.0 * out.numel() * given[argument].shape[-1]


def _convolution(out: Tensor, given: list[Tensor]) -> float:
    return 2.0 * out.numel() * math.prod(given[1].shape[1:])


def _attention(out: Tensor, given: list[Tensor]) -> float:
    query, key, value = given[:3]
    return 2.0 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


WORK: dict[str, Callable[[Tensor, list[Tensor]], float]] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "__matmul__"), _by_inner_size(0)),
    **dict.fromkeys(("addmm", "baddbmm"), _by_inner_size(1)),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "scaled_dot_product_attention": _attention,
}
"""Floating-point operations of the ops that nearly all of a model's work is in, from their result and their tensors."""


def count_work(compilation: Compilation) -> Compilation:
    """Fills in ``flops``: those of the whole graph, 0 where a size is not a number."""
    whole = sum(_flops(node) for node in compilation.graph_module.graph.nodes)
    return dataclasses.replace(compilation, flops=0.0 if math.isnan(whole) else whole)


def _flops(node: fx.Node) -> float:
    count = WORK.get(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
    out: Any = example_value(node)
    if count is None or node.op not in ("call_function", "call_method") or not isinstance(out, Tensor):
        return 0.0
    given = [value for source in _operands(node) if isinstance(value := example_value(source), Tensor)]
    if any(not isinstance(size, int) for tensor in (out, *given) for size in tensor.shape):
        return math.nan
    try:
        return count(out, given)
    except IndexError:  # spelled so that its operands do not come in order: a small part of the whole
        return 0.0


def _operands(node: fx.Node) -> list[fx.Node]:
    given = [*node.args, *node.kwargs.values()]
    return [source for source in given if isinstance(source, fx.Node)]
