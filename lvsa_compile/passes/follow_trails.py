"""The way of each site's query through the graph, from the input that shows the video: for reports, and for finding where it was lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import networkx
from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.compat import example_value
from lvsa_compile.layout.graph_trace import input_kind
from lvsa_compile.layout.token_layout import UNKNOWN, TokenLayout
from lvsa_compile.passes.compilation import Compilation, Decision, TrailStep, sizes_of

_LONGEST_TRAIL = 24  # steps of a trail; of a longer one the beginning and the end


def follow_trails(compilation: Compilation) -> Compilation:
    """Fills in the ``trail`` of each decision; sparse or dense, it changes nothing else."""
    nodes = {node.name: node for node in compilation.graph_module.graph.nodes}
    flow = networkx.DiGraph((source, node) for node in nodes.values() for source in node.all_input_nodes)
    before: dict[fx.Node, dict[fx.Node, fx.Node]] = {}

    def way(start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """A shortest way from ``start`` to ``end``; empty where there is none."""
        if start not in before:
            before[start] = dict(networkx.bfs_predecessors(flow, start)) if start in flow else {}
        back = [end]
        while back[-1] is not start:
            if back[-1] not in before[start]:
                return []
            back.append(before[start][back[-1]])
        return back[::-1]

    def trail(decision: Decision) -> tuple[TrailStep, ...]:
        layouts = compilation.layouts.get(decision.node)
        end = decision.site.query if decision.site is not None else decision.node
        for start, lost_at in _ends(layouts[0]) if layouts else ():
            if start in nodes and (found := way(nodes[start], nodes.get(lost_at, end))):
                return _steps(found, lost=lost_at in nodes)
        return ()

    return dataclasses.replace(
        compilation, decisions=tuple(dataclasses.replace(decision, trail=trail(decision)) for decision in compilation.decisions)
    )


def _ends(layout: TokenLayout) -> Iterator[tuple[str, str]]:
    """Names of inputs that a query comes from and of the ops at which it was lost, "" where it was not; what was lost first."""
    for segment in layout.segments:
        if segment.kind == UNKNOWN:
            yield from ((origin, segment.lost_at) for origin in sorted(segment.origins))
    for segment in layout.segments:
        if segment.grid is not None:
            yield from ((source.node_name, "") for source in sorted(segment.grid.frame_sources, key=str))


def _steps(way: list[fx.Node], lost: bool) -> tuple[TrailStep, ...]:
    steps: list[TrailStep] = []
    for node in way:
        value = example_value(node)
        if isinstance(value, Tensor):
            op = input_kind(node)[1] if node.op == "placeholder" else getattr(node.target, "__name__", str(node.target))
            step = TrailStep(op, sizes_of(value), compat.source_line(node))
            if not steps or (step.op, step.shape) != (steps[-1].op, steps[-1].shape):
                steps.append(step)
    if lost and steps:
        steps[-1] = dataclasses.replace(steps[-1], lost=True)
    if len(steps) > _LONGEST_TRAIL:
        left_out = TrailStep("…", f"{len(steps) - _LONGEST_TRAIL} more", "")
        steps = [*steps[: _LONGEST_TRAIL // 2], left_out, *steps[-_LONGEST_TRAIL // 2 :]]
    return tuple(steps)
