"""Traces the token layout of query and key at every site, from the graph itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.axes.algebra import INPUT, LOST, Axis, Source, axis_size, leaves, origins
from lvsa_compile.axes.call import Axes
from lvsa_compile.axes.carried import is_known_video, shows_generated
from lvsa_compile.axes.opaque import expanded
from lvsa_compile.forward import context
from lvsa_compile.forward.explicit_step import explicit_step
from lvsa_compile.forward.labels import annotation_of
from lvsa_compile.forward.timestep_names import says_timestep
from lvsa_compile.layout.carry import outgoing_annotation
from lvsa_compile.layout.continuing import continuing, given_frames
from lvsa_compile.layout.denoiser import why_no_denoiser
from lvsa_compile.layout.evidence import LayoutEvidence, collect_evidence
from lvsa_compile.layout.graph_trace import LayoutInterpreter, input_kind, run_on_fakes
from lvsa_compile.layout.lost import after
from lvsa_compile.layout.mask_form import MaskForm, mask_form
from lvsa_compile.layout.token_layout import token_layout
from lvsa_compile.ops.sequences import SAME_SEQUENCE
from lvsa_compile.passes.compilation import Compilation
from lvsa_compile.patterns.site import AttentionSite


def trace_layout(compilation: Compilation) -> Compilation:
    """Fills in ``layouts``: for each site's node the layouts of query and key, where both have a batch and a token axis.

    And ``outgoing``: what the next graph of the same forward should know of this one's outputs.
    """
    sites = [site for site in compilation.sites if isinstance(site, AttentionSite)]
    if not sites and not compilation.position.leads_on:
        return compilation
    masks_of = {site.node: (*site.mask_parts, site.mask) for site in sites if site.mask is not None}
    watched: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for site in sites:
        if site.mask is not None and site.mask.target is SAME_SEQUENCE:
            watched[site.mask] = (site.mask.all_input_nodes[0],)
        watched[site.node] = (site.query, site.key, site.value, *masks_of.get(site.node, ()))
    unwritten = {site.node: site.mask_unwritten for site in sites}
    brought = _brought(compilation)
    traced = run_on_fakes(compilation.graph_module, watched, compilation.example_inputs, brought, unwritten, compilation.assumed)
    if traced is None:
        return dataclasses.replace(compilation, trace_failure="the graph came without fake tensors to run on")
    pairs = {}
    for site in sites:
        query, key = (traced.found.get(site.node, {}).get(node, ()) for node in (site.query, site.key))
        if len(query) >= 3 and len(key) >= 3:
            pairs[site.node] = (query, key)
    tokens = [axes[-2] for pair in pairs.values() for axes in pair]
    relations = traced.tracker.relations
    now = None if relations is None else relations.now
    seen, unannotated = collect_evidence(tokens, traced.output_axes, traced.reader, now), _not_annotated(compilation, brought)
    if context.parent.get() is not None and compilation.position.continues:  # then every input that may show the video is annotated
        guessed, untold = frozenset(seen.targets.keys() - _names_in(brought)), frozenset[str]()
    else:
        guessed = untold = unannotated - _shown_elsewhere([*tokens, *(axis for axes in seen.outputs.values() for axis in axes)])
    seen = dataclasses.replace(seen, targets={node_name: axes for node_name, axes in seen.targets.items() if node_name not in guessed})
    outputs = None if compilation.position.breaks else _outputs(compilation.graph_module.graph)
    not_denoiser = why_no_denoiser(seen.targets, [*map(expanded, tokens)], outputs, _has_time(compilation), traced.tracker.convolved)
    if not_denoiser:
        seen = dataclasses.replace(seen, targets={})
    layouts = {
        node: (
            token_layout(query[-2], _outside_tokens(query), seen.targets, seen.contradictions),
            token_layout(key[-2], _outside_tokens(key), seen.targets, seen.contradictions),
        )
        for node, (query, key) in ((node, (seen.refine(query), seen.refine(key))) for node, (query, key) in pairs.items())
    }
    around = context.parent.get()
    given = given_frames(layouts.values()) | (around.given if around is not None else frozenset())
    if around is not None:
        around.given = given
    layouts = {node: continuing(query, key, given) for node, (query, key) in layouts.items()}
    masks = {site.node: _mask_form(site, site.mask, traced) for site in sites if site.mask is not None}
    told = {position: axes for position, axes in seen.outputs.items() if not (untold & origins(axes))}
    outgoing = _outgoing(dataclasses.replace(seen, outputs=told), compilation, brought)
    return dataclasses.replace(
        compilation,
        layouts=layouts,
        masks=masks,
        video_inputs=frozenset(seen.targets),
        cut_off=_cut_off(compilation, pairs, brought, unannotated),
        output_lost=_output_lost(seen, compilation.graph_module.graph),
        not_denoiser=not_denoiser,
        reader=traced.reader,
        noticed=() if relations is None else tuple(relations.noticed),
        outgoing=outgoing,
        passed_on=_passed_on(traced, outgoing, brought) if compilation.position.leads_on else (),
    )


def _cut_off(
    compilation: Compilation, pairs: Mapping[fx.Node, tuple[Axes, Axes]], brought: Mapping[str, Axes], unannotated: Collection[str]
) -> frozenset[fx.Node]:
    """Sites whose query may be the video, since it comes from an earlier graph that told nothing of it and is not too short."""
    sizes = [axis_size(axis) for axes in brought.values() if shows_generated(axes) for axis in axes]
    least = max([size for size in sizes if isinstance(size, int)] + [compilation.forward.least_tokens])

    def long_enough(tokens: Axis) -> bool:
        size = axis_size(tokens)
        return not isinstance(size, int) or size >= least

    return frozenset(node for node, (query, _) in pairs.items() if origins(query) & set(unannotated) and long_enough(query[-2]))


def _names_in(brought: Mapping[str, Axes]) -> frozenset[str]:
    """Names of inputs of the forward that annotations tell of."""
    return frozenset(node_name for axes in brought.values() for node_name in origins(axes))


def _shown_elsewhere(axes: Iterable[Axis]) -> frozenset[str]:
    """Names of inputs along which a grid that an earlier graph told of runs, too."""
    others: dict[str, set[Source]] = {}
    for sources in ({digit.source for digit in factor.digits} for axis in axes for factor in leaves(axis)):
        for source in sources:
            others.setdefault(source.node_name, set()).update(other for other in sources if other.node_name != source.node_name)
    return frozenset(node_name for node_name, found in others.items() if any(is_known_video(other.node_name) for other in found))


def _not_annotated(compilation: Compilation, brought: Collection[str]) -> frozenset[str]:
    """Inputs that come from an earlier part of a broken forward, not from the caller, and of which that part told nothing."""
    if not compilation.forward.broken:
        return frozenset()
    given = context.given_tensors()
    placeholders = [node for node in compilation.graph_module.graph.nodes if node.op == "placeholder"]
    return frozenset(
        node.name
        for node, value in zip(placeholders, compilation.example_inputs, strict=False)
        if input_kind(node)[0] == INPUT and node.name not in brought and id(value) not in given
        if isinstance(value, Tensor) and value.is_floating_point()
    )


def _output_lost(seen: LayoutEvidence, graph: fx.Graph) -> str:
    """The op, and its line, after which the way of a video to the outputs was lost; "" where it was not."""
    lost = [digit.source for axes in seen.outputs.values() for axis in axes for f in leaves(axis) for digit in f.digits]
    found = next((source for source in lost if source.kind == LOST and source.origins), None)
    return "" if found is None else after(found.name, found.node_name, graph)


def _has_time(compilation: Compilation) -> bool:
    """Whether a timestep is known: an input of this graph or of an earlier one, a step that the user says, or what a forward asks for."""
    known = compilation.timestep
    if (known and (known.value is None or says_timestep(known.name))) or compilation.clock_before or explicit_step() is not None:
        return True
    kinds = {kind for site in compilation.sites for kind, _ in context.modules_around(site.node)}
    return any(says_timestep(name) for kind in kinds for name in compat.required_parameters(kind))


def _outputs(graph: fx.Graph) -> list[Tensor]:
    """What a graph returns."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    return [value for node in output.all_input_nodes if isinstance(value := compat.example_value(node), Tensor)]


def _mask_form(site: AttentionSite, mask: fx.Node, traced: LayoutInterpreter) -> MaskForm | None:
    """What a site's mask says: by its parts, or as a whole where one of them, or the mask itself, was written to since."""
    if mask.target is SAME_SEQUENCE:
        return MaskForm(sequences=mask, ends=traced.constant(mask, mask.all_input_nodes[0]))
    parts = (mask,) if site.node in traced.written else site.mask_parts
    axes = [traced.found.get(site.node, {}).get(part, ()) for part in parts]
    return mask_form(parts, axes, lambda part: traced.constant(site.node, part))


def _brought(compilation: Compilation) -> dict[str, Axes]:
    """Axes of inputs that an earlier graph of the same forward told, by placeholder; their sizes are fixed."""
    if not compilation.position.continues:
        return {}
    placeholders = [node for node in compilation.graph_module.graph.nodes if node.op == "placeholder"]
    found = {}
    for node, value in zip(placeholders, compilation.example_inputs, strict=False):
        axes = annotation_of(value) if isinstance(value, Tensor) else None
        fake = compat.example_value(node)
        if axes is not None and all(compat.specialise(size, fake) is not None for size in fake.shape):
            found[node.name] = axes
    return found


def _outgoing(seen: LayoutEvidence, compilation: Compilation, brought: Mapping[str, Axes]) -> tuple[tuple[int, Axes], ...]:
    """What is to be said of the outputs, by position.

    An output that is as an input was is said to be what was said of that, so that all blocks of a kind get the same.  Of several videos
    that may be generated it is not known here which one is, unless they run along one axis, as items of a batch do.
    """
    if not compilation.position.leads_on:
        return ()
    graph = compilation.graph_module.graph
    factors = [factor for axes in seen.outputs.values() for axis in axes for factor in leaves(axis)]
    together = any(seen.targets.keys() <= {digit.source.node_name for digit in factor.digits} for factor in factors)
    generated = seen.targets if together else {}
    around = context.parent.get() is not None
    tokens = {position: axes for position, axes in seen.outputs.items() if len(axes) < 5 or around}  # a latent shows its grid to a graph

    def annotation(axes: Axes) -> Axes | None:
        return outgoing_annotation(axes, generated, lambda lost: after(lost.name, lost.node_name, graph))

    as_before = {annotation(seen.refine(axes)): axes for axes in brought.values()}
    found = ((position, annotation(axes)) for position, axes in tokens.items())
    return tuple((position, as_before.get(axes, axes)) for position, axes in found if axes is not None)


def _passed_on(
    traced: LayoutInterpreter, outgoing: tuple[tuple[int, Axes], ...], brought: Mapping[str, Axes]
) -> tuple[tuple[int, Axes], ...]:
    """Axes of outputs of which nothing is said, as far as they run along inputs of which nothing was said either."""
    annotated = {position for position, _ in outgoing}
    others = {position: axes for position, axes in traced.output_axes.items() if position not in annotated}
    return tuple((position, axes) for position, axes in others.items() if origins(axes) - brought.keys())


def _outside_tokens(axes: Axes) -> Axis:
    return tuple(factor for axis in axes[:-2] for factor in axis)
