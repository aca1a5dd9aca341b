"""Fixes symbolic sizes where a video is seen only with numbers: those of the video first, so that text and batch stay free.

Frames and tokens per frame are constants of a pattern anyway.  A graph of which nothing becomes sparse keeps all its sizes free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor, fx

from lvsa_compile import compat, reasons
from lvsa_compile.axes.algebra import INPUT
from lvsa_compile.layout.graph_trace import input_kind
from lvsa_compile.passes.compilation import Compilation, Decision
from lvsa_compile.passes.decide import decide
from lvsa_compile.passes.trace_layout import trace_layout

_ROUNDS = 8
"""Traces until no further equality of sizes is noticed."""
_NOT_OF_SIZES = frozenset(
    (
        reasons.TRAINING,
        reasons.SIZE_MARKED_DYNAMIC,
        reasons.DROPOUT,
        reasons.CAUSAL,
        reasons.PATTERN_FULL,
        reasons.PIXEL_FRAMES,
        reasons.HORIZON_UNKNOWN,
        reasons.DENSE_LAYER,
        reasons.MAX_SITES,
        reasons.PASS_DISABLED,
        reasons.NOT_FASTER,
        reasons.NO_LOWERING,
        reasons.POLICY_REFUSES,
        reasons.FORM_NOT_REWRITTEN,
        reasons.ALREADY_SPARSE,
        reasons.INSIDE_SUBGRAPH,
    )
)
"""Reasons that are the same for all sizes, or that only a site gets whose video was seen."""
_BESIDE_SPARSE = frozenset((reasons.CROSS_ATTENTION, reasons.NOT_VIDEO))
"""Reasons of the other sites of a graph in which the video was seen."""


def fix_sizes(compilation: Compilation) -> Compilation:
    """Decides again with sizes fixed, as few as make all those sites sparse that numbers alone show; ``specialised`` says which."""
    placeholders = [node for node in compilation.graph_module.graph.nodes if node.op == "placeholder"]
    symbols = frozenset[object]().union(*(compat.symbols_of_input(compat.example_value(node)) for node in placeholders))
    if not symbols:
        return compilation
    if not any(_may_be_hidden(decision, compilation) for decision in compilation.decisions):
        return _with_structure(compilation)
    found, fixed = _with_fixed(compilation, symbols), symbols
    if len(found.sparse) <= len(compilation.sparse):
        return compilation
    for some in dict.fromkeys(_smaller_sets(found, placeholders)):
        fewer = _with_fixed(compilation, some)
        if len(fewer.sparse) == len(found.sparse):
            found, fixed = fewer, some
            break
    marked = _marked(fixed, placeholders)
    if marked:
        pairs = zip(compilation.decisions, found.decisions, strict=True)
        decisions = (_because_marked(marked, *pair) if _may_be_hidden(pair[0], compilation) else pair[0] for pair in pairs)
        return dataclasses.replace(compilation, decisions=tuple(decisions))
    return _settled(found)


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
    return _settled(found) if freer and len(found.sparse) == len(compilation.sparse) else compilation


def _settled(found: Compilation) -> Compilation:
    compat.settle(compat.fake_mode_of_graph(found.graph_module.graph), found.assumed or ())
    return found


def _with_fixed(compilation: Compilation, symbols: frozenset[object]) -> Compilation:
    """The compilation as it would be decided with the sizes that ``symbols`` stand for as numbers; nothing is guarded yet."""
    numbers = compat.values_of(symbols, compat.fake_mode_of_graph(compilation.graph_module.graph))
    assumed: tuple[compat.Equality, ...] = tuple(numbers.items())
    for _ in range(_ROUNDS):
        traced = trace_layout(dataclasses.replace(compilation, assumed=assumed))
        if not traced.noticed:
            break
        assumed += traced.noticed
    words = tuple(f"{left} = {right}" for left, right in assumed)
    return decide(dataclasses.replace(traced, specialised=(*compilation.specialised, *words)))


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
    latent = isinstance(value, Tensor) and value.is_floating_point() and value.dim() - _first_axis(node) >= 4
    return node.name in found.video_inputs or (latent and input_kind(node)[0] == INPUT)


def _first_axis(node: fx.Node) -> int:
    """The first axis that is not the batch, which an item of a list does not have."""
    return 0 if input_kind(node)[1].endswith("]") else 1


def _is_given(node: fx.Node) -> bool:
    """Whether a number was passed by itself, rather than being the size of a tensor."""
    return "size()" not in (compat.placeholder_source(node) or "")


def _marked(symbols: frozenset[object], placeholders: list[fx.Node]) -> str:
    """What the user marked dynamic of the sizes that ``symbols`` stand for; "" where nothing."""
    tensors = [value for node in placeholders if isinstance(value := compat.example_value(node), Tensor)]
    return next((marked for symbol in sorted(symbols, key=str) if (marked := compat.marked_dynamic(symbol, tensors[0]))), "")


def _because_marked(marked: str, decision: Decision, fixed: Decision) -> Decision:
    """The decision about a site that is sparse with sizes ``fixed`` which the user marked dynamic."""
    if fixed.plan is None:
        return decision
    miss = reasons.SIZE_MARKED_DYNAMIC.because(f"the video is seen with its sizes as numbers, and {marked} is marked dynamic")
    return dataclasses.replace(decision, miss=miss, mendable=True)
