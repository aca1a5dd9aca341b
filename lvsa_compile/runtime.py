"""The callable Dynamo gets back: asks the clock for the step, calls the compiled graph with its tables, annotates its outputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from lvsa_compile import compat
from lvsa_compile.axes.algebra import PARAMETER, origins
from lvsa_compile.axes.call import Axes
from lvsa_compile.axes.carried import in_numbers
from lvsa_compile.compat import example_value
from lvsa_compile.errors import RequireError
from lvsa_compile.forward import context
from lvsa_compile.forward.calls import calls_of
from lvsa_compile.forward.clock import Clock, clock_of, size_of_video
from lvsa_compile.forward.labels import annotate, begin_forward, watched_forward
from lvsa_compile.layout.graph_trace import input_kind
from lvsa_compile.passes.compilation import Compilation, ExtraInput, TimestepInput
from lvsa_compile.policies.rows import Rows, WithDenseSteps
from lvsa_compile.report.store import report_with
from lvsa_compile.report.warning import left_dense
from lvsa_compile.watching.eager_call import Attend
from lvsa_compile.watching.find_model import find_model


@dataclass(frozen=True)
class Owner:
    """The parameter that stands for the model: its ``position`` among the arguments of a graph, and its ``source`` in Python."""

    position: int
    source: str


def owner_of(graph_module: fx.GraphModule) -> Owner | None:
    """Which input stands for the model at run time: a parameter from the middle, where tied weights are least likely."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    parameters = [
        Owner(position, compat.placeholder_source(node) or "")
        for position, node in enumerate(placeholders)
        if input_kind(node)[0] == PARAMETER and isinstance(example_value(node), nn.Parameter)
    ]
    return parameters[len(parameters) // 2] if parameters else None


def with_requirement(run: Callable[..., Any], compile_id: str, owner: Owner | None) -> Callable[..., Any]:
    """Has a compiled graph raise where the user can mend what keeps attention over the video dense; not in its first forward.

    A graph that serves many blocks is called again for the same one only in the next forward.
    """
    called: set[int] = set()

    def checked(*args: Any) -> Any:
        block = 0 if owner is None else id(args[owner.position])
        if block in called:
            _require_sparse(compile_id)
        called.add(block)
        return run(*args)

    return checked


def _require_sparse(compile_id: str) -> None:
    forward = report_with(compile_id)
    if forward is not None and forward.mendable_miss is not None:
        raise RequireError(left_dense(forward), str(forward))


def eager_with_requirement(run: Callable[..., Any] | None, compile_id: str) -> Callable[..., Any]:
    """``with_requirement`` of attention in eager code, which ``run`` computes, or which runs as it came where that is None."""
    around = context.parent.get()
    first = None if around is None else around.token

    def checked(*args: Any) -> Any:
        around = context.parent.get()
        if around is None or around.token is not first:
            _require_sparse(compile_id)
        return None if run is None else run(*args)

    return checked


def with_clock(compiled: Callable[..., Any], compilation: Compilation, owner: Owner | None) -> Callable[..., Any]:
    """Wraps a compiled graph so that each call gets the appended inputs, moves the clock and is counted.

    The clock belongs to the model that holds the parameter ``owner``, since Dynamo runs one graph for all models of a class; to the
    model itself where its blocks are compiled one by one or a graph has no parameters; and to the graph itself where there is no model.
    ``owner`` also tells the blocks apart that share the graph; where there is none, the module whose call is in progress does.
    """
    eager = compilation.in_eager_code
    extra_inputs, timestep = compilation.extra_inputs, compilation.timestep
    keeps_state = any(extra.state is not None for extra in extra_inputs)
    by_layer = any(extra.rows is not None and extra.rows.by_layer for extra in extra_inputs)
    turning = any(extra.rows is not None and extra.rows.moves for extra in extra_inputs) or keeps_state or compilation.position.leads_on
    ticks = turning and timestep is not None
    begins = not compilation.position.continues
    untimed = timestep is None and begins and (keeps_state or (compilation.position.leads_on and bool(extra_inputs)))
    if not extra_inputs and not ticks and (not compilation.sites or compat.compiling_ahead()):
        return compiled
    layers = compilation.layers
    steps = 1 + max((extra.step for extra in extra_inputs), default=0)
    own_clock, calls = Clock(), calls_of(compilation.compile_id)
    code = compat.source_line(compilation.sites[0].node) if eager else compilation.compile_id.split("/")[0]
    of_plan = next(((d.plan.call.query.frames, d.plan.call.query.tokens_per_frame) for d in compilation.sparse if d.plan is not None), None)
    tensors = [(position, value) for position, value in enumerate(compilation.example_inputs) if isinstance(value, Tensor)]
    latents = [position for position, value in tensors if value.dim() == 5 and not isinstance(value, nn.Parameter)]
    first, device = (tensors[0][0], tensors[0][1].device) if tensors else (None, torch.device("cpu"))

    def clock_for(args: Sequence[Any]) -> Clock:
        if owner is None or context.parent.get() is not None:
            model = context.root_module()
            return own_clock if model is None else clock_of(model, context.root_module)
        parameter = args[owner.position]
        return clock_of(parameter, lambda: context.root_module() or context.model_holding(parameter, owner.source))

    def appended(clock: Clock, step: int, block: Hashable, layer: int) -> dict[str, Tensor]:
        """The appended inputs of one of the graph's denoising steps, the clock standing there; ``block`` tells blocks of a class apart,
        and ``layer`` is the number of the first layer of the graph.
        """

        def value(extra: ExtraInput) -> Tensor:
            if extra.rows is not None:
                around, rows = context.parent.get(), extra.rows.later(layer)
                unconfirmed = around is not None and around.unconfirmed and rows.dense_row is not None
                return clock.phase(_dense(rows) if unconfirmed else rows, extra.device, step)
            if extra.state is not None:
                return clock.state((code, block, extra.site), extra.state, extra.device)
            return clock.branch(extra.device, step) if extra.is_branch else extra.value

        return {extra.name: value(extra) for extra in extra_inputs if extra.step == step}

    def block_of(args: Sequence[Any]) -> Hashable:
        """What tells the blocks apart that share the graph, and their calls in a forward."""
        around = context.parent.get()
        if owner is not None:
            block = context.module_number(args[owner.position], owner.source)
        else:
            block = context.number_of(compat.innermost_module()) if around is not None else 0
        return block if around is None or not (around.ticks or eager) else (block, around.time((code, block)))

    def run(*args: Any) -> Any:
        if first is not None and compat.is_fake(args[first]):  # as where Dynamo's DDP optimizer asks for shapes
            mode = compat.fake_mode_of(args[first])
            return compiled(*args, *(compat.fake_like(extra.value, mode, extra.device) for extra in extra_inputs))
        if not extra_inputs and not ticks:
            calls.note(device)
            return compiled(*args)
        clock = clock_for(args)
        calls.clocks.add(clock)
        block = block_of(args) if keeps_state or by_layer else 0
        around = context.parent.get()
        layer = clock.layers.first_of((code, block), layers, None if around is None else around.token) if by_layer else 0
        more: dict[str, Tensor] = {}
        timesteps = _timesteps(timestep, args) if ticks and (around is None or not around.ticked) else []
        if timestep is None and around is not None and around.timestep and not (around.ticks or around.ticked):
            timesteps = [around.timestep[1]]  # no graph of this forward has moved the clock
        if around is not None and timesteps:
            around.ticked = True
        size = (None if around is None else around.size) or size_of_video(args[position] for position in latents) or of_plan
        if untimed and (around is None or not around.ticks):
            clock.tick(None, size)
        for step in range(steps):
            if step < len(timesteps):
                clock.tick(timesteps[step], size)
            more |= appended(clock, step, block, layer)
        dense = next((more[extra.name] == row for extra in extra_inputs if (row := _dense_row(extra)) is not None), None)
        calls.note(device, dense)
        return compiled(*args, *(more[extra.name] for extra in extra_inputs))

    return run


def _dense(rows: Rows) -> WithDenseSteps:
    """The rule that chooses the row in which everything is attended at each step."""
    assert rows.dense_row is not None
    return WithDenseSteps(rows, 1 << 30, rows.dense_row)


def _dense_row(extra: ExtraInput) -> int | None:
    return None if extra.rows is None else extra.rows.dense_row


def _timesteps(timestep: TimestepInput | None, args: Sequence[Any]) -> list[Tensor]:
    """The timesteps of a call: of each denoising step of the graph one."""
    if timestep is None:
        return []
    if timestep.value is not None:
        return [torch.tensor(timestep.value)]
    found = []
    for position, element in timestep.steps or ((timestep.position, None),):
        value = args[position] if isinstance(args[position], Tensor) else torch.tensor(float(args[position]))
        found.append(value if element is None else value.select(0, element))
    return found


def finding_models(run: Callable[..., Any], owner: Owner | None, attend: Attend | None) -> Callable[..., Any]:
    """Has a graph that was compiled before its model was followed find other models that it serves, each at its first forward."""
    looked: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def call(*args: Any) -> Any:
        block = None if owner is None else args[owner.position]
        if watched_forward.get() is None and (block is None or block not in looked):
            find_model(attend)
            if block is not None:
                looked[block] = True
        return run(*args)

    return call


def with_watch_away(run: Callable[..., Any]) -> Callable[..., Any]:
    """Has nobody look at the ops of a compiled graph that runs in a forward which is followed."""
    if compat.compiling_ahead():
        return run

    def call(*args: Any) -> Any:
        watched = watched_forward.get()
        if watched is None:
            return run(*args)
        with watched.looking_away():
            return run(*args)

    return call


def with_labels(compiled: Callable[..., Any], compilation: Compilation) -> Callable[..., Any]:
    """Wraps a compiled graph so that its outputs are annotated with what is known of their axes, for the next graph."""
    begins = compilation.position.leads_on and not compilation.position.continues
    lost = compilation.position.leads_on and bool(compilation.trace_failure)
    if not (compilation.outgoing or compilation.passed_on or begins or lost):
        return compiled
    symbols = compat.symbol_positions(compilation.graph_module)
    names = [node.name for node in compilation.graph_module.graph.nodes if node.op == "placeholder"]
    used = origins(axis for _, axes in compilation.passed_on for axis in axes)
    inputs = [(name, position) for position, name in enumerate(names) if name in used]
    known: dict[tuple[int, ...], tuple[tuple[tuple[int, Axes], ...], ...]] = {}

    def in_ints(found: tuple[tuple[int, Axes], ...], values: Mapping[Any, int]) -> tuple[tuple[int, Axes], ...]:
        return tuple((position, in_numbers(axes, lambda size: compat.number_of(size, values))) for position, axes in found)

    def run(*args: Any) -> Any:
        if begins:
            begin_forward()
        watched = watched_forward.get()
        given = {name: args[position] for name, position in inputs} if watched is not None else {}
        outputs = compiled(*args)
        numbers = tuple(int(args[position]) for position in symbols.values())
        if numbers not in known:
            values = dict(zip(symbols, numbers, strict=True))
            known[numbers] = in_ints(compilation.outgoing, values), in_ints(compilation.passed_on, values)
        annotated, passed_on = known[numbers]
        for position, axes in annotated:
            if isinstance(outputs[position], Tensor):
                annotate(outputs[position], axes)
        if watched is not None:
            for position, axes in passed_on:
                if isinstance(outputs[position], Tensor):
                    watched.pass_on(outputs[position], axes, given)
        for output in outputs if lost else ():
            if isinstance(output, Tensor):
                annotate(output, None)
        return outputs

    return run
