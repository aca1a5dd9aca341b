"""Pass 2: the token layout of query and key at every site, from the graph itself."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable

from lvsa_compile.axes.algebra import LOST, Axis, leaves
from lvsa_compile.axes.call import Axes
from lvsa_compile.passes.compilation import Compilation
from lvsa_compile.passes.trace_layout.interpreter import run_on_fakes
from lvsa_compile.passes.trace_layout.mask_form import mask_form
from lvsa_compile.passes.trace_layout.packed import packed_evidence, refined
from lvsa_compile.passes.trace_layout.token_layout import grid_places, token_layout, video_inputs
from lvsa_compile.patterns.site import AttentionSite

log = logging.getLogger(__name__)


def trace_layout(compilation: Compilation) -> Compilation:
    """Fills in ``layouts``: for each site's node the layouts of query and key, where both have a batch and a token axis."""
    sites = [site for site in compilation.sites if isinstance(site, AttentionSite)]
    if not sites:
        return compilation
    watched = {site.node: (site.query, site.key, site.value, *site.mask_parts) for site in sites}
    try:
        traced = run_on_fakes(compilation.graph_module, watched, compilation.example_inputs)
    except Exception as error:  # a graph that cannot be traced is dense and says so; it must not fail to compile
        log.debug("tracing failed", exc_info=True)
        return dataclasses.replace(compilation, trace_failure=f"tracing failed: {type(error).__name__}: {error}")
    if traced is None:
        return dataclasses.replace(compilation, trace_failure="the graph came without fake tensors to run on")
    pairs = {}
    for site in sites:
        query, key = (traced.found.get(site.node, {}).get(node, ()) for node in (site.query, site.key))
        if len(query) >= 3 and len(key) >= 3:
            pairs[site.node] = (query, key)
    tokens = [axes[-2] for pair in pairs.values() for axes in pair]
    evidence, contradictions = packed_evidence(tokens, traced.output_axes, traced.reader.look_at)
    for said in evidence.values():
        if said.relies_on:
            traced.reader.read(said.relies_on)

    def refine(axes: Axes) -> Axes:
        return tuple(refined(axis, evidence, contradictions) for axis in axes)

    pairs = {node: (refine(query), refine(key)) for node, (query, key) in pairs.items()}
    outputs = [refine(axes) for axes in traced.output_axes]
    targets = video_inputs(axis for axes in outputs for axis in axes)
    if not targets:  # the way to the outputs was lost; where one video alone is attended, it is the one
        shown = [grid_places(axes[-2]) for pair in pairs.values() for axes in pair]
        candidates = frozenset[str]().union(*shown) & _lost_on_the_way(outputs)
        targets = dict.fromkeys(candidates, frozenset[int]()) if len(candidates) == 1 else {}
    layouts = {
        node: (
            token_layout(query[-2], _outside_tokens(query), targets, contradictions),
            token_layout(key[-2], _outside_tokens(key), targets, contradictions),
        )
        for node, (query, key) in pairs.items()
    }
    masks = {
        site.node: mask_form(site.mask_parts, [traced.found.get(site.node, {}).get(part, ()) for part in site.mask_parts], traced.constant)
        for site in sites
        if site.mask is not None
    }
    return dataclasses.replace(compilation, layouts=layouts, masks=masks, has_video=bool(targets), reader=traced.reader)


def _lost_on_the_way(outputs: Iterable[Axes]) -> frozenset[str]:
    """Places of inputs that an output may count, though in what order was lost."""
    lost = (d.source.origins for axes in outputs for axis in axes for f in leaves(axis) for d in f.digits if d.source.kind == LOST)
    return frozenset[str]().union(*lost)


def _outside_tokens(axes: Axes) -> Axis:
    return tuple(factor for axis in axes[:-2] for factor in axis)
