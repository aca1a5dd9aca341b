"""``scaled_dot_product_attention`` in every calling style."""

from __future__ import annotations

import torch
from torch import fx

from lvsa_compile.patterns.site import AttentionSite, DenseSite
from lvsa_compile.reasons import SHAPE_NOT_SUPPORTED

TARGETS = frozenset(
    [
        torch.nn.functional.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    ]
)
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def match(node: fx.Node) -> AttentionSite | DenseSite | None:
    """The site at ``node``, or None where it is not ``scaled_dot_product_attention``."""
    if node.op != "call_function" or node.target not in TARGETS:
        return None
    call = dict(zip(_ARGUMENTS, node.args, strict=False)) | node.kwargs
    query, key, value, mask = (call.get(name) for name in ("query", "key", "value", "attn_mask"))
    if not (isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)):
        return DenseSite(node, SHAPE_NOT_SUPPORTED.because("query, key and value are not all tensors of the graph"))
    return AttentionSite(
        node,
        query,
        key,
        value,
        mask=mask if isinstance(mask, fx.Node) else None,
        causal=call.get("is_causal", False) is not False,
        dropout=call.get("dropout_p", 0.0),
        scale=call.get("scale"),
    )
