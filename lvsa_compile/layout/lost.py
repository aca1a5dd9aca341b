"""Where a trail was lost, in words."""

from __future__ import annotations

from torch import fx

from lvsa_compile import compat


def after(op: str, node_name: str, graph: fx.Graph) -> str:
    """The op and its line; of an op of an earlier graph, whose ``op`` has the line already, just that."""
    node = next((node for node in graph.nodes if node.name == node_name), None)
    return op if node is None else f"{op}, {compat.source_line(node)}"
