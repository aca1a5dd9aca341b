"""Passes 6 and 7: put ``lvsa::attention`` at the sparse sites, then retarget each to its lowering."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.lowering.attention_op import ATTENTION, accumulation_dtype
from lvsa_compile.lowering.verification import VERIFIED
from lvsa_compile.passes.compilation import Compilation, Decision, ExtraInput, example_value
from lvsa_compile.patterns.shadow import step_in, withdraw
from lvsa_compile.sparsity.key_ranges import KeyRangeTable, key_range_table


def rewrite(compilation: Compilation) -> Compilation:
    """Replaces each sparse site by ``lvsa::attention``; tables and phases become inputs appended to the graph."""
    if not compilation.sparse:
        return compilation
    inputs = _ExtraInputs(compilation.graph_module)
    renamed = {decision.node: _rewrite_site(decision, compilation, inputs) for decision in compilation.sparse}
    for decision in compilation.decisions:
        if decision.site is not None and decision.plan is None:
            withdraw(decision.site)
    decisions = tuple(dataclasses.replace(d, node=renamed.get(d.node, d.node)) for d in compilation.decisions)
    compilation.graph_module.recompile()
    return dataclasses.replace(compilation, decisions=decisions, extra_inputs=tuple(inputs.made))


def lower(compilation: Compilation) -> Compilation:
    """Retargets every ``lvsa::attention`` to the op of the lowering its site was given."""
    for decision in compilation.sparse:
        assert decision.plan is not None
        decision.node.target = decision.plan.choice.lowering.operator
    compilation.graph_module.recompile()
    return compilation


class _ExtraInputs:
    """Appends inputs to a graph, each table and each phase once."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module = graph_module
        self._nodes: dict[object, fx.Node] = {}
        self._last = [node for node in graph_module.graph.nodes if node.op == "placeholder"][-1]
        self._fake_mode = compat.fake_mode_of_graph(graph_module.graph)
        self.made: list[ExtraInput] = []

    def tables(self, table: KeyRangeTable, device: torch.device) -> tuple[fx.Node, fx.Node]:
        """Nodes of ``query_bounds`` and ``key_ranges``."""
        return self._node("query_bounds", table.query_bounds, device), self._node("key_ranges", table.key_ranges, device)

    def phase(self, phases: int, dense_steps: int, device: torch.device) -> fx.Node:
        """Node of the phase of all patterns with ``phases`` rows, after ``dense_steps`` dense ones."""
        return self._node("phase", 0, device, phases, dense_steps)

    def _node(self, kind: str, content: Any, device: torch.device, phases: int = 0, dense_steps: int = 0) -> fx.Node:
        key = (kind, content, device, phases)
        if key not in self._nodes:
            extra = ExtraInput(
                f"lvsa_{kind}_{len(self.made)}", torch.tensor(content, dtype=torch.int32, device=device), phases, dense_steps
            )
            self._last = compat.add_tensor_input(self._graph_module, self._last, extra.name, extra.value, self._fake_mode)
            self._nodes[key] = self._last
            self.made.append(extra)
        return self._nodes[key]


def _rewrite_site(decision: Decision, compilation: Compilation, inputs: _ExtraInputs) -> fx.Node:
    """Puts the op in place of the site's node and returns the op's node."""
    site, plan = decision.site, decision.plan
    assert site is not None
    assert plan is not None
    call, node = plan.call, site.node
    options = compilation.options
    table = key_range_table(call.pattern, call.query, call.key, options.rotate, dense_row=options.dense_steps > 0)
    bounds, ranges = inputs.tables(table, call.device)
    phase = inputs.phase(call.pattern.phases if options.rotate else 1, options.dense_steps, call.device)
    result = example_value(node)
    with node.graph.inserting_before(node):
        key_mask = site.mask if site.mask is None else _one_row(node.graph, site.mask)
        attention = node.graph.call_function(
            ATTENTION, (site.query, site.key, site.value, bounds, ranges, phase), {"scale": site.scale, "key_mask": key_mask}
        )
        output = node.graph.call_function(operator.getitem, (attention, 0))
        if options.verify:
            arguments = (*attention.args, site.scale, key_mask, compilation.compile_id, decision.name)
            verified = node.graph.call_function(VERIFIED, (output, *arguments))
    kept: dict[str, Any] = {name: node.meta[name] for name in ("stack_trace", "nn_module_stack", "source_fn_stack") if name in node.meta}
    attention.meta = {**kept, "example_value": (result, _log_sum_exp_like(result))}
    output.meta = {**kept, "example_value": result}
    if options.verify:
        verified.meta = dict(output.meta)
    rewritten = verified if options.verify else output
    node.replace_all_uses_with(rewritten)
    step_in(site, rewritten)
    node.graph.erase_node(node)
    return attention


def _one_row(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """A mask that is the same for every query, as one row ``[.., .., 1, Sk]``."""
    value = example_value(mask)
    if value.dim() == 4 and compat.statically_true(value.shape[2] == 1):
        return mask
    index = (*(slice(None),) * (value.dim() - 2), slice(0, 1))
    row = graph.call_function(operator.getitem, (mask, index))
    row.meta["example_value"] = value[index]
    for _ in range(4 - value.dim()):
        value = row.meta["example_value"]
        row = graph.call_method("unsqueeze", (row, 0))
        row.meta["example_value"] = value.unsqueeze(0)
    return row


def _log_sum_exp_like(result: Tensor) -> Tensor:
    mode = compat.fake_mode_of(result)
    with mode:
        return torch.empty(result.shape[:3], dtype=accumulation_dtype(result.dtype), device=result.device)
