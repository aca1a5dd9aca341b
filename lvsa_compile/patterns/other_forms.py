"""Attention in forms that are recognised and not rewritten: written-out softmax, ``nn.MultiheadAttention``, opaque attention ops.

They are named in the report, so that a model whose attention is written this way is not dense in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from lvsa_compile.patterns.site import DenseSite
from lvsa_compile.reasons import FORM_NOT_REWRITTEN

_PRODUCTS = frozenset("matmul bmm einsum baddbmm __matmul__ mm".split())
_BEFORE = frozenset(
    "mul truediv div add sub masked_fill masked_fill_ where to float type type_as view reshape unsqueeze clamp tanh imul iadd itruediv"
    " mul_ add_ div_ contiguous".split()
)
_AFTER = frozenset("to type type_as float half bfloat16 dropout view reshape contiguous flatten masked_fill nan_to_num mul getitem".split())
_FAR = 8  # ops between a product and its softmax


def match(node: fx.Node) -> DenseSite | None:
    """The site at ``node``, or None where it is no attention of these forms."""
    name = _name(node)
    if name == "softmax" and _meets(node, lambda n: n.all_input_nodes, _BEFORE) and _meets(node, lambda n: n.users, _AFTER):
        return DenseSite(node, FORM_NOT_REWRITTEN.because("softmax between two matrix products"))
    if node.op == "call_function" and ("attention" in name or "attn" in name or name == "_transformer_encoder_layer_fwd"):
        return DenseSite(node, FORM_NOT_REWRITTEN.because(f"{name} is used here"))
    return None


def _meets(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]], through: frozenset[str]) -> bool:
    """Whether a matrix product is met on the way from ``start`` through ops named in ``through``."""
    reached, waiting = {start}, [(start, 0)]
    while waiting:
        node, distance = waiting.pop()
        for other in step(node):
            if _name(other) in _PRODUCTS:
                return True
            if _name(other) in through and other not in reached and distance < _FAR:
                reached.add(other)
                waiting.append((other, distance + 1))
    return False


def _name(node: fx.Node) -> str:
    if node.op not in ("call_function", "call_method"):
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0]
