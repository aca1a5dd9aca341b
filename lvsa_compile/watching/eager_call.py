"""A call of attention in eager code, as a graph of one node: the passes decide on it as on any other."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lvsa_compile import compat
from lvsa_compile.errors import SequencesError

_MOST_CALLS = 1024
"""Calls of attention in eager code that are remembered."""

_ASKS_FOR_MORE = ("compute_log_sumexp", "return_softmax", "return_debug_mask", "return_attn_probs", "return_lse")
"""Arguments that ask for more than the output."""


@dataclass(frozen=True, eq=False)
class EagerCall:
    """A call of an attention op in eager code.

    ``arguments`` are those of the op by name, as far as they were given.  ``line`` is the line of Python that made the call,
    ``module`` the innermost module whose call is in progress, None if unknown.  ``needs_gradients`` says that gradients are recorded.
    """

    operator: compat.OpOverload
    arguments: Mapping[str, Any]
    line: str
    module: nn.Module | None
    needs_gradients: bool

    @property
    def function(self) -> str:
        """Name of the function that made the call."""
        return self.line.rpartition(" in ")[2]

    def graph(self) -> fx.GraphModule:
        """The call as a graph on fake tensors: its tensors come in, and its output goes out."""
        graph, mode = fx.Graph(), compat.static_fake_mode()
        arguments: dict[str, Any] = dict(self.arguments)
        inputs = dict[int, fx.Node]()
        for name, value in tensors_among(arguments).items():
            fake, node = compat.fake_like(value, mode), graph.placeholder(name)
            node.meta["example_value"] = fake.requires_grad_(self.needs_gradients and value.requires_grad)
            arguments[name] = inputs.setdefault(id(value), node)
        node = graph.call_function(self.operator, (), arguments)
        node.meta["stack_trace"] = f"  {self.line}"
        with compat.tracing_on_fakes(mode):
            found = node.meta["example_value"] = self.operator(**fx.node.map_arg(node.kwargs, compat.example_value))
        output = node
        if isinstance(found, tuple):
            output = graph.call_function(operator.getitem, (node, 0))
            output.meta = {**node.meta, "example_value": found[0]}
        graph.output((output,))
        return fx.GraphModule({}, graph)


Attend = Callable[[EagerCall], "Callable[..., tuple[Tensor, Tensor]] | None"]
"""Compiles attention that runs in eager code: gives what computes output and log-sum-exp, or None where it stays as it is."""


class CompiledCalls:
    """Calls of attention in eager code as they were compiled, by all that decides it."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable[..., tuple[Tensor, Tensor] | None] | None] = {}

    def run(
        self, attend: Attend, func: compat.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], axes_of: Callable[[Tensor], Any]
    ) -> Any:
        """What a call gives, compiled by ``attend`` where it was not before; None where it runs as it came.

        ``axes_of`` gives what is known of the axes of a tensor, one object as long as it is the same.
        """

        def deciding(value: Any) -> Any:
            if isinstance(value, Tensor):
                return id(axes_of(value)), value.shape, value.stride(), value.dtype, value.device, value.requires_grad
            return type(value), value

        gradients, given = torch.is_grad_enabled(), [id(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        key = (
            id(func), gradients, tuple(map(given.index, given)), tuple(map(deciding, args)),
            tuple((name, deciding(value)) for name, value in kwargs.items()),
        )  # fmt: skip
        if key not in self._compiled:
            if len(self._compiled) >= _MOST_CALLS:
                self._compiled.clear()
            self._compiled[key] = _compiled(attend, func, arguments_of(func, args, kwargs), gradients)
        run = self._compiled[key]
        if run is None:
            return None
        tensors = list(tensors_among(arguments_of(func, args, kwargs)).values())
        try:
            found = run(*tensors)
        except SequencesError:  # the ends of sequences are others than those it was compiled for
            self._compiled[key] = found = None
        return None if found is None else results(func, tensors[0], *found)


def _compiled(attend: Attend, func: compat.OpOverload, arguments: dict[str, Any], gradients: bool) -> Callable[..., Any] | None:
    if asks_for_more(arguments):
        return None
    call = EagerCall(func, arguments, compat.users_line(), compat.innermost_module(), gradients)
    with compat.no_modes(), torch.inference_mode(False):
        return attend(call)


def with_log_sum_exp(graph_module: fx.GraphModule, attention: fx.Node) -> fx.GraphModule:
    """The rewritten graph of a call, with the log-sum-exp that the node ``attention`` gives as a second output."""
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    with graph_module.graph.inserting_before(output):
        log_sum_exp = graph_module.graph.call_function(operator.getitem, (attention, 1))
    output.args = ((*output.args[0], log_sum_exp),)
    graph_module.recompile()
    return graph_module


def arguments_of(func: compat.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, a mask without the axes along which it is repeated."""
    found = compat.arguments_by_name(func, args, kwargs)
    for name in ("attn_mask", "attn_bias"):
        mask = found.get(name)
        if isinstance(mask, Tensor):
            found[name] = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]
    return found


def tensors_among(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among arguments, by name."""
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def asks_for_more(arguments: Mapping[str, Any]) -> bool:
    """Whether a call asks for more than the output, which is not computed apart from it."""
    return any(arguments.get(name) for name in _ASKS_FOR_MORE)


def results(func: compat.OpOverload, query: Tensor, output: Tensor, log_sum_exp: Tensor) -> Any:
    """What an op returns for an output ``[B, heads, Sq, value_dim]``, ``[B, Sq, heads, value_dim]`` or, of sequences one after the other,
    ``[B * Sq, heads, value_dim]``, and its log-sum-exp ``[B, heads, Sq]``; what only gradients need is empty.
    """
    returned = compat.schema_of(func).returns
    if len(returned) == 1:
        return output
    if output.dim() == 3:
        log_sum_exp = log_sum_exp.transpose(0, 1).flatten(1)
    found: list[Any] = []
    for position, each in enumerate(returned):
        if position == 0:
            found.append(output)
        elif isinstance(each.type, torch.TensorType):
            found.append(log_sum_exp if "sumexp" in each.name or "lse" in each.name else query.new_empty(0))
        else:
            found.append(0)
    return tuple(found)
