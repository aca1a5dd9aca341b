"""Follows the forwards of a model, so that its blocks know what they get, whoever compiled them.

At each forward an ``EagerTracker`` sees the ops of the model's own code that runs between compiled graphs.  What the outputs alone show
(which input holds the generated video, where packed tokens are unpacked) is taken from the forward before of the same sizes, and
compared at the end of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lvsa_compile import compat
from lvsa_compile.axes.algebra import Axis, Concat, origins
from lvsa_compile.axes.call import Axes
from lvsa_compile.axes.carried import input_of, is_known_video, unmarked
from lvsa_compile.axes.opaque import expanded, substituted
from lvsa_compile.axes.values import Array
from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.errors import LvsaWarning
from lvsa_compile.forward import clock, context
from lvsa_compile.forward.explicit_step import explicit_step
from lvsa_compile.forward.labels import begin_forward, watched_forward
from lvsa_compile.forward.timestep_names import timestep_among
from lvsa_compile.layout.carry import outgoing_annotation, table_annotation
from lvsa_compile.layout.denoiser import why_no_denoiser
from lvsa_compile.layout.evidence import LayoutEvidence, collect_evidence
from lvsa_compile.layout.guarded_values import Reader, SameValue
from lvsa_compile.layout.token_layout import Targets
from lvsa_compile.watching.eager_attention import EagerAttention
from lvsa_compile.watching.eager_call import Attend, CompiledCalls
from lvsa_compile.watching.eager_tracker import EagerTracker
from lvsa_compile.watching.inputs import ForwardInputs, axes_of_input
from lvsa_compile.watching.memory import Memory

_MOST_SIZES = 64
"""Sizes of forwards of which something is remembered."""


@dataclasses.dataclass
class Size:
    """What is known of the forwards of one size.

    ``targets`` are the inputs that hold the generated video, None before anything has shown them, ``confirmed`` that an output has;
    ``shown`` is what the outputs showed, for the axes ``checked``; ``problem`` says why blocks get no annotations; ``values`` are those
    that inputs had whose values decided, by name.
    """

    targets: Targets | None = None
    shown: LayoutEvidence | None = None
    problem: str = ""
    confirmed: bool = False
    values: dict[str, list[SameValue]] = dataclasses.field(default_factory=dict)
    annotations: dict[int, Axes | None] = dataclasses.field(default_factory=dict)
    checked: tuple[Any, ...] | None = None


class Watch:
    """The watch over one model: what its calls go through.

    ``ticks`` says that no graph of its own moves the clock, ``attend`` compiles attention that no graph holds; ``unseen`` is what the
    user is warned of where the next forward shows no attention.  While ``looking``, that many forwards long, it only looks whether there
    is attention that no graph holds: where there is, the next forwards are followed, and else the watch ends.
    """

    def __init__(self, model: nn.Module, ticks: bool, looking: int = 0) -> None:
        self._model = weakref.ref(model)
        self._inner: Callable[..., Any] | None = compat.compiled_call(model)
        self.ticks = ticks
        self.attend: Attend | None = None
        self.unseen = ""
        self.looking = looking
        self.memory = Memory()
        self.sizes: dict[Any, Size] = {}
        self.targets: Targets = {}  # as the last output showed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model and follows its forward."""
        model = self._model()
        assert model is not None
        call = self._inner or compat.plain_call(model)
        if torch.compiler.is_compiling():
            return call(*args, **kwargs)
        return self._look(call, args, kwargs) if self.looking else follow(self, model, call, args, kwargs)

    def _look(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        eager = EagerAttention(Watch._look.__code__)
        with compat.mode_on(eager):
            output = call(*args, **kwargs)
        self.looking = 0 if eager.lines else self.looking - 1
        if not (eager.lines or self.looking):
            self.undo()
        return output

    @property
    def model(self) -> Any:
        """The model, without what ``torch.compile`` put around it."""
        return compat.uncompiled(self._model())

    def attend_by(self, attend: Attend) -> None:
        """Says how attention that no graph holds is compiled from now on."""
        self.attend = attend
        _attention.pop(self, None)

    def undo(self) -> None:
        """Takes the watch off its model."""
        model = self._model()
        if model is not None and compat.compiled_call(model) is self:
            compat.set_compiled_call(model, self._inner)

    def size(self, inputs: ForwardInputs) -> Size:
        """What is known of forwards with such inputs."""
        if len(self.sizes) >= _MOST_SIZES and inputs.size not in self.sizes:
            self.sizes.clear()
        return self.sizes.setdefault(inputs.size, Size())


def watch(model: nn.Module, ticks: bool, attend: Attend | None = None, looking: int = 0) -> Watch:
    """Has every forward of a model followed; ``attend`` counts where none was given for it before, ``looking`` where it is not yet."""
    present = watch_of(model)
    if present is None:
        _left_alone.pop(compat.uncompiled(model), None)
        present = Watch(model, ticks, looking)
        compat.set_compiled_call(model, present)
    present.looking = min(present.looking, looking)
    present.attend = present.attend or attend
    return present


_left_alone: WeakIdKeyDictionary = WeakIdKeyDictionary()
_attention: WeakIdKeyDictionary = dropped_on_reset(WeakIdKeyDictionary())
"""By watch: attention in eager code as it was compiled."""


def leave_alone(model: nn.Module) -> None:
    """Has a model not be followed unless somebody asks for it."""
    _left_alone[compat.uncompiled(model)] = True


def left_alone(model: nn.Module) -> bool:
    """Whether a model is not to be followed unless somebody asks for it."""
    return compat.uncompiled(model) in _left_alone


def watch_of(model: nn.Module) -> Watch | None:
    """The watch over a model, if there is one."""
    found = compat.compiled_call(model)
    return found if isinstance(found, Watch) else None


def follow(watch: Watch, model: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a model, by ``call``, and follows its forward."""
    forward, outer = Forward(watch, model, args, kwargs), watched_forward.get()
    tokens = watched_forward.set(forward), context.parent.set(forward.parent)
    try:
        with contextlib.nullcontext() if outer is None else outer.looking_away():
            with compat.mode_on(forward.tracker):
                output = call(*args, **kwargs)
            forward.finish(output)
        return output
    finally:
        forward.tracker.attend = None  # else the two hold each other
        context.parent.reset(tokens[1])
        watched_forward.reset(tokens[0])


class Forward:
    """A forward in progress that is followed."""

    @compat.not_compiled
    def __init__(self, watch: Watch, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        begin_forward()
        self._inputs = ForwardInputs.of(model, args, kwargs)
        self._watch, self._size = watch, watch.size(self._inputs)
        self.tracker = EagerTracker(watch.memory, follow.__code__)
        self.parent = context.Parent(compat.uncompiled(model), problem=self._size.problem, ticks=watch.ticks)
        self._asked: dict[int, Axis] = {}
        self._ran_graphs = False
        self._attention = _attention.setdefault(watch, CompiledCalls())
        self.tracker.attend = self._attend
        for name, tensor in self._inputs.tensors.items():
            self.tracker.set_axes(tensor, axes_of_input(name, tensor, self._number_of_value(name, tensor)))
        self._reader = Reader(self._inputs.tensors)
        self.parent.timestep, self.parent.size = timestep_of(self._inputs), clock.size_of_video(self._inputs.leaves)
        if watch.ticks:
            tick(self.parent.model, self.parent.timestep, self.parent.size)
            self.parent.ticked = self.parent.timestep is not None

    def annotation_of(self, tensor: Tensor) -> Axes | None:
        """What a graph should know of the axes of an input."""
        axes = self.tracker.known_axes(tensor)
        if axes is None or (self._size.problem and self._watch.ticks):
            return None
        if len(axes) == 2 and (table := self._watch.memory.table(axes, table_annotation)) is not None:
            return table
        if len(axes) >= 3:
            self._asked[id(axes[-2])] = axes[-2]
        known = self._size.annotations
        if id(axes) not in known:
            targets = self._targets(axes)
            if not targets and not any(map(is_known_video, origins(axes))):
                return None
            refined = axes if self._size.shown is None else self._size.shown.refine(axes)
            annotation = outgoing_annotation(refined, targets or {})
            known[id(axes)] = None if annotation is None else self._watch.memory.annotation(annotation, axes)
        return known[id(axes)]

    def annotate(self, tensor: Tensor, axes: Axes | None) -> None:
        """Says what a graph knows of the axes of an output."""
        if axes is None:
            self.tracker.lose(tensor, "a compiled graph", frozenset(self._inputs.latents()))
        else:
            memory, names = self._watch.memory, self._inputs.names
            own = memory.of_graph(axes, lambda: memory.annotated(axes) or tuple(map(expanded, unmarked(axes, names))))
            self.tracker.set_axes(tensor, own)

    def pass_on(self, tensor: Tensor, axes: Axes, inputs: Mapping[str, Tensor]) -> None:
        """Says what the axes of an output of a graph are in terms of those of its inputs, given by name."""
        known = {name: self.tracker.axes_of(value) for name, value in inputs.items()}
        self.tracker.set_axes(tensor, self._watch.memory.of_graph(axes, lambda: substituted(axes, known), *known.values()))

    def attend_by(self, attend: Attend | None) -> None:
        """Says how attention that no graph holds is compiled, where nobody has said it before."""
        self._watch.attend = self._watch.attend or attend

    def _attend(self, func: compat.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What attention in eager code gives that is sparse; None where it runs as it came."""
        if self._watch.attend is None:
            return None
        return self._attention.run(
            self._watch.attend, func, args, kwargs, lambda tensor: self.annotation_of(tensor) or self.tracker.axes_of(tensor)
        )

    def looking_away(self) -> contextlib.AbstractContextManager[None]:
        """Surroundings in which ops are not followed, those of a graph."""
        self._ran_graphs = True
        return compat.mode_away(self.tracker)

    def peek(self, node_name: str) -> Array | None:
        """The value of an input of the forward, by its name in annotations."""
        return self._reader.peek(input_of(node_name))

    def rely_on(self, node_name: str) -> None:
        """Notes that the value of an input decided something."""
        name = input_of(node_name)
        held = self._reader.read(name)
        if held is not None and not self._size.values.get(name):
            self._size.values[name] = [SameValue(held)]

    @compat.not_compiled
    def finish(self, output: Any) -> None:
        """The end of a forward: takes from its outputs which input holds the generated video, and compares."""
        unseen, self._watch.unseen = self._watch.unseen, ""
        if unseen and not self.tracker.attended and not (self._watch.ticks and self._ran_graphs):
            ran = ", ".join(self.tracker.of_libraries)
            warnings.warn(f"{unseen} Ops of other libraries ran: {ran}." if ran else unseen, LvsaWarning, stacklevel=4)
        returned = [leaf for leaf in compat.tree_leaves(output) if isinstance(leaf, Tensor)]
        axes = {i: self.tracker.axes_of(leaf) for i, leaf in enumerate(returned)}
        tokens = {**self._asked, **self.tracker.attended}
        timed = self._timed
        checked = (tuple(map(id, axes.values())), frozenset(tokens), timed, tuple(leaf.shape for leaf in returned))
        size = self._size
        if checked == size.checked:
            return
        size.checked = checked
        with compat.no_modes():  # names are those of annotations, which ``peek`` knows
            shown = collect_evidence(list(tokens.values()), axes, Reader({}, elsewhere=self))
        why = why_no_denoiser(shown.targets, [*map(expanded, tokens.values())], returned, timed, self.tracker.convolved)
        self._settle(shown, why)

    def _settle(self, shown: LayoutEvidence, not_denoiser: str) -> None:
        """Has the next forwards follow what the outputs showed, and warns where this one followed something else."""
        size, model = self._size, type(self.parent.model).__name__
        candidates = self._inputs.latents() or self._inputs.packed()
        targets = {name: axes for name, axes in shown.targets.items() if name in candidates}
        followed, given = size.targets, not self.parent.unconfirmed and any(each is not None for each in size.annotations.values())
        known = {} if size.shown is None else size.shown.evidence  # a forward that shows less, as one that skips blocks, takes nothing back
        size.shown = dataclasses.replace(shown, evidence={**known, **shown.evidence})
        size.annotations.clear()
        if not_denoiser:
            size.problem = f"{model} is no denoiser: {not_denoiser}"
        elif targets and size.confirmed and targets.keys() != (followed or {}).keys():
            size.problem = f"forwards of one size return different videos: {_listed(followed or {})}, then {_listed(targets)}"
        elif targets:
            size.targets, size.confirmed = targets, True
            self._watch.targets = targets
        if given and (size.problem or (targets and targets.keys() != (followed or {}).keys())):
            why = size.problem or f"{model} returns {_listed(targets)}, and {_listed(followed or {})} was taken for the generated video"
            now = "dense" if size.problem else "that of what is returned"
            warnings.warn(
                f"lvsa: {why}. Where the forward that just ended was sparse it may be wrong: run it again. From now on attention is {now}.",
                LvsaWarning,
                stacklevel=4,
            )

    def _targets(self, axes: Axes) -> Targets | None:
        """The inputs that hold the generated video, as a forward before showed; before that all latents.

        Of latents that are joined one after the other in ``axes`` only one is generated: it is taken to be the first among the model's
        arguments, and attention is dense until an output confirms it.
        """
        size = self._size
        if size.targets is None:
            candidates = self._candidates() if size.shown is None else self._inputs.latents()
            if self._watch.targets and self._watch.targets.keys() <= {*self._inputs.latents(), *self._inputs.packed()}:
                size.targets, size.confirmed = self._watch.targets, True
            elif candidates and self._timed:
                size.targets = dict.fromkeys(candidates, frozenset[int]())
        if size.targets and not size.confirmed:
            joined = [name for name in size.targets if name in _joined(axes)]
            if len(joined) > 1:
                self.parent.unconfirmed = True
                size.targets = {name: own for name, own in size.targets.items() if name not in joined[1:]}
                size.annotations.clear()
        return size.targets

    @property
    def _timed(self) -> bool:
        return self._inputs.timed or explicit_step() is not None

    def _candidates(self) -> list[str]:
        return self._inputs.latents() or self._inputs.packed_with_places(self._watch.memory.counted)

    def _number_of_value(self, name: str, tensor: Tensor) -> int:
        """Which of the values that an input had, where its value decides, it has now."""
        values = self._size.values.get(name, [])
        for number, holds in enumerate(values):
            if holds(tensor):
                return number
        if values:
            values.append(SameValue(tensor.detach().to("cpu", copy=True)))
        return max(0, len(values) - 1)


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names)


def _joined(axes: Axes) -> frozenset[str]:
    """Names of inputs that lie one after the other along an axis."""
    parts = [part for axis in axes for factor in axis if isinstance(factor, Concat) for part in factor.parts]
    return origins(parts)


def timestep_of(inputs: ForwardInputs) -> tuple[str, Tensor] | None:
    """Name and value of the input that tells the denoising step."""
    at = timestep_among(inputs.names)
    value = None if at is None else inputs.leaves[at]
    if at is None or value is None:
        return None
    with compat.no_modes():
        return inputs.names[at], value if isinstance(value, Tensor) else torch.tensor(float(value))


def tick(model: nn.Module, timestep: tuple[str, Tensor] | None, size: Hashable) -> None:
    """Moves the clock of a model whose forward begins, by name and value of its timestep and the size of its video."""
    if timestep is not None:
        clock.set_clock_input(model, timestep[0], "")
    with compat.no_modes():
        clock.clock_of(model).tick(None if timestep is None else timestep[1], size)
