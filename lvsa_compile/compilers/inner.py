"""The inner compiler: who compiles the graph that the passes leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.compilers import torchair
from lvsa_compile.options import Options


def compile_inner(graph_module: fx.GraphModule, inputs: Sequence[Any], options: Options, stamp: str) -> Callable[..., Any]:
    """Hands a graph to the inner compiler; without ``stamp`` exactly as that compiler's own backend would get it."""
    inner = options.inner_on(device_type(inputs))
    if inner == "eager" and not compat.compiling_ahead():
        return graph_module.forward
    if inner != "inductor":
        compiled: Callable[..., Any] = _inner_backend(inner)(graph_module, inputs)
        return compiled
    inductor = dict(options.inductor)
    return compat.compile_with_inductor(graph_module, inputs, options.mode, compat.with_cache_stamp(inductor, stamp) if stamp else inductor)


def device_type(inputs: Sequence[Any]) -> str:
    """The kind of device a graph runs on: of its tensors the first that is not on the host."""
    kinds = [value.device.type for value in inputs if isinstance(value, Tensor)]
    return next((kind for kind in kinds if kind not in ("cpu", "meta")), kinds[0] if kinds else "cpu")


def _inner_backend(inner: str | Callable[..., Any]) -> Callable[..., Any]:
    if callable(inner):
        return inner
    if inner in torchair.NAMES:
        return torchair.npu_backend(inner)
    return compat.lookup_backend(inner)
