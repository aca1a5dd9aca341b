"""Runs a Dynamo graph node by node on fake tensors while an ``AxisTracker`` follows the axes of every tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.axes.algebra import INPUT, PARAMETER, Source, axis_of, axis_size, same
from lvsa_compile.axes.call import Axes, sizes_of
from lvsa_compile.axes.positions import Relations
from lvsa_compile.axes.tracker import AxisTracker, RuleFailed
from lvsa_compile.axes.values import Array, Later
from lvsa_compile.forward.labels import watched_forward
from lvsa_compile.layout.guarded_values import Reader


class LayoutInterpreter(fx.Interpreter):
    """Runs the graph under an ``AxisTracker`` and keeps the axes of the tensors that are asked for.

    ``watched`` maps nodes to argument nodes of which is wanted what is known just before they run, of attention query, key, value first;
    ``unwritten`` maps attention to pairs of nodes, a tensor and the node after which it must not have been written to; attention for which
    that does not hold is then in ``written``.  ``brought`` holds the axes of inputs, by placeholder, that another graph of the same
    forward told.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        tracker: AxisTracker,
        watched: Mapping[fx.Node, tuple[fx.Node, ...]],
        reader: Reader,
        brought: Mapping[str, Axes],
        unwritten: Mapping[fx.Node, Sequence[tuple[fx.Node, fx.Node]]],
    ) -> None:
        super().__init__(graph_module)
        self.tracker, self.watched, self.reader, self.brought, self.unwritten = tracker, watched, reader, brought, unwritten
        self.found: dict[fx.Node, dict[fx.Node, Axes]] = {}
        self.written: set[fx.Node] = set()
        self._values: dict[tuple[fx.Node, fx.Node], Later] = {}
        self._ran: dict[fx.Node, int] = {}
        self._memory: dict[fx.Node, int] = {}
        self.output_axes: dict[int, Axes] = {}
        self.failed: dict[fx.Node, str] = {}
        self._autocasts: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node; a node that cannot run on fakes gives what Dynamo recorded for it, and starts new trails."""
        if n in self.watched:
            self._watch(n)
        if n.op == "output":
            outputs = n.args[0] if isinstance(n.args[0], (tuple, list)) else n.args[:1]
            tensors = {i: self.env[arg] for i, arg in enumerate(outputs) if isinstance(arg, fx.Node) and isinstance(self.env[arg], Tensor)}
            self.output_axes = {i: self.tracker.axes_of(tensor) for i, tensor in tensors.items()}
        self.tracker.node_name, self.tracker.moment = n.name, len(self._ran)
        self._ran[n] = self.tracker.moment
        if isinstance(n.meta.get("example_value"), torch.SymFloat):  # read again it would be another number that nobody knows
            return n.meta["example_value"]
        try:
            result = super().run_node(n)
        except RuleFailed:
            raise
        except Exception as error:
            if n.op in ("placeholder", "output") or "example_value" not in n.meta:
                raise
            self.failed[n] = f"{type(error).__name__}: {error}"
            self._may_have_written(n)
            return n.meta["example_value"]
        if len(self.watched.get(n, ())) >= 3 and isinstance(result, Tensor):
            query, _, value = (self.found[n].get(arg, ()) for arg in self.watched[n][:3])
            self.tracker.set_axes(result, attended(query, value, result, self.tracker.axes_of(result)))
        if isinstance(n.target, compat.HigherOrderOperator):
            self._may_have_written(n)
        if isinstance(result, Tensor):
            self._memory[n] = compat.memory_of(result)
        if getattr(n.target, "__name__", "") == "_enter_autocast":
            self._autocasts.append(result)
        elif getattr(n.target, "__name__", "") == "_exit_autocast":
            self._autocasts.pop()
        return result

    def _watch(self, n: fx.Node) -> None:
        """Keeps what is known of the tensors that a watched node is about to get, as they are now."""
        tensors = {arg: self.env[arg] for arg in self.watched[n] if isinstance(self.env.get(arg), Tensor)}
        self.found[n] = {arg: self.tracker.axes_of(tensor) for arg, tensor in tensors.items()}
        values = {(n, arg): self.tracker.values.later(tensor) for arg, tensor in tensors.items()}
        self._values.update((key, later) for key, later in values.items() if later is not None)
        last = self.tracker.last_written
        if any(last.get(self._memory.get(node, 0), -1) > self._ran[since] for node, since in self.unwritten.get(n, ())):
            self.written.add(n)

    def _may_have_written(self, n: fx.Node) -> None:
        """Notes writes that no op showed: of a node that did not run, or of a kernel that is no op."""
        for node in n.all_input_nodes:
            if node in self._memory:
                self.tracker.last_written[self._memory[node]] = self.tracker.moment

    def constant(self, site: fx.Node, node: fx.Node) -> Array | None:
        """The value that a watched ``site`` gets by ``node``, if neither the model's inputs nor its weights decide it; else None."""
        later = self._values.get((site, node))
        return later.array() if later is not None and later.constant else None

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
        with torch.set_grad_enabled(torch.is_grad_enabled()), compat.transforms_kept():
            try:
                yield
            finally:
                for autocast in reversed(self._autocasts):
                    autocast.__exit__(None, None, None)


def attended(query: Axes, value: Axes, result: Tensor, otherwise: Axes) -> Axes:
    """Axes of an attention's result: the query's, the last one the value's, whatever a kernel written out as ops does with the mask."""
    axes = (*query[:-1], *value[-1:])
    fits = len(axes) == result.dim() and all(map(same, map(axis_size, axes), sizes_of(result)))
    return axes if fits else otherwise


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
    unwritten: Mapping[fx.Node, Sequence[tuple[fx.Node, fx.Node]]] = MappingProxyType({}),
    assumed: Sequence[compat.Equality] | None = None,
) -> LayoutInterpreter | None:
    """Follows the axes of a whole graph, reading ``example_inputs`` where only values tell; None where it has no fake tensors to run on.

    Symbolic sizes are taken to be as ``assumed``, which whoever relies on what is found must guard; the tracker's ``relations`` then say
    which further equalities would be of use.
    """
    fake_mode = compat.fake_mode_of_graph(graph_module.graph)
    if fake_mode is None:
        return None
    relations = None if assumed is None else Relations(lambda size: compat.value_now(size, fake_mode))
    tracker = AxisTracker(relations)
    placeholders = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
    reader = Reader(dict(zip(placeholders, example_inputs, strict=False)), watched_forward.get())
    interpreter = LayoutInterpreter(graph_module, tracker, watched, reader, brought, unwritten)
    inputs = [None for _ in placeholders]
    with compat.isolated_run(fake_mode), interpreter.surroundings(), tracker:
        compat.suppose(fake_mode, assumed or ())
        interpreter.run(*inputs, enable_io_processing=False)
    return interpreter
