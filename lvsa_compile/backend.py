"""The Dynamo backend ``lvsa``: the way of a graph from Dynamo to the inner compiler, as a list of named steps."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.caches import drop_all
from lvsa_compile.compilers.inner import compile_inner, device_type
from lvsa_compile.errors import AheadOfTimeError
from lvsa_compile.forward import clock, context
from lvsa_compile.options import Options, parse_options
from lvsa_compile.passes.compilation import EAGER, Compilation, Pass
from lvsa_compile.passes.count_work import count_work
from lvsa_compile.passes.decide import decide
from lvsa_compile.passes.find_attention import find_attention
from lvsa_compile.passes.find_horizon import find_horizon
from lvsa_compile.passes.find_timestep import find_timestep
from lvsa_compile.passes.fix_sizes import fix_sizes
from lvsa_compile.passes.follow_forwards import follow_forwards
from lvsa_compile.passes.follow_trails import follow_trails
from lvsa_compile.passes.guard import guard
from lvsa_compile.passes.internal_error import is_internal, left_as_it_came, where
from lvsa_compile.passes.look_around import look_around
from lvsa_compile.passes.pipeline import run_passes
from lvsa_compile.passes.rewrite import lower, rewrite
from lvsa_compile.passes.trace_layout import trace_layout
from lvsa_compile.passes.verify import verify
from lvsa_compile.report.publish import publish, warn_of_model, warn_once
from lvsa_compile.report.recording import report_of
from lvsa_compile.report.warning import left_dense, warnings_of
from lvsa_compile.runtime import (
    eager_with_requirement,
    finding_models,
    owner_of,
    with_clock,
    with_labels,
    with_requirement,
    with_watch_away,
)
from lvsa_compile.source_stamp import source_stamp
from lvsa_compile.watching.eager_call import Attend, EagerCall, tensors_among, with_log_sum_exp
from lvsa_compile.watching.find_model import model_around, path_in

log = logging.getLogger(__name__)

ANALYSIS: tuple[Pass, ...] = (
    count_work,  # how much the model computes, for the report
    find_attention,  # every attention in the graph, in whatever form
    look_around,  # what is around the graph in its forward: breaks, attention between graphs
    find_timestep,  # which input tells the denoising step
    trace_layout,  # what each token axis is made of, followed from the inputs
    find_horizon,  # how many frames the model was trained on
    decide,  # per site: sparse with a plan, or dense with one reason
    fix_sizes,  # where a video is seen only with sizes as numbers, decides again with as few of them fixed as will do
    follow_trails,  # how each query came from the latent, for the report
)
PIPELINE: tuple[Pass, ...] = (
    *ANALYSIS,
    follow_forwards,  # where graphs do not show all, the model's next forward is followed while it runs
    rewrite,  # lvsa::attention at the sparse sites, tables and phase as inputs
    lower,  # each site's op becomes the op of its lowering
    verify,  # what the inner compiler and the run-time call rely on
)


def lvsa(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compiles a Dynamo graph with Long Video Sparse Attention where it applies; called by ``torch.compile(backend="lvsa")``.

    Raises:
        OptionError: an option has a value it cannot have, or does not exist.
        AheadOfTimeError: the graph becomes sparse and is to be saved as an artifact.
    """
    parsed = parse_options(options, mode).on(device_type(example_inputs))
    with model_around(attention_in_eager_code(parsed)):
        return _compiled(graph_module, example_inputs, parsed)


def _compiled(graph_module: fx.GraphModule, example_inputs: Sequence[Any], parsed: Options) -> Callable[..., Any]:
    compilation = _decided(PIPELINE, lambda: _beginning(graph_module, example_inputs, parsed), parsed, _settle)
    if compilation.changed and compat.compiling_ahead():
        raise AheadOfTimeError
    if compilation.changed:
        compilation.graph_module.recompile()
        fake_mode = compat.tracing_fake_mode()
        appended = [compat.fake_like(extra.value, fake_mode, extra.device) for extra in compilation.extra_inputs]
        compiled = compile_inner(compilation.graph_module, [*example_inputs, *appended], parsed, stamp=source_stamp())
    else:
        compiled = compile_inner(graph_module, example_inputs, parsed, stamp="")
    owner = owner_of(graph_module)
    running = with_watch_away(with_clock(with_labels(compiled, compilation), compilation, owner))
    around = context.parent.get()
    if around is not None and around.first_forward:
        running = finding_models(running, owner, attention_in_eager_code(parsed))
    return with_requirement(running, compilation.compile_id, owner) if parsed.require == "sparse" else running


def _beginning(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options, device: torch.device | None = None
) -> Compilation:
    position = context.position_of(graph_module)
    attend = attention_in_eager_code(options)
    return Compilation(
        compat.copy_graph(graph_module), options, example_inputs, device, compile_id=compat.compile_id(), position=position, attend=attend
    )


def attention_in_eager_code(options: Options) -> Attend | None:
    """Compiles attention that no graph holds, each call as a graph of one node; None where that is to stay as it is."""
    return functools.partial(_attention, options) if options.eager_attention else None


def _attention(options: Options, call: EagerCall) -> Callable[..., tuple[Tensor, Tensor]] | None:
    compat.reset_with_dynamo(lvsa)
    compile_id = f"{EAGER}{next(_eager_calls)}/0"
    compilation = _decided(PIPELINE, lambda: _beginning_of(call, options, compile_id), options, _settle)
    run = None
    if compilation.sparse:
        graph_module = with_log_sum_exp(compilation.graph_module, compilation.sparse[0].node)
        run = with_clock(graph_module.forward, compilation, None)
    return eager_with_requirement(run, compile_id) if options.require == "sparse" else run


def _beginning_of(call: EagerCall, options: Options, compile_id: str, clock_before: str = "") -> Compilation:
    """A graph of one node for attention in eager code, which nobody compiles further."""
    inputs = list(tensors_among(call.arguments).values())
    options = dataclasses.replace(options.on(device_type(inputs)), inner="eager", mode=None, inductor=())
    around = context.parent.get()
    if around is not None:
        clock_before = clock_before or (around.timestep[0] if around.timestep else "")
        around.block = " in ".join(part for part in (call.function, path_in(around.model, call.module)) if part)
    position, attend = context.Position(continues=True), attention_in_eager_code(options)
    return Compilation(call.graph(), options, inputs, compile_id=compile_id, position=position, attend=attend, clock_before=clock_before)


_eager_calls = itertools.count()


def _decided(
    passes: Sequence[Pass], beginning: Callable[[], Compilation], options: Options, settle: Callable[[Compilation], object]
) -> Compilation:
    """Runs passes and settles what they decided; where this package fails on the way, the graph is left as it came."""
    try:
        compilation = run_passes(passes, beginning(), known=PIPELINE)
        settle(compilation)
    except Exception as error:
        if not is_internal(error, options):
            raise
        log.debug("lvsa failed", exc_info=True)
        warn_once(
            f"lvsa failed, and a graph is compiled as it came, its attention dense: {where(error)}. This is a defect of lvsa-compile: "
            "please report this line, with the model and the sizes of its inputs. options={'strict': True} raises the error."
        )
        try:
            compilation = left_as_it_came(beginning(), error)
            settle(compilation)
        except Exception:  # whatever failed fails again: nothing is reported, and the graph is right all the same
            log.debug("lvsa failed again", exc_info=True)
            return Compilation(fx.GraphModule({}, fx.Graph()), options)
    return compilation


def _settle(compilation: Compilation) -> None:
    """Tells everybody else what was decided."""
    report = report_of(compilation)
    warnings_due = warnings_of(report, compilation)
    guard(compilation)
    _leave_the_clock_to_this_graph(compilation)
    forward = publish(report)
    for message in warnings_due:
        warn_once(message)
    warn_of_model(left_dense(forward))


def _leave_the_clock_to_this_graph(compilation: Compilation) -> None:
    """Where a forward is several graphs, the first that sees a timestep moves the clock for all."""
    root = context.root_module()
    if compilation.position.leads_on and compilation.timestep is not None and root is not None:
        clock.set_clock_input(root, compilation.timestep.name, compilation.compile_id.split("/")[0])


def _reset() -> None:
    """What ``torch._dynamo.reset()`` does here."""
    drop_all()
    compat.reset_cuda_graphs()


lvsa.reset = _reset  # type: ignore[attr-defined]


def analyse(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options, device: torch.device | None = None
) -> Compilation:
    """What the backend would decide for a graph that is to run on ``device``, without rewriting or compiling anything."""
    return _decided(ANALYSIS, lambda: _beginning(graph_module, example_inputs, options, device), options, report_of)


def analyse_call(call: EagerCall, options: Options, clock_before: str) -> Compilation:
    """What would be decided for attention in eager code, in a forward whose clock the input ``clock_before`` moves."""
    return _decided(ANALYSIS, lambda: _beginning_of(call, options, EAGER, clock_before), options, report_of)
