"""Finds every attention in the graph, in whatever form."""

from __future__ import annotations

import dataclasses

from torch import fx

from lvsa_compile.graph.edit import thread_writes
from lvsa_compile.passes.compilation import Compilation
from lvsa_compile.patterns import library_ops, linear_attention, multihead, other_forms, own_sparse, sdpa, written_out
from lvsa_compile.patterns.canonical import discard
from lvsa_compile.patterns.masks import parts_of
from lvsa_compile.patterns.site import AttentionSite, DenseSite
from lvsa_compile.reasons import INSIDE_SUBGRAPH

FORMS = (sdpa.match, own_sparse.match, written_out.match, multihead.match, library_ops.match, other_forms.match, linear_attention.match)
"""The forms of attention, tried in order."""


def find_attention(compilation: Compilation) -> Compilation:
    """Fills in ``sites``: those of the graph itself, then those of nested subgraphs, which stay dense."""
    graph_module = compilation.graph_module
    thread_writes(graph_module.graph)
    sites: list[AttentionSite | DenseSite] = [site for node in list(graph_module.graph.nodes) if (site := _match(node)) is not None]
    for name, module in graph_module.named_modules():
        if name and isinstance(module, fx.GraphModule):
            for site in [site for node in list(module.graph.nodes) if (site := _match(node)) is not None]:
                sites.append(DenseSite(site.node, INSIDE_SUBGRAPH.because(f"it is in {name}")))
                if isinstance(site, AttentionSite):
                    discard(site)
    sites, added = _with_mask_parts(sites)
    return dataclasses.replace(compilation, sites=tuple(sites), analysis_nodes=added)


def _with_mask_parts(sites: list[AttentionSite | DenseSite]) -> tuple[list[AttentionSite | DenseSite], tuple[fx.Node, ...]]:
    """The sites with the parts of their masks, each mask taken apart once; and the nodes that were added for it."""
    masks = dict.fromkeys(site.mask for site in sites if isinstance(site, AttentionSite) and site.mask is not None)
    parts = {mask: parts_of(mask) for mask in masks}
    whole = [
        dataclasses.replace(site, mask_parts=parts[site.mask].parts, mask_unwritten=parts[site.mask].unwritten)
        if isinstance(site, AttentionSite) and site.mask is not None
        else site
        for site in sites
    ]
    return whole, tuple(node for found in parts.values() for node in found.added)


def _match(node: fx.Node) -> AttentionSite | DenseSite | None:
    return next((site for form in FORMS if (site := form(node)) is not None), None)
