"""The Dynamo guards that make it safe to rely on what was read while a graph was compiled."""

from __future__ import annotations

from torch import Tensor, nn

from lvsa_compile import compat
from lvsa_compile.axes.algebra import INPUT
from lvsa_compile.forward import context
from lvsa_compile.forward.labels import SameAnnotation, annotation_of
from lvsa_compile.layout.graph_trace import input_kind
from lvsa_compile.layout.guarded_values import SameValue
from lvsa_compile.passes.compilation import Compilation


def guard(compilation: Compilation) -> None:
    """Has Dynamo compile anew where what was relied on no longer holds; also where all stays dense, which may be sparse then.

    An artifact that is compiled ahead of time is dense and can save no guard of ours.
    """
    if compat.compiling_ahead():
        return
    placeholders = [node for node in compilation.graph_module.graph.nodes if node.op == "placeholder"]
    for node_name, held in (compilation.reader.relied_on if compilation.reader is not None else {}).items():
        node = next(node for node in placeholders if node.name == node_name)
        compat.guard_input(node, SameValue(held), "holds the values that the token layout was read from")
    block = compat.argument_scope().get("self")
    if context.parent.get() is not None and isinstance(block, nn.Module):
        hooks = compat.forward_hooks(block)
        compat.guard_self(lambda module: compat.forward_hooks(module) == hooks, "is a block with the same hooks")
    shows_nothing = bool(compilation.sites) and not compilation.has_video
    if shows_nothing or (compilation.position.continues and (compilation.sites or compilation.outgoing)):
        for node, value in zip(placeholders, compilation.example_inputs, strict=False):
            if isinstance(value, Tensor) and value.dim() >= 2 and input_kind(node)[0] == INPUT:
                compat.guard_input(node, SameAnnotation(annotation_of(value)), "carries the token layout it was compiled for")
