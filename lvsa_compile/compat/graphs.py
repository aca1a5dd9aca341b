"""FX graphs as Dynamo makes them: copies, example values, sources and lines."""

from __future__ import annotations

import copy
import functools
import inspect
import sysconfig
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
    for name in ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason"):
        if hasattr(graph_module, name):
            object.__setattr__(copied, name, getattr(graph_module, name))
    return copied


def example_value(node: fx.Node) -> Any:
    """The fake value Dynamo recorded for a node; None where it recorded none."""
    return node.meta.get("example_value")


def source_line(node: fx.Node) -> str:
    """File, line and function a node was traced from; the node's name where Dynamo gave none.

    Of the calls that lead to it the innermost in the file of the module it belongs to, so that a model's line is named and not one of a
    library that the model calls; where that file is a library's, a line of the user's own below it, such as an attention processor's.
    """
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")]
    home = next((file for _, kind in reversed((node.meta.get("nn_module_stack") or {}).values()) if (file := _file_of(kind))), None)
    at = next((position for position in reversed(range(len(lines))) if lines[position].startswith(f'File "{home}"')), None)
    if at is not None and not lines[at].startswith(LIBRARIES):
        return lines[at]
    own = [line for line in lines[at or 0 :] if not line.startswith(LIBRARIES)]
    return (own or lines[at:] or lines)[-1 if own or at is None else 0] if lines else f"node {node.name}"


LIBRARIES = (*(f'File "{sysconfig.get_path(name)}' for name in ("purelib", "platlib", "stdlib")), 'File "<')


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


def add_tensor_input(
    graph_module: fx.GraphModule,
    after: fx.Node,
    name: str,
    like: Tensor,
    fake_mode: Any,
    device: torch.device | None = None,
    static: bool = True,
) -> fx.Node:
    """Adds a graph input with no Dynamo source, whose value the caller of the compiled function appends.

    One that is ``static`` always lies at the same address: CUDA graphs need not copy it, and it may be written to under them.
    """
    with graph_module.graph.inserting_after(after):
        node = graph_module.graph.placeholder(name)
    node._dynamo_source = None
    node.meta["example_value"] = fake_like(like, fake_mode, device)
    if static:
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    return node
