"""Decides what becomes of each site: sparse with a plan, or dense with one reason."""

from __future__ import annotations

import dataclasses
import itertools

import numpy
from torch import Tensor, fx

from lvsa_compile import compat, reasons
from lvsa_compile.axes.values import Array
from lvsa_compile.compat import example_value
from lvsa_compile.errors import LoweringUnavailableError, OptionError
from lvsa_compile.forward import context
from lvsa_compile.layout.mask_form import MaskForm
from lvsa_compile.layout.sequences import VideoInOneSequence
from lvsa_compile.layout.token_layout import VIDEO, TokenLayout
from lvsa_compile.ops.attention import check_op
from lvsa_compile.options import Options
from lvsa_compile.passes.compilation import Compilation, Decision, Segments, SparsePlan, sizes_of
from lvsa_compile.passes.number_layers import number_layers
from lvsa_compile.passes.why_not_video import why_not_video
from lvsa_compile.patterns.site import AttentionSite, DenseSite
from lvsa_compile.policies.contract import BATCH, Geometry, Plan, Policy, plan_of, why_not
from lvsa_compile.policies.tables import Range, VideoSpan
from lvsa_compile.reasons import Miss
from lvsa_compile.selection.contract import AttentionCall
from lvsa_compile.selection.measure import seconds_of_dense
from lvsa_compile.selection.select import lowerings, select

_NEEDED = ("trace_layout", "rewrite", "lower", "find_horizon")
"""Passes without which no site can be sparse, the last where the policy asks for the training horizon."""


def decide(compilation: Compilation) -> Compilation:
    """Fills in ``decisions``, one per site, and ``specialised``, the symbolic sizes that had to be fixed."""
    options = compilation.options
    if options.dense_layers and compilation.sites and _is_block(compilation):
        raise OptionError(
            "dense_layers", list(options.dense_layers), "what is compiled is a block, which serves many layers",
            "Compile the whole model to choose among its layers.",
        )  # fmt: skip
    decisions: list[Decision] = []
    specialised = list(compilation.specialised)
    outcomes = [_outcome(site, compilation, specialised) for site in compilation.sites]
    sparse = [site.node for site, outcome in zip(compilation.sites, outcomes, strict=True) if isinstance(outcome, SparsePlan)]
    layers = number_layers(sparse, compilation)
    sparse_sites = 0
    for site, outcome in zip(compilation.sites, outcomes, strict=True):
        layer = layers.get(site.node, 0)
        if isinstance(outcome, SparsePlan):
            if layer in options.dense_layers:
                outcome = reasons.DENSE_LAYER.because(f"video site {layer} is in dense_layers={list(options.dense_layers)}")
            elif options.dense_layers and compilation.in_eager_code:
                outcome = reasons.DENSE_LAYER.because(
                    f"attention in eager code has no number in the model's order, and dense_layers={list(options.dense_layers)}",
                    "Leave dense_layers out, or mend the graph break, so that the site is in a graph.",
                )
            elif options.max_sites is not None and sparse_sites >= options.max_sites:
                outcome = reasons.MAX_SITES.because(f"max_sites={options.max_sites}")
            else:
                sparse_sites += 1
        decisions.append(dataclasses.replace(_decision(site, outcome, compilation), layer=layer))
    if any(decision.plan is not None for decision in decisions):  # what is in another form is then most likely not over the video
        decisions = [_not_mendable(each) if each.site is None else each for each in decisions]
    return dataclasses.replace(compilation, decisions=tuple(decisions), specialised=tuple(dict.fromkeys(specialised)))


def _outcome(site: AttentionSite | DenseSite, compilation: Compilation, specialised: list[str]) -> SparsePlan | Miss:
    if isinstance(site, DenseSite):
        return site.miss
    return _decide(site, compilation.layouts.get(site.node), compilation, specialised)


def _not_mendable(decision: Decision) -> Decision:
    return dataclasses.replace(decision, mendable=False)


def _decision(site: AttentionSite | DenseSite, outcome: SparsePlan | Miss, compilation: Compilation) -> Decision:
    layouts = compilation.layouts.get(site.node)
    name, shown = context.module_path(site.node) or site.node.name, _shown(layouts)
    attention = site if isinstance(site, AttentionSite) else None
    segments, key_segments = (_segments(layout) for layout in layouts) if layouts else ((), ())
    decision = Decision(name, site.node, attention, shown, segments=segments, key_segments=key_segments if key_segments != segments else ())
    if isinstance(outcome, SparsePlan):
        return dataclasses.replace(decision, plan=outcome)
    decision = dataclasses.replace(decision, mendable=_is_mendable(outcome, compilation))
    form = compilation.masks.get(site.node) if _could_be_masked(attention, outcome) and _takes_masks_apart(compilation.options) else None
    apart = form if form is not None and form.queries and form.pairs is None else None
    return dataclasses.replace(decision, mask=apart, miss=outcome)


def _takes_masks_apart(options: Options) -> bool:
    return options.lower_padding_masks and "rewrite" not in options.disable_passes


def _is_mendable(miss: Miss, compilation: Compilation) -> bool:
    """Whether attention over a video is dense for a reason that the user can mend, as far as can be told."""
    known = compilation.has_video or compilation.forward.shows_video or miss.reason is reasons.FORWARD_NOT_CALLED
    if miss.reason is reasons.NO_GRID and compilation.timestep is not None:
        return False  # a whole model, of images or of text
    return known and miss.reason.mendable and may_be_sparse(compilation)


def may_be_sparse(compilation: Compilation) -> bool:
    """Whether the video that goes into the forward may be long enough for a pattern that skips something, as far as its shape tells."""
    frames, horizon, options = compilation.forward.frames, compilation.horizon, compilation.options
    if not frames or horizon is None or not options.chosen_policy.needs_horizon or options.chosen_at_horizon is not None:
        return not frames or max(frames) > 1
    misses = (why_not(options.chosen_policy, Geometry.of_frames(each), compilation.facts) for each in frames)
    return horizon.if_pixels > 0 or any(miss is None for miss in misses)


def _is_block(compilation: Compilation) -> bool:
    """Whether one graph serves many blocks of a model."""
    around = context.parent.get()
    if around is not None:
        return around.ticks and not compilation.in_eager_code and compat.root_scope().get("self") is not around.model
    return not compilation.has_video and context.is_whole_of_compiled()


def _segments(layout: TokenLayout) -> Segments:
    return tuple((segment.kind, str(segment), segment.size if isinstance(segment.size, int) else 0) for segment in layout.segments)


def _could_be_masked(site: AttentionSite | None, miss: Miss) -> bool:
    """Whether a dense site is plain attention of inference, as it stands in the graph."""
    plain = site is not None and not site.causal and site.replacement is None
    return plain and miss.reason not in (reasons.TRAINING, reasons.DROPOUT)


def _shown(layouts: tuple[TokenLayout, TokenLayout] | None) -> str:
    if layouts is None:
        return ""
    query, key = map(str, layouts)
    return query if query == key else f"{query} -> {key}"


def _decide(
    site: AttentionSite, layouts: tuple[TokenLayout, TokenLayout] | None, compilation: Compilation, specialised: list[str]
) -> SparsePlan | Miss:
    needed = _NEEDED if compilation.options.chosen_policy.needs_horizon else _NEEDED[:-1]
    off = [name for name in needed if name in compilation.options.disable_passes]
    if off:
        return reasons.PASS_DISABLED.because(f"disable_passes={off}")
    query, key, value = (example_value(node) for node in (site.query, site.key, site.value))
    if any(isinstance(t, Tensor) and t.requires_grad for t in (query, key, value)):
        return reasons.TRAINING.because()
    if not (isinstance(site.dropout, (int, float)) and site.dropout == 0.0):
        return reasons.DROPOUT.because(f"dropout_p={site.dropout}")
    if layouts is None:
        return reasons.LAYOUT_UNKNOWN.because(compilation.trace_failure or compat.source_line(site.node))
    miss = why_not_video(site.node, *layouts, compilation)
    if miss is not None:
        return miss
    if site.causal:
        return reasons.CAUSAL.because()
    form = compilation.masks.get(site.node)
    if site.mask is not None:
        mask = example_value(site.mask)
        if not compilation.options.lower_padding_masks:
            return reasons.MASK_NOT_EXPRESSIBLE.because("lower_padding_masks=False")
        if form is None:
            return reasons.MASK_NOT_EXPRESSIBLE.because(f"attn_mask is {mask.dtype} {sizes_of(mask)}" if isinstance(mask, Tensor) else "")
    if not _shapes_supported(query, key, value):
        named = zip(("query", "key", "value"), (query, key, value), strict=True)
        return reasons.SHAPE_NOT_SUPPORTED.because(", ".join(f"{name} {sizes_of(tensor)} {tensor.dtype}" for name, tensor in named))
    if compilation.horizon is None and compilation.options.chosen_policy.needs_horizon:
        return reasons.HORIZON_UNKNOWN.because(compilation.horizon_missing)
    query_span, key_span = (_span(layout, tensor, specialised) for layout, tensor in zip(layouts, (query, key), strict=True))
    if isinstance(query_span, Miss):
        return query_span
    if isinstance(key_span, Miss):
        return key_span
    if form is not None and form.sequences is not None:
        miss = _why_not_in_one_sequence(form, query_span, key_span, compilation)
        if miss is not None:
            return miss
    sizes = [compat.size_hint(size) for size in (*query.shape, key.shape[1], value.shape[3])]
    batch, query_heads, _, head_dim, key_heads, value_dim = sizes
    geometry = Geometry.of(query_span, key_span, *_rows_and_columns(layouts[0]), heads=query_heads)
    policy = _chosen(compilation, geometry)
    if isinstance(policy, Miss):
        return policy
    plan = plan_of(policy, geometry, compilation.facts)
    around = context.parent.get()
    plan = plan.with_dense_steps(compilation.options.dense_steps, spare=around is not None and around.unconfirmed)
    check_op(plan)
    if any(BATCH in each.shape for each in plan.state) and compat.specialise(query.shape[0], query) is None:
        marked = compat.marked_dynamic(query.shape[0], query)
        return reasons.SIZE_MARKED_DYNAMIC.because(f"state is kept for each sample, so that the batch would be fixed, and {marked} is")
    if form is not None and form.pairs is not None:
        allowed = _allowed(form.pairs, plan)
        if allowed is None:
            block = "latent frame" if plan.frames is not None else "query block"
            return reasons.MASK_NOT_EXPRESSIBLE.because(f"the rows of a {block} do not share one mask")
        plan = plan.restricted(allowed)
        if plan.table.some_attend_nothing():
            return reasons.MASK_NOT_EXPRESSIBLE.because("pattern and mask together leave a query without keys")
    device = compilation.device or query.device
    dtype = example_value(site.node).dtype  # under autocast the inputs' dtypes may differ, and the result's is the one computed in
    call = AttentionCall(
        device, dtype, batch, query_heads, key_heads, head_dim, value_dim, plan,
        masked=form is not None, device_only=compilation.options.uses_cuda_graphs,
        mask_heads=1 if form is None else max((_heads_of(part) for part in form.keys), default=1),
        compiler=compilation.options.graph_compiler(device),
    )  # fmt: skip
    outcome = _lowered(call, compilation.options)
    return dataclasses.replace(outcome, mask=form) if isinstance(outcome, SparsePlan) else outcome


def _why_not_in_one_sequence(form: MaskForm, query: VideoSpan, key: VideoSpan, compilation: Compilation) -> Miss | None:
    """Why sequences are not, in each sample, one that holds the video and one of padding; the op looks at ends that are not known here."""
    assert form.sequences is not None
    ends, reader = form.sequences.all_input_nodes[0], compilation.reader
    samples, _, tokens, _ = example_value(form.sequences).shape
    if query != key or query.free_start:
        return reasons.MASK_NOT_EXPRESSIBLE.because("sequences told by their ends, with text of any length before the video")
    now = VideoInOneSequence(compat.size_hint(samples), compat.size_hint(tokens), *query.video)
    given = reader.look(ends.name) if form.ends is None and reader is not None and reader.later(ends.name) is not None else None
    fit = all(now.holds(values, int) for values in (form.ends, given) if values is not None)
    if given is not None and reader is not None:
        sizes = compat.size_expression(samples), compat.size_expression(tokens)
        reader.expect(ends.name, VideoInOneSequence(*sizes, *query.video, expected=fit))
    if not fit:
        return reasons.FORM_NOT_REWRITTEN.because("sequences told by their ends that cut the video of a sample apart or join two samples")
    return None


def _chosen(compilation: Compilation, geometry: Geometry) -> Policy | Miss:
    """The policy of a site: the one of option ``policy``; where its pattern leaves nothing out, that of ``policy_at_horizon``."""
    options, facts = compilation.options, compilation.facts
    miss = why_not(options.chosen_policy, geometry, facts)
    if miss is None:
        return options.chosen_policy
    if miss.reason is reasons.PATTERN_FULL and options.chosen_at_horizon is not None:
        if facts.horizon is None and options.chosen_at_horizon.needs_horizon:
            return reasons.HORIZON_UNKNOWN.because(facts.horizon_missing)
        miss = why_not(options.chosen_at_horizon, geometry, facts)
        return miss or options.chosen_at_horizon
    return miss


def _rows_and_columns(layout: TokenLayout) -> tuple[int, int]:
    """Rows and columns of a latent frame in tokens, 0 where they are not known as numbers."""
    shape = layout.of_kind(VIDEO)[0].grid.shape  # type: ignore[union-attr]
    _, rows, columns = shape if len(shape) == 3 else (0, 0, 0)
    return (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else (0, 0)


def _heads_of(mask: fx.Node) -> int:
    shape = example_value(mask).shape
    return compat.size_hint(shape[-3]) if len(shape) > 2 else 1


def _allowed(pairs: Array, plan: Plan) -> tuple[tuple[Range, ...], ...] | None:
    """Key ranges a constant mask ``[Sq, Sk]`` leaves each query block; None where the rows of a block differ."""
    query, key = plan.geometry.query, plan.geometry.key
    if query.open_ended or key.open_ended or query.free_start or key.free_start or pairs.shape != (query.length, key.length):
        return None
    found: list[tuple[Range, ...]] = []
    for start, end in itertools.pairwise(plan.table.query_bounds):
        if start == end:
            found.append((key.whole,))
            continue
        row = pairs[start]
        if (pairs[start:end] != row).any():
            return None
        edges = numpy.flatnonzero(numpy.diff(row.astype(numpy.int8), prepend=0, append=0)).tolist()
        found.append(tuple(zip(edges[::2], edges[1::2], strict=True)))
    return tuple(found)


def _lowered(call: AttentionCall, options: Options) -> SparsePlan | Miss:
    """The call with the lowering that is to compute it."""
    try:
        choice = select(call, options.lowering, measure=options.measures)
    except LoweringUnavailableError as error:
        if options.lowering != "auto":
            raise  # asked for by name, so silence would mislead
        if not any(lowering.op == call.plan.op for lowering in lowerings()):
            return reasons.NO_LOWERING.because(error.why, "Register a lowering with that op; the page on adding a policy shows how.")
        return reasons.NO_LOWERING.because(error.why)
    if options.when_slower == "dense":
        dense, ours = seconds_of_dense(call) if choice.seconds else "", choice.seconds.get(choice.lowering.name)
        measured = isinstance(dense, float) and ours is not None
        speedup = dense / ours if isinstance(dense, float) and ours is not None else choice.lowering.expected(call)
        if speedup <= 1:
            how = "runs, measured," if measured else "is expected"
            return reasons.NOT_FASTER.because(
                f"lowering {choice.lowering.name!r} {how} at {speedup:.2f} times the speed of dense attention"
            )
    return SparsePlan(call, choice)


def _shapes_supported(query: object, key: object, value: object) -> bool:
    tensors = [t for t in (query, key, value) if isinstance(t, Tensor)]
    if len(tensors) != 3 or any(t.dim() != 4 for t in tensors):
        return False
    q, k, v = tensors
    equal = [(q.shape[0], k.shape[0]), (k.shape[0], v.shape[0]), (k.shape[1], v.shape[1])]  # SDPA itself checks the others
    return all(compat.statically_true(a == b) for a, b in equal) and compat.statically_true(q.shape[1] % k.shape[1] == 0)


def _span(layout: TokenLayout, tensor: Tensor, specialised: list[str]) -> VideoSpan | Miss:
    """Where the video lies, in ints; symbolic sizes are fixed here, and only here."""
    at = next(i for i, segment in enumerate(layout.segments) if segment.kind == VIDEO)
    grid = layout.segments[at].grid
    assert grid is not None
    before = sum(segment.size for segment in layout.segments[:at])
    after = sum(segment.size for segment in layout.segments[at + 1 :])
    free_start = not isinstance(before, int) and isinstance(after, int)  # what is before the video is then the length less the rest
    numbers = []
    wanted = {"prefix tokens": 1 if free_start else before, "frames": grid.frames, "tokens per frame": grid.tokens_per_frame}
    for what, size in wanted.items():
        number = compat.specialise(size, tensor)
        if number is None:
            marked = compat.marked_dynamic(size, tensor)
            if marked:
                return reasons.SIZE_MARKED_DYNAMIC.because(f"{what} would be fixed at this size, and {marked} is marked dynamic")
            return reasons.SIZE_NOT_KNOWN.because(f"{what} of {layout}")
        if not isinstance(size, int):
            specialised.append(f"{what} {size} = {number}")
        numbers.append(number)
    prefix, frames, tokens_per_frame = numbers
    if isinstance(after, int):
        return VideoSpan(prefix, frames, tokens_per_frame, after, free_start=free_start)
    return VideoSpan(prefix, frames, tokens_per_frame, 0, open_ended=True)  # any number of tokens may follow, so that needs no guard
