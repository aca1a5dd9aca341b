"""``nn.MultiheadAttention``: one ``multi_head_attention_forward`` node that holds projections and attention."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lvsa_compile.compat import example_value
from lvsa_compile.graph.edit import is_tensor
from lvsa_compile.patterns.canonical import CanonicalForm
from lvsa_compile.patterns.site import AttentionSite, DenseSite
from lvsa_compile.reasons import DROPOUT, FORM_NOT_REWRITTEN, SHAPE_NOT_SUPPORTED

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def match(node: fx.Node) -> AttentionSite | DenseSite | None:
    """The site at ``node``, or None where it is no ``multi_head_attention_forward``."""
    if node.op != "call_function" or node.target is not F.multi_head_attention_forward:
        return None
    call = _SIGNATURE.bind(*node.args, **node.kwargs)
    call.apply_defaults()
    arguments = call.arguments
    problem = _problem(node, arguments)
    if problem:
        return DenseSite(node, FORM_NOT_REWRITTEN.because(f"nn.MultiheadAttention: {problem}"))
    if arguments["training"] and arguments["dropout_p"] != 0.0:
        return DenseSite(node, DROPOUT.because(f"dropout_p={arguments['dropout_p']}"))
    if example_value(arguments["query"]).dim() != 3:
        return DenseSite(node, SHAPE_NOT_SUPPORTED.because("nn.MultiheadAttention without a batch axis"))
    outputs = [user for user in node.users if user.args[1:] == (0,)]
    canonical = CanonicalForm(outputs[0])
    return _site(node, arguments, outputs[0], canonical)


def _problem(node: fx.Node, arguments: dict[str, Any]) -> str:
    """Why the call is not plain attention, or ""."""
    outputs = [user for user in node.users if user.target is operator.getitem]
    if len(outputs) != 1 or len(node.users) != 1 or outputs[0].args[1] != 0:
        return "the attention weights are used"
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if arguments[name] is not None:
            return f"{name} is given"
    if arguments["add_zero_attn"]:
        return "add_zero_attn is set"
    if arguments["is_causal"] or (arguments["attn_mask"] is not None and arguments["key_padding_mask"] is not None):
        return "it has more than one mask"
    return ""


def _site(node: fx.Node, arguments: dict[str, Any], replaces: fx.Node, canonical: CanonicalForm) -> AttentionSite:
    heads = arguments["num_heads"]
    query, key, value = (_heads(canonical, projected, heads) for projected in _projections(canonical, arguments))
    attention = canonical.attention(query, key, value, mask=_mask(canonical, arguments))
    joined = canonical.call(torch.flatten, canonical.call(torch.permute, attention, [2, 0, 1, 3]), 2)
    result = canonical.call(F.linear, joined, arguments["out_proj_weight"], arguments["out_proj_bias"])
    return canonical.site(attention, result, replaces, (node, replaces))


def _projections(canonical: CanonicalForm, arguments: dict[str, Any]) -> list[fx.Node]:
    """Query, key and value ``[tokens, B, width]`` after their projections."""
    inputs = [arguments[name] for name in ("query", "key", "value")]
    weights = [arguments[f"{letter}_proj_weight"] for letter in "qkv"]
    if not arguments["use_separate_proj_weight"]:
        weights = _thirds(canonical, arguments["in_proj_weight"])
    biases: list[Any] = [None] * 3 if arguments["in_proj_bias"] is None else _thirds(canonical, arguments["in_proj_bias"])
    return [canonical.call(F.linear, *each) for each in zip(inputs, weights, biases, strict=True)]


def _thirds(canonical: CanonicalForm, node: fx.Node) -> list[fx.Node]:
    chunks = canonical.call(torch.chunk, node, 3)
    return [canonical.call(operator.getitem, chunks, i) for i in range(3)]


def _heads(canonical: CanonicalForm, node: fx.Node, heads: int) -> fx.Node:
    """``[tokens, B, width]`` as ``[B, heads, tokens, head_dim]``."""
    return canonical.call(torch.permute, canonical.call(torch.unflatten, node, 2, (heads, -1)), [1, 2, 0, 3])


def _mask(canonical: CanonicalForm, arguments: dict[str, Any]) -> fx.Node | None:
    """``key_padding_mask`` ``[B, Sk]`` or ``attn_mask`` ``[Sq, Sk]`` or ``[B * heads, Sq, Sk]``; True is masked in both."""
    padding, mask = arguments["key_padding_mask"], arguments["attn_mask"]
    if is_tensor(padding):
        mask = canonical.call("unsqueeze", canonical.call("unsqueeze", padding, 1), 1)
    elif not is_tensor(mask):
        return None
    elif example_value(mask).dim() == 3:
        mask = canonical.call(torch.unflatten, mask, 0, (-1, arguments["num_heads"]))
    return canonical.call(torch.logical_not, mask) if example_value(mask).dtype == torch.bool else mask
