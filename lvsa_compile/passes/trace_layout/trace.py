"""Pass 2: the token layout of query and key at every site, from the graph itself."""

from __future__ import annotations

import dataclasses
import logging

from lvsa_compile.passes.compilation import Compilation
from lvsa_compile.passes.trace_layout.axes import Axis
from lvsa_compile.passes.trace_layout.call import Axes
from lvsa_compile.passes.trace_layout.token_layout import token_layout, video_inputs
from lvsa_compile.passes.trace_layout.tracer import run_on_fakes
from lvsa_compile.patterns.site import AttentionSite

log = logging.getLogger(__name__)


def trace_layout(compilation: Compilation) -> Compilation:
    """Fills in ``layouts``: for each site's node the layouts of query and key, where both have a batch and a token axis."""
    sites = [site for site in compilation.sites if isinstance(site, AttentionSite)]
    if not sites:
        return compilation
    watched = {site.node: (site.query, site.key, site.value) for site in sites}
    try:
        traced = run_on_fakes(compilation.graph_module, watched)
    except Exception as error:  # a graph that cannot be traced is dense and says so; it must not fail to compile
        log.debug("tracing failed", exc_info=True)
        return dataclasses.replace(compilation, trace_failure=f"tracing failed: {type(error).__name__}: {error}")
    if traced is None:
        return dataclasses.replace(compilation, trace_failure="the graph came without fake tensors to run on")
    targets = video_inputs(axis for axes in traced.output_axes for axis in axes)

    layouts = {}
    for site in sites:
        found = traced.found.get(site.node, {})
        axes = [found.get(node) for node in (site.query, site.key)]
        query, key = (token_layout(a[-2], _outside_tokens(a), targets) if a is not None and len(a) >= 3 else None for a in axes)
        if query is not None and key is not None:
            layouts[site.node] = (query, key)
    return dataclasses.replace(compilation, layouts=layouts, has_video=bool(targets))


def _outside_tokens(axes: Axes) -> Axis:
    return tuple(factor for axis in axes[:-2] for factor in axis)
