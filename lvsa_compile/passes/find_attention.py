"""Pass 1: find every attention in the graph, in whatever form."""

from __future__ import annotations

import dataclasses

from torch import fx

from lvsa_compile.passes.compilation import Compilation
from lvsa_compile.patterns import other_forms, own_sparse, sdpa
from lvsa_compile.patterns.site import AttentionSite, DenseSite
from lvsa_compile.reasons import INSIDE_SUBGRAPH

FORMS = (sdpa.match, own_sparse.match, other_forms.match)
"""The forms of attention, tried in order."""


def find_attention(compilation: Compilation) -> Compilation:
    """Fills in ``sites``: those of the graph itself, then those of nested subgraphs, which stay dense."""
    graph_module = compilation.graph_module
    sites = [site for node in graph_module.graph.nodes if (site := _match(node)) is not None]
    for name, module in graph_module.named_modules():
        if name and isinstance(module, fx.GraphModule):
            inner = (site for node in module.graph.nodes if (site := _match(node)) is not None)
            sites.extend(DenseSite(site.node, INSIDE_SUBGRAPH.because(f"it is in {name}")) for site in inner)
    return dataclasses.replace(compilation, sites=tuple(sites))


def _match(node: fx.Node) -> AttentionSite | DenseSite | None:
    return next((site for form in FORMS if (site := form(node)) is not None), None)
