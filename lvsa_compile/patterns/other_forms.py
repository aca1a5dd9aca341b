"""Attention that is recognised by its name, or by what it gets and gives, and not rewritten: kernels of other libraries, encoder layers.

It is named in the report, so that a model whose attention is written this way is not dense in silence.
"""

from __future__ import annotations

import re

from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.compat import example_value
from lvsa_compile.graph.edit import is_tensor, name_of
from lvsa_compile.patterns.site import DenseSite
from lvsa_compile.reasons import FORM_NOT_REWRITTEN

_NAMED = re.compile(r"attention|attn|fmha|sdpa|^_transformer_encoder_layer_fwd$")


def match(node: fx.Node) -> DenseSite | None:
    """The site at ``node``, or None where it is neither named like attention nor an unknown operator that looks like it."""
    name = name_of(node)
    if node.op != "call_function":
        return None
    of_library, operator = compat.library_of(node.target), str(node.target).removesuffix(".default")
    if _NAMED.search(name):
        return DenseSite(node, FORM_NOT_REWRITTEN.because(f"{operator if of_library else name} is used here"))
    if of_library and _looks_like_attention(node):
        shapes = ", ".join(str(list(example_value(each).shape)) for each in _tensors(node))
        return DenseSite(node, FORM_NOT_REWRITTEN.because(f"{operator}, which is not known, gets {shapes} and may be attention"))
    return None


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The first three tensors that a call gets."""
    return [each for each in (*node.args, *node.kwargs.values()) if is_tensor(each)][:3]


def _looks_like_attention(node: fx.Node) -> bool:
    """Whether a call gets a query, a key and a value, of four axes each, and gives what attention over them would."""
    values = [example_value(each) for each in _tensors(node)]
    result = example_value(node)
    result = result[0] if isinstance(result, (tuple, list)) and result else result
    if len(values) < 3 or not all(isinstance(value, Tensor) and value.dim() == 4 for value in (*values, result)):
        return False
    query, key, value = values
    pairs = zip((*key.shape[:-1], query.shape[-1], *query.shape[:-1]), (*value.shape[:-1], key.shape[-1], *result.shape[:-1]), strict=True)
    return all(compat.statically_true(one == other) for one, other in pairs)
