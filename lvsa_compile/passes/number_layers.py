"""Numbers the layers of a model that attend over the video, in the order in which its forward reaches them."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from torch import fx, nn

from lvsa_compile import compat
from lvsa_compile.forward import context
from lvsa_compile.passes.compilation import Compilation


def number_layers(sites: Iterable[fx.Node], compilation: Compilation) -> dict[fx.Node, int]:
    """The number of each site's layer, from 0, among those of the graph.

    Where a graph calls the model more than once, for further denoising steps or for guidance, the same layers come again.
    """
    of_step: dict[int, list[fx.Node]] = collections.defaultdict(list)
    for node in sites:
        of_step[compilation.step_of.get(node, 0)].append(node)
    calls_a_model = not isinstance(compat.root_scope().get("self"), nn.Module)
    numbers: dict[fx.Node, int] = {}
    for nodes in of_step.values():
        layers = _period([context.module_path(node) or node.name for node in nodes]) if calls_a_model else len(nodes)
        numbers |= {node: position % layers for position, node in enumerate(nodes)}
    return numbers


def _period(names: list[str]) -> int:
    """The length of the shortest list of which ``names`` are repetitions."""
    return next(length for length in range(1, len(names) + 1) if names == names[:length] * (len(names) // length))
