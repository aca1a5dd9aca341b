"""Looks at a model the way the backend does: what each pass found, without compiling anything further."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.axes.algebra import Axis, Concat, Digit
from lvsa_compile.axes.call import Axes
from lvsa_compile.layout.graph_trace import run_on_fakes


def traced_output(function: Any, *inputs: Tensor, dynamic: bool = False) -> Axes:
    """Symbolic axes of the single output of ``function``."""
    found = []

    def backend(graph_module, example_inputs):
        found.append(run_on_fakes(compat.copy_graph(graph_module), {}).output_axes[0])
        return graph_module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    return found[0]


def shown(axis: Axis) -> str:
    """An axis in short: ``x.2*x.3`` a product, ``(text.1 | x.2)`` a concatenation, ``x.3/2`` a digit, ``x.1[2:5]`` a slice."""
    parts = []
    for factor in axis:
        if isinstance(factor, Concat):
            parts.append("(" + " | ".join(shown(part) for part in factor.parts) + ")")
        else:
            parts.append("=".join(sorted({_digit(digit) for digit in factor.digits})))
    return "*".join(parts) or "1"


def _digit(digit: Digit) -> str:
    source = digit.source
    if source.kind != "input":
        return source.kind if source.kind != "lost" else f"?{source.name}"
    text = f"{source.name}.{source.axis}"
    if digit.stride != 1 or digit.size * digit.stride != source.size:
        text += f"/{digit.stride}" if digit.stride != 1 else ""
        text += f"%{digit.size}" if digit.start == 0 and digit.size * digit.stride != source.size else ""
    return text + (f"[{digit.start}:{digit.start + digit.size}]" if digit.start != 0 else "")
