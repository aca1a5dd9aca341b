"""Attention that is sparse already: ``flex_attention`` with its block mask, and this package's own op."""

from __future__ import annotations

from torch import fx

from lvsa_compile import compat
from lvsa_compile.patterns.site import DenseSite
from lvsa_compile.reasons import ALREADY_SPARSE, FORM_NOT_REWRITTEN


def match(node: fx.Node) -> DenseSite | None:
    """The site at ``node``, or None where it is no such attention."""
    if node.op != "call_function":
        return None
    name = str(node.target)
    if name == "flex_attention" and not _has_block_mask(node):
        return DenseSite(node, FORM_NOT_REWRITTEN.because("flex_attention is used here, without a block mask"))
    if name == "flex_attention" or name.startswith("lvsa."):
        return DenseSite(node, ALREADY_SPARSE.because(f"{name.split('.')[0]} is used here"))
    return None


def _has_block_mask(flex: fx.Node) -> bool:
    """Whether the call skips blocks of keys: without a mask of the user's own torch puts in one block larger than any sequence."""
    mask = flex.args[4] if len(flex.args) > 4 else flex.kwargs.get("block_mask")
    return isinstance(mask, (tuple, list)) and not any(isinstance(size, int) and size >= compat.NO_BLOCKS for size in mask)
