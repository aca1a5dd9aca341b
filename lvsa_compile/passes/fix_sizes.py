"""Fixes symbolic sizes where a video is seen only with numbers: those of the video first, so that text and batch stay free.

Frames and tokens per frame are constants of a pattern anyway.  A graph in which no video is seen with numbers either keeps its sizes free,
but for a denoiser's latent whose trail was lost: it may not be at another size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from torch import Tensor, fx

from lvsa_compile import compat, reasons
from lvsa_compile.axes.algebra import INPUT, LOST, leaves
from lvsa_compile.layout.graph_trace import input_kind
from lvsa_compile.passes.compilation import Compilation, Decision
from lvsa_compile.passes.decide import decide
from lvsa_compile.passes.trace_layout import trace_layout

_ROUNDS = 8
"""Traces until no further equality of sizes is noticed."""
_OF_THIS_SIZE = frozenset((reasons.PATTERN_FULL, reasons.PIXEL_FRAMES, reasons.POLICY_REFUSES, reasons.FEW_TOKENS, reasons.NOT_FASTER))
"""Reasons that another size of the same video may not have."""
_NOT_OF_SIZES = _OF_THIS_SIZE | frozenset(
    (
        reasons.TRAINING,
        reasons.SIZE_MARKED_DYNAMIC,
        reasons.DROPOUT,
        reasons.CAUSAL,
        reasons.HORIZON_UNKNOWN,
        reasons.DENSE_LAYER,
        reasons.MAX_SITES,
        reasons.PASS_DISABLED,
        reasons.NO_LOWERING,
        reasons.FORM_NOT_REWRITTEN,
        reasons.ALREADY_SPARSE,
        reasons.INSIDE_SUBGRAPH,
    )
)
"""Reasons that are the same for all sizes, or that only a site gets whose video was seen."""
_BESIDE_SPARSE = frozenset((reasons.CROSS_ATTENTION, reasons.NOT_VIDEO))
"""Reasons of the other sites of a graph in which the video was seen."""


def fix_sizes(compilation: Compilation) -> Compilation:
    """Decides again with sizes fixed, as few as show all those videos that numbers alone show; ``specialised`` says which."""
    placeholders = [node for node in compilation.graph_module.graph.nodes if node.op == "placeholder"]
    symbols = frozenset[object]().union(*(compat.symbols_of_input(compat.example_value(node)) for node in placeholders))
    if not symbols:
        return compilation
    hidden_from_next = compilation.position.leads_on and compilation.output_lost
    if not (hidden_from_next or any(_may_be_hidden(decision, compilation) for decision in compilation.decisions)):
        return _with_structure(compilation)
    found = _with_fixed(compilation, symbols)
    if _seen(found) <= _seen(compilation):
        return _with_latents_fixed(_with_reasons(compilation, found), placeholders)
    for some in dict.fromkeys(_smaller_sets(found, placeholders)):
        fewer = found if some == symbols else _with_fixed(compilation, some)
        if _seen(fewer) == _seen(found):
            found = fewer
            break
    marked = _marked(found)
    if marked:
        pairs = zip(compilation.decisions, found.decisions, strict=True)
        decisions = (_because_marked(marked, *pair) if _may_be_hidden(pair[0], compilation) else pair[0] for pair in pairs)
        return dataclasses.replace(compilation, decisions=tuple(decisions))
    return _settled(found)


def _seen(compilation: Compilation) -> int:
    """How many sites are sparse, or dense for the size of a video that was seen, and of how many axes the next graph is told."""
    sites = sum(each.plan is not None or (each.miss is not None and each.miss.reason in _OF_THIS_SIZE) for each in compilation.decisions)
    outputs = (axis for _, axes in (*compilation.outgoing, *compilation.passed_on) for axis in axes)
    return sites + sum(all(LOST not in factor.kinds for factor in leaves(axis)) for axis in outputs)


def _may_be_hidden(decision: Decision, compilation: Compilation) -> bool:
    """Whether a site is dense for a reason that may be another one with sizes as numbers."""
    known = _NOT_OF_SIZES | _BESIDE_SPARSE if compilation.sparse else _NOT_OF_SIZES
    return decision.site is not None and decision.miss is not None and decision.miss.reason not in known


def _with_structure(compilation: Compilation) -> Compilation:
    """The compilation with the structure of inputs guarded where their values were; each prompt would compile anew otherwise."""
    if not (compilation.sparse and compilation.reader is not None and compilation.reader.relied_on):
        return compilation
    found = _with_fixed(compilation, frozenset())
    freer = found.reader is not None and len(found.reader.relied_on) < len(compilation.reader.relied_on)
    return _settled(found) if freer and len(found.sparse) == len(compilation.sparse) and not _marked(found) else compilation


def _with_latents_fixed(compilation: Compilation, placeholders: list[fx.Node]) -> Compilation:
    """The compilation with the sizes of latents guarded, where a trail was lost at this size; other sizes may keep it."""
    lost = any(each.miss is not None and each.miss.reason is reasons.LAYOUT_UNKNOWN for each in compilation.decisions)
    values = {node: compat.example_value(node) for node in placeholders}
    latents = (compat.symbols_of_input(value, _first_axis(node)) for node, value in values.items() if _is_latent(node, value))
    numbers = compat.values_of(frozenset[object]().union(*latents), compat.fake_mode_of_graph(compilation.graph_module.graph))
    fixed = dataclasses.replace(
        compilation, assumed=tuple(numbers.items()), specialised=(*compilation.specialised, *_in_words(numbers, compilation))
    )
    return _settled(fixed) if numbers and lost and compilation.timestep is not None and not _marked(fixed) else compilation


def _with_reasons(compilation: Compilation, found: Compilation) -> Compilation:
    """The compilation with the reasons that numbers show, as that a video is too short; its sizes stay free."""
    pairs = zip(compilation.decisions, found.decisions, strict=True)
    decisions = (
        dataclasses.replace(ours, miss=theirs.miss, mendable=theirs.mendable) if ours.plan is None and theirs.plan is None else ours
        for ours, theirs in pairs
    )
    return dataclasses.replace(compilation, decisions=tuple(decisions))


def _settled(found: Compilation) -> Compilation:
    compat.settle(compat.fake_mode_of_graph(found.graph_module.graph), found.assumed or ())
    return found


def _with_fixed(compilation: Compilation, symbols: frozenset[object]) -> Compilation:
    """The compilation as it would be decided with the sizes that ``symbols`` stand for as numbers; nothing is guarded yet."""
    numbers = compat.values_of(symbols, compat.fake_mode_of_graph(compilation.graph_module.graph))
    assumed: tuple[compat.Equality, ...] = tuple(numbers.items())
    for _ in range(_ROUNDS):
        traced = trace_layout(dataclasses.replace(compilation, assumed=assumed))
        further = tuple(each for each in traced.noticed if each not in assumed)
        if not further:
            break
        assumed += further
    return decide(dataclasses.replace(traced, specialised=(*compilation.specialised, *_in_words(numbers, compilation))))


def _in_words(numbers: Mapping[object, int], compilation: Compilation) -> list[str]:
    """Which axes of which inputs have the sizes that were fixed."""
    shown = compat.shown_by(node for node in compilation.graph_module.graph.nodes if node.op == "placeholder")
    found = []
    for symbol, number in numbers.items():
        node, axis = shown.get(symbol, (None, None))
        source = (compat.placeholder_source(node) if node is not None else "") or str(symbol)
        found.append(f"{source} = {number}" if axis is None else f"axis {axis} of {source} = {number}")
    return found


def _smaller_sets(found: Compilation, placeholders: list[fx.Node]) -> Iterator[frozenset[object]]:
    """Symbols that may be enough, fewest first: none, those of the videos, and of what was passed as numbers, all but the batch."""
    yield frozenset()
    values = {node: compat.example_value(node) for node in placeholders}
    videos = frozenset[object]().union(
        *(compat.symbols_of_input(value, _first_axis(node)) for node, value in values.items() if _holds_video(node, value, found))
    )
    yield videos
    numbers = (compat.symbols_of_input(value) for node, value in values.items() if not isinstance(value, Tensor) and _is_given(node))
    yield videos.union(*numbers)
    yield frozenset[object]().union(
        *(compat.symbols_of_input(value, 1 if isinstance(value, Tensor) and value.dim() > 2 else 0) for value in values.values())
    )


def _holds_video(node: fx.Node, value: object, found: Compilation) -> bool:
    return node.name in found.video_inputs or _is_latent(node, value)


def _is_latent(node: fx.Node, value: object) -> bool:
    """Whether an input has axes for channels, frames, rows and columns beside the batch."""
    latent = isinstance(value, Tensor) and value.is_floating_point() and value.dim() - _first_axis(node) >= 4
    return latent and input_kind(node)[0] == INPUT


def _first_axis(node: fx.Node) -> int:
    """The first axis that is not the batch, which an item of a list does not have."""
    return 0 if input_kind(node)[1].endswith("]") else 1


def _is_given(node: fx.Node) -> bool:
    """Whether a number was passed by itself, rather than being a size of a tensor, or telling where it lies in memory."""
    source = compat.placeholder_source(node) or ""
    return not any(of_tensor in source for of_tensor in ("size()", "stride()", "storage_offset()"))


def _marked(found: Compilation) -> str:
    """What the user marked dynamic of the sizes that would become numbers; "" where nothing."""
    tensors = [value for node in found.graph_module.graph.nodes if isinstance(value := compat.example_value(node), Tensor)]
    numbers = compat.made_numbers(found.assumed or ())
    return next((marked for symbol in numbers if (marked := compat.marked_dynamic(symbol, tensors[0]))), "")


def _because_marked(marked: str, decision: Decision, fixed: Decision) -> Decision:
    """The decision about a site that is sparse with sizes ``fixed`` which the user marked dynamic."""
    if fixed.plan is None:
        return decision
    miss = reasons.SIZE_MARKED_DYNAMIC.because(f"the video is seen with its sizes as numbers, and {marked} is marked dynamic")
    return dataclasses.replace(decision, miss=miss, mendable=True)
