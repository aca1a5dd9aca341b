"""The Dynamo backend ``lvsa``: the way of a graph from Dynamo to the inner compiler, as a list of named steps."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from lvsa_compile import compat
from lvsa_compile.axes.algebra import INPUT, PARAMETER
from lvsa_compile.caches import drop_all, dropped_on_reset
from lvsa_compile.compat import example_value
from lvsa_compile.compilers import torchair
from lvsa_compile.errors import AheadOfTimeError, LvsaWarning, RequireError
from lvsa_compile.forward import clock, context
from lvsa_compile.forward.labels import SameAnnotation, annotation_of
from lvsa_compile.layout.graph_trace import input_kind
from lvsa_compile.layout.guarded_values import SameValue
from lvsa_compile.options import Options, parse_options
from lvsa_compile.passes.compilation import Compilation, Pass
from lvsa_compile.passes.count_work import count_work
from lvsa_compile.passes.decide import decide
from lvsa_compile.passes.find_attention import find_attention
from lvsa_compile.passes.find_horizon import find_horizon
from lvsa_compile.passes.find_timestep import find_timestep
from lvsa_compile.passes.follow_trails import follow_trails
from lvsa_compile.passes.internal_error import is_internal, left_as_it_came, where
from lvsa_compile.passes.look_around import look_around
from lvsa_compile.passes.pipeline import run_passes
from lvsa_compile.passes.rewrite import lower, rewrite
from lvsa_compile.passes.trace_layout import trace_layout
from lvsa_compile.passes.verify import verify
from lvsa_compile.report.recording import report_of
from lvsa_compile.report.report import Report
from lvsa_compile.report.store import keep, report_with
from lvsa_compile.report.warning import left_dense, warnings_of
from lvsa_compile.runtime import Owner, with_clock, with_labels
from lvsa_compile.source_stamp import source_stamp

log = logging.getLogger(__name__)

ANALYSIS: tuple[Pass, ...] = (
    count_work,  # how much the model computes, for the report
    find_attention,  # every attention in the graph, in whatever form
    look_around,  # what is around the graph in its forward: breaks, attention between graphs
    find_timestep,  # which input tells the denoising step
    trace_layout,  # what each token axis is made of, followed from the inputs
    find_horizon,  # how many frames the model was trained on
    decide,  # per site: sparse with a plan, or dense with one reason
    follow_trails,  # how each query came from the latent, for the report
)
PIPELINE: tuple[Pass, ...] = (
    *ANALYSIS,
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
    parsed = parse_options(options, mode).on(_device_type(example_inputs))
    compilation = _decided(PIPELINE, lambda: _beginning(graph_module, example_inputs, parsed), parsed, _settle)
    if compilation.changed and compat.compiling_ahead():
        raise AheadOfTimeError
    if compilation.changed:
        compilation.graph_module.recompile()
        fake_mode = compat.tracing_fake_mode()
        appended = [compat.fake_like(extra.value, fake_mode, extra.device) for extra in compilation.extra_inputs]
        compiled = _compile_inner(compilation.graph_module, [*example_inputs, *appended], parsed, stamp=source_stamp())
    else:
        compiled = _compile_inner(graph_module, example_inputs, parsed, stamp="")
    owner = _owner(graph_module)
    running = with_clock(with_labels(compiled, compilation), compilation, owner)
    return _with_requirement(running, compilation.compile_id, owner) if parsed.require == "sparse" else running


def _with_requirement(run: Callable[..., Any], compile_id: str, owner: Owner | None) -> Callable[..., Any]:
    """Has a compiled graph raise where the user can mend what keeps attention over the video dense; not in its first forward.

    A graph that serves many blocks is called again for the same one only in the next forward.
    """
    called: set[int] = set()

    def checked(*args: Any) -> Any:
        block = 0 if owner is None else id(args[owner.position])
        forward = report_with(compile_id) if block in called else None
        if forward is not None and forward.mendable_miss is not None:
            raise RequireError(left_dense(forward), str(forward))
        called.add(block)
        return run(*args)

    return checked


def _beginning(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options, device: torch.device | None = None
) -> Compilation:
    position = context.position_of(graph_module)
    return Compilation(compat.copy_graph(graph_module), options, example_inputs, device, compile_id=compat.compile_id(), position=position)


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
        _warn_once(
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
    _guard(compilation)
    _leave_the_clock_to_this_graph(compilation)
    forward = _publish(report)
    for message in warnings_due:
        _warn_once(message)
    _warn_of_model(left_dense(forward))


def _leave_the_clock_to_this_graph(compilation: Compilation) -> None:
    """Where a forward is several graphs, the first that sees a timestep moves the clock for all."""
    root = context.root_module()
    if compilation.position.leads_on and compilation.timestep is not None and root is not None:
        clock.set_clock_input(root, compilation.timestep.name, compilation.compile_id.split("/")[0])


def _guard(compilation: Compilation) -> None:
    """Has Dynamo compile anew where what was relied on no longer holds; also where all stays dense, which may be sparse then.

    An artifact that is compiled ahead of time is dense and can save no guard of ours.
    """
    if compat.compiling_ahead():
        return
    placeholders = [node for node in compilation.graph_module.graph.nodes if node.op == "placeholder"]
    for node_name, held in (compilation.reader.relied_on if compilation.reader is not None else {}).items():
        node = next(node for node in placeholders if node.name == node_name)
        compat.guard_input(node, SameValue(held), "holds the values that the token layout was read from")
    around = context.parent.get()
    if around is not None and placeholders:
        hooks = around.hooks
        compat.guard_input(placeholders[-1], lambda _: context.hooks_around() == hooks, "goes to a block with the same hooks")
    shows_nothing = bool(compilation.sites) and not compilation.has_video
    if shows_nothing or (compilation.position.continues and (compilation.sites or compilation.outgoing)):
        for node, value in zip(placeholders, compilation.example_inputs, strict=False):
            if isinstance(value, torch.Tensor) and value.dim() >= 2 and input_kind(node)[0] == INPUT:
                compat.guard_input(node, SameAnnotation(annotation_of(value)), "carries the token layout it was compiled for")


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


def _compile_inner(graph_module: fx.GraphModule, inputs: Sequence[Any], options: Options, stamp: str) -> Callable[..., Any]:
    """Hands a graph to the inner compiler; without ``stamp`` exactly as that compiler's own backend would get it."""
    inner = options.inner_on(_device_type(inputs))
    if inner == "eager" and not compat.compiling_ahead():
        return graph_module.forward
    if inner != "inductor":
        compiled: Callable[..., Any] = _inner_backend(inner)(graph_module, inputs)
        return compiled
    inductor = dict(options.inductor)
    return compat.compile_with_inductor(graph_module, inputs, options.mode, compat.with_cache_stamp(inductor, stamp) if stamp else inductor)


def _device_type(inputs: Sequence[Any]) -> str:
    """The kind of device a graph runs on: of its tensors the first that is not on the host."""
    kinds = [value.device.type for value in inputs if isinstance(value, torch.Tensor)]
    return next((kind for kind in kinds if kind not in ("cpu", "meta")), kinds[0] if kinds else "cpu")


def _inner_backend(inner: str | Callable[..., Any]) -> Callable[..., Any]:
    if callable(inner):
        return inner
    if inner in torchair.NAMES:
        return torchair.npu_backend(inner)
    return compat.lookup_backend(inner)


def _owner(graph_module: fx.GraphModule) -> Owner | None:
    """Which input stands for the model at run time: a parameter from the middle, where tied weights are least likely."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    parameters = [
        Owner(position, compat.placeholder_source(node) or "")
        for position, node in enumerate(placeholders)
        if input_kind(node)[0] == PARAMETER and isinstance(example_value(node), torch.nn.Parameter)
    ]
    return parameters[len(parameters) // 2] if parameters else None


_warned: set[str] = dropped_on_reset(set())
_models_warned_of: WeakIdKeyDictionary = dropped_on_reset(WeakIdKeyDictionary())


def _publish(report: Report) -> Report:
    """Keeps the report, logs its line and counts; returns the report of the forward so far."""
    compat.trace_artifact("lvsa_report", lambda: json.dumps(report.to_dict(), indent=1))
    forward = keep(report, compat.compiled_entry(), context.parent.get())
    log.info("%s", report.summary)
    log.debug("%s", report)
    counts = compat.counters()
    counts["sites"] += len(report.sites)
    counts["sparse"] += len(report.sparse_sites)
    for site in report.sites:
        if site.reason:
            counts[f"dense.{site.reason}"] += 1
    return forward


def _warn_of_model(message: str) -> None:
    """Warns once for each model, whatever differs between its graphs and sizes; for each message where the model is not known."""
    model = context.root_module()
    if message and (model is None or model not in _models_warned_of):
        if model is not None:
            _models_warned_of[model] = True
        _warn_once(message)


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, LvsaWarning, stacklevel=2)
        log.info("%s", message)
