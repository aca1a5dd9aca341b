"""FX graphs as Dynamo makes them: copies, example values, sources and lines."""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from lvsa_compile.compat.fakes import fake_like


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be changed; attributes, node meta and what Dynamo keeps beside the graph are shared."""
    graph = copy.deepcopy(graph_module.graph)
    for old, new in zip(graph_module.graph.nodes, graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copied = fx.GraphModule(graph_module, graph)
    copied.meta = dict(graph_module.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(graph_module, name):
            object.__setattr__(copied, name, getattr(graph_module, name))
    return copied


def example_value(node: fx.Node) -> Any:
    """The fake value Dynamo recorded for a node; None where it recorded none."""
    return node.meta.get("example_value")


def source_line(node: fx.Node) -> str:
    """File, line and function a node was traced from; the node's name where Dynamo gave none.

    Of the calls that lead to it the innermost in the file of the module it belongs to, so that a model's line is named and not one of a
    library that the model calls.
    """
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")]
    home = next((file for _, kind in reversed((node.meta.get("nn_module_stack") or {}).values()) if (file := _file_of(kind))), None)
    return next((line for line in reversed(lines) if line.startswith(f'File "{home}"')), lines[-1] if lines else f"node {node.name}")


@functools.cache
def _file_of(module_class: Any) -> str | None:
    """The source file of a module's class where that is not torch's own."""
    try:
        file = inspect.getsourcefile(module_class)
    except TypeError:
        return None
    return file if file is None or not file.startswith(str(Path(torch.__file__).parent)) else None


def placeholder_source(node: fx.Node) -> str | None:
    """The Python expression a placeholder's value came from, such as ``L['timestep']``; None where Dynamo gave none."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return None
    return source_name(source)


def source_name(source: Any) -> str:
    """The Python expression of a Dynamo source."""
    name = source.name  # a property from torch 2.10 on, a method before
    return str(name() if callable(name) else name)


def add_tensor_input(graph_module: fx.GraphModule, after: fx.Node, name: str, like: Tensor, fake_mode: Any) -> fx.Node:
    """Adds a graph input with no Dynamo source, whose value the caller of the compiled function appends."""
    with graph_module.graph.inserting_after(after):
        node = graph_module.graph.placeholder(name)
    node._dynamo_source = None
    node.meta["example_value"] = fake_like(like, fake_mode)
    return node
