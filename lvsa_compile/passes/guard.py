"""The Dynamo guards that make it safe to rely on what was read while a graph was compiled."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx, nn

from lvsa_compile import compat
from lvsa_compile.axes.algebra import INPUT
from lvsa_compile.axes.values import Expectation
from lvsa_compile.forward import context
from lvsa_compile.forward.labels import SameAnnotation, annotation_of
from lvsa_compile.layout.graph_trace import input_kind
from lvsa_compile.layout.guarded_values import SameStructure, SameValue
from lvsa_compile.passes.compilation import Compilation


def guard(compilation: Compilation) -> None:
    """Has Dynamo compile anew where what was relied on no longer holds; also where all stays dense, which may be sparse then.

    An artifact that is compiled ahead of time is dense and can save no guard of ours.
    """
    if compat.compiling_ahead():
        return
    placeholders = [node for node in compilation.graph_module.graph.nodes if node.op == "placeholder"]
    if compilation.reader is not None:
        by_name = {node.name: node for node in placeholders}
        for node_name, held in compilation.reader.relied_on.items():
            compat.guard_input(by_name[node_name], SameValue(held), "holds the values that the token layout was read from")
        for node_name, expected in compilation.reader.expected.items():
            _guard_structure(by_name[node_name], tuple(expected), placeholders)
    block = compat.argument_scope().get("self")
    if context.parent.get() is not None and isinstance(block, nn.Module):
        hooks = compat.forward_hooks(block)
        compat.guard_self(lambda module: compat.forward_hooks(module) == hooks, "is a block with the same hooks")
    shows_nothing = bool(compilation.sites) and not compilation.has_video
    if shows_nothing or (compilation.position.continues and (compilation.sites or compilation.outgoing)):
        for node, value in zip(placeholders, compilation.example_inputs, strict=False):
            if isinstance(value, Tensor) and value.dim() >= 2 and input_kind(node)[0] == INPUT:
                compat.guard_input(node, SameAnnotation(annotation_of(value)), "carries the token layout it was compiled for")


def _guard_structure(node: fx.Node, expected: tuple[Expectation, ...], placeholders: Sequence[fx.Node]) -> None:
    """Has Dynamo compile anew where the values of an input are not as expected, given the sizes of others."""
    mode, shown = compat.fake_mode_of_graph(node.graph), compat.shown_by(placeholders)
    sizes = {size: compat.replaced(size, mode) for each in expected for size in each.sizes}
    hidden = compat.symbols_in(sizes.values()) - shown.keys()
    if hidden:  # no input shows them by themselves
        compat.settle(mode, compat.values_of(hidden, mode).items())
        sizes = {size: compat.replaced(size, mode) for size in sizes}
    symbols = sorted(compat.symbols_in(sizes.values()), key=str)
    nodes, axes = [node, *(shown[symbol][0] for symbol in symbols)], [None, *(shown[symbol][1] for symbol in symbols)]
    compat.guard_together(nodes, axes, SameStructure(expected, sizes, symbols), "has the structure that the token layout was read from")
