"""Attention that is sparse already: ``flex_attention`` with its block mask, and this package's own op."""

from __future__ import annotations

from torch import fx

from lvsa_compile.patterns.site import DenseSite
from lvsa_compile.reasons import ALREADY_SPARSE


def match(node: fx.Node) -> DenseSite | None:
    """The site at ``node``, or None where it is no such attention."""
    if node.op != "call_function":
        return None
    name = str(node.target)
    if name == "flex_attention" or name.startswith("lvsa."):
        return DenseSite(node, ALREADY_SPARSE.because(f"{name.split('.')[0]} is used here"))
    return None
