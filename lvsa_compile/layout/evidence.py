"""What the axes of a forward show once its outputs are known: the grid of packed tokens, and which input holds the generated video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lvsa_compile.axes.algebra import LOST, Axis, Digit, Size, leaves, origins
from lvsa_compile.axes.call import Axes
from lvsa_compile.axes.carried import is_conditioning, is_generated
from lvsa_compile.axes.opaque import expanded
from lvsa_compile.layout.guarded_values import Reader
from lvsa_compile.layout.packed_grid import Evidence, packed_evidence, refined
from lvsa_compile.layout.token_layout import Targets, inputs_with_grid, video_inputs


@dataclass(frozen=True)
class LayoutEvidence:
    """``targets`` are the inputs that hold the generated video, ``outputs`` the refined axes of the outputs by position,
    ``contradictions`` the packed inputs whose sources of evidence disagree, with what they say.
    """

    targets: Targets
    outputs: Mapping[int, Axes]
    evidence: Mapping[Digit, Evidence]
    contradictions: Mapping[str, str]

    def refine(self, axes: Axes) -> Axes:
        """Axes with every packed axis as the frames, rows and columns that the evidence shows."""
        return tuple(refined(expanded(axis), self.evidence, self.contradictions) for axis in axes)


def collect_evidence(
    tokens: Sequence[Axis], outputs: Mapping[int, Axes], reader: Reader, now: Callable[[Size], int] | None = None
) -> LayoutEvidence:
    """Collects the evidence for each packed axis from ``tokens``, the token axes of all attention, and from the outputs.

    Input values that it depends on are read here, so that the caller can guard them; ``now`` says what symbolic sizes stand for.
    """
    tokens, outputs = [expanded(axis) for axis in tokens], {i: tuple(map(expanded, axes)) for i, axes in outputs.items()}
    evidence, contradictions = packed_evidence(tokens, list(outputs.values()), reader.peek, now)
    for each in evidence.values():
        if each.expected is not None:
            reader.expect(each.relies_on, each.expected)
        elif each.relies_on:
            reader.read(each.relies_on)
    refined_outputs = {position: tuple(refined(axis, evidence, contradictions) for axis in axes) for position, axes in outputs.items()}
    reached = video_inputs(axis for axes in refined_outputs.values() for axis in axes)
    known = {node_name: frozenset[int]() for axis in tokens for node_name in origins([axis]) if is_generated(node_name)}
    targets = known | {node_name: axes for node_name, axes in reached.items() if not is_conditioning(node_name)}
    if not targets:  # the way to the outputs was lost; where one video alone is attended, it is the one
        lost = _lost_on_the_way(refined_outputs.values())
        shown = (inputs_with_grid(refined(axis, evidence, contradictions)) for axis in tokens)
        candidates = {node_name for node_names in shown for node_name in node_names if node_name in lost and not is_conditioning(node_name)}
        targets = dict.fromkeys(candidates, frozenset[int]()) if len(candidates) == 1 else {}
    return LayoutEvidence(targets, refined_outputs, evidence, contradictions)


def _lost_on_the_way(outputs: Iterable[Axes]) -> frozenset[str]:
    """Names of inputs that an output may count, though in what order was lost."""
    lost = (d.source.origins for axes in outputs for axis in axes for f in leaves(axis) for d in f.digits if d.source.kind == LOST)
    return frozenset[str]().union(*lost)
