"""Runs a Dynamo graph node by node on fake tensors while an ``AxisTracker`` follows the axes of every tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.axes.algebra import INPUT, PARAMETER, Source, axis_of
from lvsa_compile.axes.call import Axes, sizes_of
from lvsa_compile.axes.tracker import AxisTracker
from lvsa_compile.axes.values import Array
from lvsa_compile.passes.trace_layout.reading import Reader


class LayoutInterpreter(fx.Interpreter):
    """Runs the graph under an ``AxisTracker`` and keeps the axes of the tensors that are asked for.

    ``watched`` maps a node to the argument nodes whose axes are wanted as they are just before it runs; ``brought`` holds the axes of
    inputs, by placeholder, that another graph of the same forward told.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        tracker: AxisTracker,
        watched: Mapping[fx.Node, tuple[fx.Node, ...]],
        reader: Reader,
        brought: Mapping[str, Axes],
    ) -> None:
        super().__init__(graph_module)
        self.tracker, self.watched, self.reader, self.brought = tracker, watched, reader, brought
        self.found: dict[fx.Node, dict[fx.Node, Axes]] = {}
        self.values: dict[fx.Node, Tensor] = {}
        self.output_axes: dict[int, Axes] = {}
        self.failed: dict[fx.Node, str] = {}
        self._autocasts: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node; a node that cannot run on fakes gives what Dynamo recorded for it, and starts new trails."""
        if n in self.watched:
            self.values.update((arg, self.env[arg]) for arg in self.watched[n] if isinstance(self.env.get(arg), Tensor))
            self.found[n] = {arg: self.tracker.axes_of(self.env[arg]) for arg in self.watched[n] if isinstance(self.env.get(arg), Tensor)}
        if n.op == "output":
            outputs = n.args[0] if isinstance(n.args[0], (tuple, list)) else n.args[:1]
            tensors = {i: self.env[arg] for i, arg in enumerate(outputs) if isinstance(arg, fx.Node) and isinstance(self.env[arg], Tensor)}
            self.output_axes = {i: self.tracker.axes_of(tensor) for i, tensor in tensors.items()}
        self.tracker.place = n.name
        try:
            result = super().run_node(n)
        except Exception as error:
            if n.op in ("placeholder", "output") or "example_value" not in n.meta:
                raise
            self.failed[n] = f"{type(error).__name__}: {error}"
            return n.meta["example_value"]
        if getattr(n.target, "__name__", "") == "_enter_autocast":
            self._autocasts.append(result)
        elif getattr(n.target, "__name__", "") == "_exit_autocast":
            self._autocasts.pop()
        return result

    def constant(self, node: fx.Node) -> Array | None:
        """The value of a node of which the model's inputs and weights decide nothing; None where they do."""
        value = self.values.get(node)
        return None if value is None else self.tracker.values.of(value, constant=True)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The fake tensor of an input under a new name, so that nothing done here can change the original's metadata."""
        node = next(n for n in self.graph.nodes if n.op == "placeholder" and n.target == target)
        value = node.meta.get("example_value")
        if not isinstance(value, Tensor):
            return value
        alias = value.detach()
        kind, name = input_kind(node)
        own = tuple(axis_of(Source(kind, name, i, size, node.name, value.dim())) for i, size in enumerate(sizes_of(value)))
        self.tracker.set_axes(alias, self.brought.get(node.name, own))
        self.tracker.values.set(alias, self.reader.later(node.name) if kind == INPUT else None)
        return alias

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """Modes the graph may switch while it runs are put back afterwards, even if a node fails."""
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            try:
                yield
            finally:
                for autocast in reversed(self._autocasts):
                    autocast.__exit__(None, None, None)


def input_kind(node: fx.Node) -> tuple[str, str]:
    """INPUT or PARAMETER, and a short name, for a placeholder of a Dynamo graph."""
    source = compat.placeholder_source(node) or node.name
    if "_parameters" in source or "_buffers" in source or "_modules" in source:
        return PARAMETER, node.name
    quoted = source.replace('"', "'").split("'")
    names = [part for part in quoted[1::2] if part not in ("self", "kwargs", "args")]
    subscript = quoted[-1].strip("[]").replace("][", ".") if quoted[-1].strip("[]").isdigit() else ""
    name = names[-1] if names else node.name
    return INPUT, f"{name}[{subscript}]" if subscript else name


def run_on_fakes(
    graph_module: fx.GraphModule,
    watched: Mapping[fx.Node, tuple[fx.Node, ...]],
    example_inputs: Sequence[Any] = (),
    brought: Mapping[str, Axes] = MappingProxyType({}),
) -> LayoutInterpreter | None:
    """Follows the axes of a whole graph, reading ``example_inputs`` where only values tell; None where it has no fake tensors to run on."""
    fake_mode = compat.fake_mode_of_graph(graph_module.graph)
    if fake_mode is None:
        return None
    tracker = AxisTracker()
    placeholders = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
    interpreter = LayoutInterpreter(graph_module, tracker, watched, Reader(dict(zip(placeholders, example_inputs, strict=False))), brought)
    inputs = [None for _ in placeholders]
    with compat.tracing_on_fakes(fake_mode), interpreter.surroundings(), tracker:
        interpreter.run(*inputs, enable_io_processing=False)
    return interpreter
