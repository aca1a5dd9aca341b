"""``explain``: what the backend would do with a model, without spending its compile budget."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lvsa_compile import compat
from lvsa_compile.backend import PIPELINE, analyse, analyse_call
from lvsa_compile.errors import ExplainError, in_a_line
from lvsa_compile.options import parse_options
from lvsa_compile.passes.pipeline import check_disabled
from lvsa_compile.reasons import GRAPH_BREAK
from lvsa_compile.report.recording import outside_graphs, report_of
from lvsa_compile.report.records import GraphReport
from lvsa_compile.report.report import Report
from lvsa_compile.report.store import merged
from lvsa_compile.runtime import with_labels, with_watch_away
from lvsa_compile.watching.eager_attention import EagerAttention
from lvsa_compile.watching.eager_call import EagerCall
from lvsa_compile.watching.watch import Watch, follow


def explain(
    model: Any, *args: Any, options: Mapping[str, Any] | None = None, device: str | torch.device | None = None, **kwargs: Any
) -> Report:
    """What ``torch.compile(model, backend="lvsa", options=options)`` would do with these inputs.

    Runs one eager forward without gradients; where attention runs between graphs two more, which follow it there.  Dynamo is not reset,
    no compile slot of the model is used, and no report, counter or clock changes.

    Args:
        model: a module or function, compiled already or not.
        *args: the inputs of one forward.
        options: as for ``torch.compile``.
        device: where to run; "meta" needs neither memory nor time, and works for models whose control flow reads no values.
        **kwargs: the inputs of one forward.

    Raises:
        OptionError: an option has a value it cannot have.
        ExplainError: the model reads a value on the meta device; names the line.

    Example:
        >>> print(lvsa_compile.explain(pipe.transformer, options={"reference_frames": 21}, device="meta", **inputs))
    """
    parsed = parse_options(options)
    check_disabled(parsed.disable_passes, PIPELINE)
    graphs: list[Report] = []
    clock: list[str] = []
    eager = EagerAttention()

    def note(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        compilation = analyse(graph_module, example_inputs, parsed, home)
        seen_by_running = dataclasses.replace(compilation.forward, outside=())
        compilation = dataclasses.replace(compilation, forward=seen_by_running)
        graphs.append(report_of(compilation))
        clock.extend([compilation.timestep.name] if compilation.timestep is not None else [])
        return with_watch_away(with_labels(graph_module.forward, compilation))

    def note_call(call: EagerCall) -> None:
        graphs.append(report_of(analyse_call(call, parsed, next(iter(clock), ""))))

    model = compat.uncompiled(model)
    home = next((tensor.device for tensor in _tensors((model, args, kwargs))), None)
    if device is not None:
        model, args, kwargs = _moved((model, args, kwargs), torch.device(device))
    function = compat.plain_call(model) if isinstance(model, nn.Module) else model
    args, kwargs = _by_name(model, args, kwargs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            with compat.mode_on(eager):
                compat.trace_apart(function, note)(*args, **kwargs)
            if parsed.eager_attention and isinstance(model, nn.Module) and (eager.lines or _broken(graphs)):
                following = Watch(model, ticks=False)
                for _ in range(2):  # what only outputs show is known in the second
                    graphs.clear()
                    following.attend_by(note_call)
                    follow(following, model, compat.trace_apart(function, note), args, kwargs)
                eager.lines.clear()
        except Exception as error:
            if device is not None and torch.device(device).type == "meta":
                raise ExplainError(user_line(error), str(error)) from error
            raise
    if eager.lines:
        sites = tuple(outside_graphs(line, f"called {count} times outside of all graphs") for line, count in eager.lines.items())
        graphs.append(Report(type(model).__name__, (GraphReport("-", sites),)))
    return _numbered(merged(graphs)) if graphs else Report(type(model).__name__, ())


def _numbered(report: Report) -> Report:
    """The report with its graphs numbered by themselves, so that the same question gets the same answer again."""
    graphs = (dataclasses.replace(graph, compile_id=f"explained {number}") for number, graph in enumerate(report.graphs, start=1))
    return dataclasses.replace(report, graphs=tuple(graphs))


def _broken(graphs: list[Report]) -> bool:
    """Whether a graph break keeps attention dense that may be sparse where the forward is followed."""
    return any(site.reason == GRAPH_BREAK.code for report in graphs for site in report.sites)


def _by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by the names of the model's own parameters, as a compile of it would see them, as far as they can be given by name."""
    try:
        bound = inspect.signature(model.forward if isinstance(model, nn.Module) else model).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    if any(kinds[name] in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL) for name in bound.arguments):
        return args, kwargs
    further = next((name for name in bound.arguments if kinds[name] == inspect.Parameter.VAR_KEYWORD), "")
    return (), {**{name: value for name, value in bound.arguments.items() if name != further}, **bound.arguments.get(further, {})}


def _moved(value: Any, device: torch.device) -> Any:
    """A deep copy on ``device``; a tensor already there is shared, and on the meta device nothing takes memory."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(value):
        moved = tensor.detach().to(device)
        memo[id(tensor)] = nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
    return copy.deepcopy(value, memo)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def user_line(error: BaseException) -> str:
    """The innermost line of an error that is neither torch's nor of this package; of Dynamo's errors the one they tell of."""
    reported = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', str(error).partition("from user code:")[2])
    raised = [(frame.filename, str(frame.lineno), frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    ours = str(Path(__file__).parent)
    frames = [found for found in reported or raised if "/torch/" not in found[0] and not found[0].startswith((ours, "<lvsa"))]
    return 'File "{}", line {}, in {}'.format(*frames[-1]) if frames else "an unknown line"


def what_it_says(error: BaseException) -> str:
    """The kind of an error and its first line; of Dynamo's errors those of the error that they tell of."""
    reported = re.search(r"got (\w+)\((.*)\)$", str(error), re.MULTILINE)
    return f"{reported[1]}: {reported[2]}" if reported and "from user code:" in str(error) else in_a_line(error)
