"""Adding nodes to an FX graph with the fake values they would have, and asking what a node does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.compat import example_value

_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack")
_WRITERS = frozenset("setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul".split())


def provenance(node: fx.Node) -> dict[str, Any]:
    """What a node's meta says of where it was traced."""
    return {name: node.meta[name] for name in _PROVENANCE if name in node.meta}


def called(graph: fx.Graph, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node that calls ``function``, or the method of that name, with the fake value it would have."""
    fakes = fx.node.map_arg(args, example_value)
    with compat.tracing_on_fakes(compat.fake_mode_of_graph(graph)):
        if isinstance(function, str):
            node, value = graph.call_method(function, args, kwargs), getattr(fakes[0], function)(*fakes[1:])
        else:
            node, value = graph.call_function(function, args, kwargs), function(*fakes, **fx.node.map_arg(kwargs, example_value))
    node.meta["example_value"] = value
    return node


def name_of(node: Any) -> str:
    """The bare name of the function or method a node calls; "" for anything else."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0]


def writes(node: fx.Node) -> bool:
    """Whether a node may write to a tensor that exists before it."""
    name = name_of(node)
    if name in _WRITERS or "out" in node.kwargs:
        return True
    schema = compat.schema_of(node.target)
    if getattr(node.target, "__module__", "") == "_operator":  # and_, or_ and not_ only dodge keywords
        return False
    return bool(getattr(schema, "is_mutable", False)) or (name.endswith("_") and not name.endswith("__"))


def thread_writes(graph: fx.Graph) -> None:
    """Lets what reads a tensor after an in-place op read that op's result, which is the same tensor, so that order shows as dataflow."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        name = name_of(node)
        target = node.args[0] if node.args else None
        if is_tensor(target) and is_tensor(node) and name != "setitem" and writes(node) and "out" not in node.kwargs:
            for user in [user for user in target.users if order[user] > order[node]]:
                user.replace_input_with(target, node)


def is_tensor(node: Any) -> TypeGuard[fx.Node]:
    """Whether a node's value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(example_value(node), Tensor)
