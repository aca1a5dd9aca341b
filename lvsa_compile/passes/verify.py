"""Checks that the rewritten graph keeps what the inner compiler and the run-time call rely on."""

from __future__ import annotations

from torch import Tensor

from lvsa_compile.compat import example_value
from lvsa_compile.errors import RewriteError
from lvsa_compile.passes.compilation import Compilation


def verify(compilation: Compilation) -> Compilation:
    """Checks the graph.

    Raises:
        RewriteError: an invariant is broken; names it.
    """
    graph = compilation.graph_module.graph
    graph.lint()
    nodes = list(graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    if nodes[: len(placeholders)] != placeholders:
        raise RewriteError("all inputs come before the first operation")
    appended = placeholders[len(placeholders) - len(compilation.extra_inputs) :]
    if [node.name for node in appended] != [extra.name for extra in compilation.extra_inputs]:
        raise RewriteError("the appended inputs are the last ones, in order")
    if any(example_value(node) is None for node in appended):
        raise RewriteError("appended inputs have example values")
    for decision in compilation.sparse:
        assert decision.plan is not None
        operator = decision.plan.choice.lowering.operator
        if decision.node.graph is not graph or (operator is not None and decision.node.target is not operator):
            raise RewriteError(f"site {decision.name} has the op of its lowering")
        if not all(isinstance(value, Tensor) for value in decision.node.meta.get("example_value", (None,))):
            raise RewriteError(f"site {decision.name} has example values, without which torch's caches are bypassed")
    return compilation
