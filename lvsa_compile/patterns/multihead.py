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
from lvsa_compile.patterns.shadow import Shadow
from lvsa_compile.patterns.site import AttentionSite, DenseSite
from lvsa_compile.reasons import DROPOUT, FORM_NOT_REWRITTEN, SHAPE_NOT_SUPPORTED

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def match(node: fx.Node) -> AttentionSite | DenseSite | None:
    """The site at ``node``, or None where it is no ``multi_head_attention_forward``."""
    if node.op != "call_function" or node.target is not F.multi_head_attention_forward:
        return None
    call = _SIGNATURE.bind(*node.args, **node.kwargs)
    call.apply_defaults()
    said = call.arguments
    problem = _problem(node, said)
    if problem:
        return DenseSite(node, FORM_NOT_REWRITTEN.because(f"nn.MultiheadAttention: {problem}"))
    if said["training"] and said["dropout_p"] != 0.0:
        return DenseSite(node, DROPOUT.because(f"dropout_p={said['dropout_p']}"))
    if example_value(said["query"]).dim() != 3 or not all(isinstance(n, int) for n in example_value(said["query"]).shape):
        return DenseSite(node, SHAPE_NOT_SUPPORTED.because("nn.MultiheadAttention without a batch axis, or of unknown size"))
    outputs = [user for user in node.users if user.args[1:] == (0,)]
    shadow = Shadow(outputs[0])
    return _site(node, said, outputs[0], shadow)


def _problem(node: fx.Node, said: dict[str, Any]) -> str:
    """Why the call is not plain attention, or ""."""
    outputs = [user for user in node.users if user.target is operator.getitem]
    if len(outputs) != 1 or len(node.users) != 1 or outputs[0].args[1] != 0:
        return "the attention weights are used"
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if said[name] is not None:
            return f"{name} is given"
    if said["add_zero_attn"]:
        return "add_zero_attn is set"
    if said["is_causal"] or (said["attn_mask"] is not None and said["key_padding_mask"] is not None):
        return "it has more than one mask"
    return ""


def _site(node: fx.Node, said: dict[str, Any], replaces: fx.Node, shadow: Shadow) -> AttentionSite:
    heads = said["num_heads"]
    query, key, value = (_heads(shadow, projected, heads) for projected in _projections(shadow, said))
    attention = shadow.attention(query, key, value, mask=_mask(shadow, said))
    joined = shadow.call(torch.flatten, shadow.call(torch.permute, attention, [2, 0, 1, 3]), 2)
    result = shadow.call(F.linear, joined, said["out_proj_weight"], said["out_proj_bias"])
    return shadow.site(attention, result, replaces, (node, replaces))


def _projections(shadow: Shadow, said: dict[str, Any]) -> list[fx.Node]:
    """Query, key and value ``[tokens, B, width]`` after their projections."""
    inputs = [said[name] for name in ("query", "key", "value")]
    weights = [said[f"{letter}_proj_weight"] for letter in "qkv"]
    if not said["use_separate_proj_weight"]:
        weights = _thirds(shadow, said["in_proj_weight"])
    biases: list[Any] = [None] * 3 if said["in_proj_bias"] is None else _thirds(shadow, said["in_proj_bias"])
    return [shadow.call(F.linear, *each) for each in zip(inputs, weights, biases, strict=True)]


def _thirds(shadow: Shadow, node: fx.Node) -> list[fx.Node]:
    chunks = shadow.call(torch.chunk, node, 3)
    return [shadow.call(operator.getitem, chunks, i) for i in range(3)]


def _heads(shadow: Shadow, node: fx.Node, heads: int) -> fx.Node:
    """``[tokens, B, width]`` as ``[B, heads, tokens, head_dim]``."""
    return shadow.call(torch.permute, shadow.call(torch.unflatten, node, 2, (heads, -1)), [1, 2, 0, 3])


def _mask(shadow: Shadow, said: dict[str, Any]) -> fx.Node | None:
    """``key_padding_mask`` ``[B, Sk]`` or ``attn_mask`` ``[Sq, Sk]`` or ``[B * heads, Sq, Sk]``; True is masked in both."""
    padding, mask = said["key_padding_mask"], said["attn_mask"]
    if is_tensor(padding):
        mask = shadow.call("unsqueeze", shadow.call("unsqueeze", padding, 1), 1)
    elif not is_tensor(mask):
        return None
    elif example_value(mask).dim() == 3:
        mask = shadow.call(torch.unflatten, mask, 0, (-1, said["num_heads"]))
    return shadow.call(torch.logical_not, mask) if example_value(mask).dtype == torch.bool else mask
