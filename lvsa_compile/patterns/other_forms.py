"""Attention that is recognised by its name alone and not rewritten: varlen and quantised kernels, fused encoder layers.

It is named in the report, so that a model whose attention is written this way is not dense in silence.
"""

from __future__ import annotations

from torch import fx

from lvsa_compile.patterns.shadow import name_of
from lvsa_compile.patterns.site import DenseSite
from lvsa_compile.reasons import FORM_NOT_REWRITTEN


def match(node: fx.Node) -> DenseSite | None:
    """The site at ``node``, or None where it is not named like attention."""
    name = name_of(node)
    if node.op == "call_function" and ("attention" in name or "attn" in name or name == "_transformer_encoder_layer_fwd"):
        return DenseSite(node, FORM_NOT_REWRITTEN.because(f"{name} is used here"))
    return None
