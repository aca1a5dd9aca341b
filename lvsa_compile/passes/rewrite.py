"""Puts ``lvsa::attention`` at the sparse sites; then retargets each to its lowering."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.compat import example_value
from lvsa_compile.forward.state import BRANCHES, VIDEOS
from lvsa_compile.graph.edit import called, provenance, writes
from lvsa_compile.layout.mask_form import MaskForm
from lvsa_compile.ops.attention import accumulation_dtype, meaning_of
from lvsa_compile.ops.sequences import SEQUENCE_OF_TOKENS
from lvsa_compile.ops.verified import VERIFIED
from lvsa_compile.passes.compilation import Compilation, Decision, ExtraInput, SparsePlan
from lvsa_compile.patterns.canonical import discard, substitute
from lvsa_compile.patterns.site import AttentionSite
from lvsa_compile.policies.contract import State
from lvsa_compile.policies.rows import Rows
from lvsa_compile.policies.tables import KeyRangeTable, VideoSpan
from lvsa_compile.selection.contract import AttentionCall, Prepared


def rewrite(compilation: Compilation) -> Compilation:
    """Replaces each sparse site by ``lvsa::attention``; tables and phases become inputs appended to the graph."""
    changed = compilation.changed or bool(compilation.sparse or compilation.masked)
    if not changed:
        return compilation
    inputs = _ExtraInputs(compilation.graph_module)
    renamed = {decision.node: _rewrite_site(decision, compilation, inputs) for decision in compilation.sparse}
    renamed |= {decision.node: _take_mask_apart(decision) for decision in compilation.masked}
    for decision in compilation.decisions:
        if decision.site is not None and decision.plan is None:
            discard(decision.site)
    left = set(compilation.graph_module.graph.nodes)
    for node in reversed(compilation.analysis_nodes):
        if node in left and not node.users:
            node.graph.erase_node(node)
    decisions = tuple(dataclasses.replace(d, node=renamed.get(d.node, d.node)) for d in compilation.decisions)
    return dataclasses.replace(compilation, decisions=decisions, extra_inputs=tuple(inputs.made), changed=changed)


def lower(compilation: Compilation) -> Compilation:
    """Retargets every ``lvsa::attention`` to what computes it by the lowering its site was given, with the tables that it wants."""
    if not compilation.sparse:
        return compilation
    inputs = _ExtraInputs(compilation.graph_module, compilation.extra_inputs)
    made: dict[tuple[str, AttentionCall], tuple[Prepared, list[fx.Node]]] = {}
    for decision in compilation.sparse:
        assert decision.plan is not None
        lowering, call = decision.plan.choice.lowering, decision.plan.call
        if lowering.operator is not None:
            decision.node.target = lowering.operator
            continue
        if (lowering.name, call) not in made:
            ready = lowering.prepared(call)
            made[lowering.name, call] = ready, [inputs.table(lowering.name, content, call.device) for content in ready.tables]
        ready, tables = made[lowering.name, call]
        query, key, value, *_, phase = decision.node.args
        decision.node.target, decision.node.args = ready.target, (query, key, value, *tables, phase)
    inputs.drop_unused()
    return dataclasses.replace(compilation, extra_inputs=tuple(inputs.made))


class _ExtraInputs:
    """Appends inputs to a graph, each table and each row once."""

    def __init__(self, graph_module: fx.GraphModule, made: tuple[ExtraInput, ...] = ()) -> None:
        self._graph_module = graph_module
        self._nodes: dict[object, fx.Node] = {}
        self._last = next((node for node in reversed(graph_module.graph.nodes) if node.op == "placeholder"), None)
        self._fake_mode = compat.fake_mode_of_graph(graph_module.graph)
        self.made = list(made)
        self._numbers = itertools.count(len(made))

    def table(self, kind: str, content: Any, device: torch.device) -> fx.Node:
        """Node of a new table of whole numbers."""
        value = torch.tensor(content, dtype=torch.int32, device=device)
        return self._input(ExtraInput(self._name(kind), value, device))

    def drop_unused(self) -> None:
        """Takes out the inputs that nothing uses any more."""
        nodes = {node.name: node for node in self._graph_module.graph.nodes if node.op == "placeholder"}
        for extra in [extra for extra in self.made if not nodes[extra.name].users]:
            self._graph_module.graph.erase_node(nodes[extra.name])
            self.made.remove(extra)

    def tables(self, table: KeyRangeTable, device: torch.device) -> tuple[fx.Node, fx.Node]:
        """Nodes of ``query_bounds`` and ``key_ranges``."""
        bounds, ranges = table.query_bounds, table.key_ranges
        return (
            self._once(("query_bounds", bounds, device), lambda: self.table("query_bounds", bounds, device)),
            self._once(("key_ranges", ranges, device), lambda: self.table("key_ranges", ranges, device)),
        )

    def moved(self, base: fx.Node, slope: fx.Node, tokens: fx.Node, span: VideoSpan, before: fx.Node) -> fx.Node:
        """A table for as many prefix tokens as ``tokens`` ``[B, heads, S, d]`` has; made once, before the first site that needs it."""
        if not span.free_start:
            return base

        def made() -> fx.Node:
            graph = self._graph_module.graph
            with graph.inserting_before(before):
                more = called(graph, operator.sub, called(graph, "size", tokens, 2), span.length)
                return called(graph, torch.add, base, called(graph, torch.mul, slope, more))

        return self._once(("moved", base, slope, str(example_value(tokens).shape[2]), span), made)

    def row(self, rows: Rows, device: torch.device, step: int) -> fx.Node:
        """Node of the row that a rule chooses at one of the graph's denoising steps."""
        value = torch.empty((), dtype=torch.int32, device="meta")
        make = functools.partial(self._input, ExtraInput(self._name("phase"), value, device, rows=rows, step=step))
        return self._once(("row", rows, device, step), make)

    def branch(self, device: torch.device, step: int) -> fx.Node:
        """Node of the entry of state tensors at one of the graph's denoising steps."""
        value = torch.empty((), dtype=torch.int32, device="meta")
        make = functools.partial(self._input, ExtraInput(self._name("branch"), value, device, step=step, is_branch=True))
        return self._once(("branch", device, step), make)

    def state(self, site: str, state: State, device: torch.device) -> fx.Node:
        """Node of a tensor that a site keeps, the same for all denoising steps of the graph."""
        value = torch.empty((VIDEOS * BRANCHES, *state.shape), dtype=state.dtype, device="meta")
        make = functools.partial(self._input, ExtraInput(self._name(f"state_{state.name}"), value, device, state=state, site=site))
        return self._once(("state", site, state, device), make)

    def _name(self, kind: str) -> str:
        return f"lvsa_{kind}_{next(self._numbers)}"

    def _once(self, key: object, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self._nodes:
            self._nodes[key] = make()
        return self._nodes[key]

    def _input(self, extra: ExtraInput) -> fx.Node:
        assert self._last is not None, "attention has inputs"
        static = extra.rows is None and not extra.is_branch
        node = compat.add_tensor_input(self._graph_module, self._last, extra.name, extra.value, self._fake_mode, extra.device, static)
        self.made.append(extra)
        self._last = node
        return node


def _rewrite_site(decision: Decision, compilation: Compilation, inputs: _ExtraInputs) -> fx.Node:
    """Puts the op in place of the site's node and returns the op's node."""
    site, sparse = decision.site, decision.plan
    assert site is not None
    assert sparse is not None
    call, plan, node = sparse.call, sparse.call.plan, site.node
    where = sparse.choice.lowering.device_of_tables(call.device)
    bounds, ranges = inputs.tables(plan.table, where)
    if call.query.free_start or call.key.free_start:
        grown = inputs.tables(plan.slopes(), where)
        bounds = inputs.moved(bounds, grown[0], site.query, call.query, node)
        ranges = inputs.moved(ranges, grown[1], site.key, call.key, node)
    step = compilation.step_of.get(site.node, 0)
    row = inputs.row(plan.rows.later(decision.layer), where, step)
    kept = [each.of_call(call.batch, call.head_dim) for each in plan.state]
    state = [inputs.state(_name_in_step(decision, compilation), each, call.device) for each in kept]
    result = example_value(node)
    with node.graph.inserting_before(node):
        numbers = _sequence_of_tokens(decision, sparse)
        key_mask = _key_mask(node.graph, sparse.mask) if numbers is None else _of_video(numbers, call.query)
        arguments = (site.query, site.key, site.value, bounds, ranges, row)
        of_state = (inputs.branch(call.device, step), state) if state else ()
        more = {"scale": site.scale, "key_mask": key_mask, **_arguments(site, call)}
        attention = node.graph.call_function(meaning_of(plan.op), (*arguments, *of_state), more)
        output = node.graph.call_function(operator.getitem, (attention, 0))
        meta = provenance(node)
        attention.meta = {**meta, "example_value": (result, _log_sum_exp_like(result))}
        output.meta = {**meta, "example_value": result}
        if compilation.options.verify and plan.op == "attention":
            compared = (output, *arguments, site.scale, key_mask, compilation.compile_id, decision.name)
            output = node.graph.call_function(VERIFIED, compared)
            output.meta = {**meta, "example_value": result}
        rewritten = _without_masked_queries(node.graph, output, sparse.mask)
        if numbers is not None:
            rewritten = _with_other_sequences(site, rewritten, numbers, call.query)
    node.replace_all_uses_with(rewritten)
    substitute(site, rewritten)
    _erase(node)
    return attention


def _arguments(site: AttentionSite, call: AttentionCall) -> dict[str, Any]:
    """What an op gets beside what all have: see ``Plan.arguments``."""
    found: dict[str, Any] = dict(call.plan.arguments)
    if any(argument.name == "video" for argument in compat.schema_of(meaning_of(call.plan.op)).arguments):
        first, stop = call.query.video
        found["video"] = [_start(site.query, call.query), _start(site.key, call.key), stop - first]
    return found


def _start(tokens: fx.Node, span: VideoSpan) -> int | fx.Node:
    """The first token of the video in a sequence ``[B, heads, S, d]``."""
    if not span.free_start:
        return span.prefix
    return called(tokens.graph, operator.sub, called(tokens.graph, "size", tokens, 2), span.length - span.prefix)


def _sequence_of_tokens(decision: Decision, sparse: SparsePlan) -> fx.Node | None:
    """The number of the sequence of each token, ``[B, S]``, where a mask tells of sequences."""
    if sparse.mask is None or sparse.mask.sequences is None:
        return None
    of_mask = sparse.mask.sequences
    return called(of_mask.graph, SEQUENCE_OF_TOKENS, *of_mask.args, *sparse.call.query.video, decision.name)


def _of_video(numbers: fx.Node, span: VideoSpan) -> fx.Node:
    """Which keys are in one sequence with the video, ``[B, 1, 1, S]``."""
    first = span.video[0]
    of_video = called(numbers.graph, operator.getitem, numbers, (slice(None), slice(first, first + 1)))
    return called(numbers.graph, operator.getitem, called(numbers.graph, torch.eq, numbers, of_video), (slice(None), None, None))


def _with_other_sequences(site: AttentionSite, output: fx.Node, numbers: fx.Node, span: VideoSpan) -> fx.Node:
    """An attention output ``[B, heads, S, value_dim]`` whose tokens beside the video attend those of their own sequence."""
    graph, (first, stop) = output.graph, span.video
    query_heads, key_heads = (example_value(node).shape[1] for node in (site.query, site.key))
    more = {"scale": site.scale, "enable_gqa": query_heads != key_heads}

    def beside(tokens: slice) -> fx.Node:
        rows = called(graph, operator.getitem, site.query, (slice(None), slice(None), tokens))
        own = called(graph, operator.getitem, numbers, (slice(None), tokens, None))
        mask = called(graph, torch.eq, own, called(graph, operator.getitem, numbers, (slice(None), None)))
        mask = called(graph, torch.unsqueeze, mask, 1)
        return called(graph, torch.nn.functional.scaled_dot_product_attention, rows, site.key, site.value, attn_mask=mask, **more)

    parts = [called(graph, operator.getitem, output, (slice(None), slice(None), slice(first, stop)))]
    parts = [beside(slice(0, first)), *parts] if first else parts
    parts = [*parts, beside(slice(stop, None))] if span.open_ended or span.suffix else parts
    return called(graph, torch.cat, parts, 2)


def _name_in_step(decision: Decision, compilation: Compilation) -> str:
    """The name of a site, numbered where its module is called more than once in a denoising step."""
    step_of = compilation.step_of
    alike = [d.node for d in compilation.decisions if d.name == decision.name and step_of.get(d.node, 0) == step_of.get(decision.node, 0)]
    return f"{decision.name} {alike.index(decision.node)}"


def _erase(node: fx.Node) -> None:
    """Takes a node that nobody uses out of the graph, and what was only made for it."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for earlier in inputs:
        if not earlier.users and earlier.op in ("call_function", "call_method") and not writes(earlier):
            _erase(earlier)


def _take_mask_apart(decision: Decision) -> fx.Node:
    """Dense attention under one row of its mask, the rows of masked queries zero, as they were; the whole mask is not made."""
    site = decision.site
    assert site is not None
    assert decision.mask is not None
    graph, node = site.node.graph, site.node
    with graph.inserting_before(node):
        mask = _key_mask(graph, decision.mask)
        arguments = {"attn_mask": mask, "dropout_p": 0.0, "scale": site.scale, "enable_gqa": node.kwargs.get("enable_gqa", False)}
        attention = graph.call_function(node.target, (site.query, site.key, site.value), arguments)  # type: ignore[arg-type]
        attention.meta = dict(node.meta)
        output = _without_masked_queries(graph, attention, decision.mask)
    node.replace_all_uses_with(output)
    _erase(node)
    return attention


def _key_mask(graph: fx.Graph, form: MaskForm | None) -> fx.Node | None:
    """The parts of a mask that tell keys, as one row ``[.., .., 1, Sk]``."""
    rows = [] if form is None else [_four_axes(graph, _sliced(graph, part, -2)) for part in form.keys]
    return functools.reduce(lambda a, b: called(graph, torch.logical_and, a, b), rows) if rows else None


def _without_masked_queries(graph: fx.Graph, output: fx.Node, form: MaskForm | None) -> fx.Node:
    """An attention output ``[B, heads, Sq, value_dim]`` with zero in the rows of queries that the mask leaves no key."""
    for part in () if form is None else form.queries:
        column = _four_axes(graph, _sliced(graph, part, -1))
        output = called(graph, torch.where, column, output, called(graph, torch.zeros_like, output))
    return output


def _sliced(graph: fx.Graph, mask: fx.Node, axis: int) -> fx.Node:
    """The first position of an axis along which a mask repeats."""
    value = example_value(mask)
    if compat.statically_true(value.shape[axis] == 1):
        return mask
    index = [slice(None)] * value.dim()
    index[axis] = slice(0, 1)
    return called(graph, operator.getitem, mask, tuple(index))


def _four_axes(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    for _ in range(4 - example_value(mask).dim()):
        mask = called(graph, torch.unsqueeze, mask, 0)
    return mask


def _log_sum_exp_like(result: Tensor) -> Tensor:
    mode = compat.fake_mode_of(result)
    with mode:
        return torch.empty(result.shape[:3], dtype=accumulation_dtype(result.dtype), device=result.device)
