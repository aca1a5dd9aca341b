"""Attention ops of other libraries that stand in the graph as one node: flash-attn, xformers, diffusers' wrapped kernels, ATen's own.

``LAYOUTS`` says for each how its tensors are laid out; its other arguments are read from its own signature, and each must have the
value that makes it plain attention.  Ops of sequences of any lengths, told by where each ends, are plain where there is one per sample;
where there are two, of which the second is padding, a mask says which tokens are of one sequence.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lvsa_compile import compat
from lvsa_compile.compat import example_value
from lvsa_compile.graph.edit import is_tensor, name_of
from lvsa_compile.ops.sequences import SAME_SEQUENCE
from lvsa_compile.patterns.canonical import CanonicalForm
from lvsa_compile.patterns.site import AttentionSite, DenseSite
from lvsa_compile.reasons import DROPOUT, FORM_NOT_REWRITTEN, SHAPE_NOT_SUPPORTED

BSHD, BHSD = "BSHD", "BHSD"
LAYOUTS = {
    "flash_attn.flash_attn_func": BSHD,
    "flash_attn._flash_attn_forward": BSHD,
    "flash_attn.flash_attn_varlen_func": BSHD,
    "flash_attn._flash_attn_varlen_forward": BSHD,
    "flash_attn_interface.flash_attn_func": BSHD,
    "flash_attn_interface.flash_attn_varlen_func": BSHD,
    "flash_attn_3._flash_attn_forward": BSHD,
    "flash_attn_3.fwd": BSHD,
    "_diffusers_flash_attn_3._flash_attn_forward": BSHD,
    "xformers.memory_efficient_attention": BSHD,
    "xformers_flash.flash_fwd": BSHD,
    "torch_attn._varlen_attn": BSHD,
    "aten._flash_attention_forward": BSHD,
    "aten._scaled_dot_product_flash_attention": BHSD,
    "aten._scaled_dot_product_flash_attention_for_cpu": BHSD,
    "aten._scaled_dot_product_efficient_attention": BHSD,
    "aten._scaled_dot_product_cudnn_attention": BHSD,
    "aten._scaled_dot_product_fused_attention_overrideable": BHSD,
    "npu.npu_fusion_attention": "",
}
"""Library and name of an op, and the order of axes of its query, key and value; "" where its ``input_layout`` says it.

BSHD stands for ``[samples * tokens, heads, head_dim]``, too, where the op is told the ends of sequences.
"""

_NAMED_LAYOUTS = {"BSND": BSHD, "BNSD": BHSD}

_ROLES = {
    "q": "query", "k": "key", "v": "value", "attn_bias": "attn_mask",
    "softmax_scale": "scale", "causal": "is_causal", "p": "dropout_p", "dropout": "dropout_p",
    "cu_seqlens_q": "query_ends", "cum_seq_q": "query_ends", "cu_seq_q": "query_ends",
    "cu_seqlens_k": "key_ends", "cum_seq_k": "key_ends", "cu_seq_k": "key_ends",
    "max_seqlen_q": "most_queries", "max_q": "most_queries", "max_seqlen_k": "most_keys", "max_k": "most_keys",
}  # fmt: skip
_NO_MATTER = frozenset(
    "return_softmax return_attn_probs return_debug_mask deterministic num_splits pack_gqa sm_margin compute_lse compute_log_sumexp op"
    " output_dtype return_lse enable_gqa zero_tensors"
    " head_num input_layout pre_tockens next_tockens inner_precise gen_mask_parallel sync softmax_layout seed offset".split()
)
_PLAIN: tuple[Any, ...] = (None, 0, -1, False, (-1, -1), [-1, -1], (None, None))


def match(node: fx.Node) -> AttentionSite | DenseSite | None:
    """The site at ``node``, or None where it is no attention op of a library known here."""
    layout = LAYOUTS.get(_library_name(node)) if node.op == "call_function" else None
    if layout is None:
        return None
    arguments = _arguments(node)
    if not layout:
        layout = _NAMED_LAYOUTS.get(arguments.get("input_layout", ""), "")
        if not layout:
            return DenseSite(node, FORM_NOT_REWRITTEN.because(f"{_library_name(node)} with input_layout={arguments.get('input_layout')}"))
    query, key, value = (arguments.pop(name, None) for name in ("query", "key", "value"))
    sequences = _Sequences(*(arguments.pop(name, None) for name in ("query_ends", "most_queries", "key_ends", "most_keys")))
    if not (is_tensor(query) and is_tensor(key) and is_tensor(value)) or not (sequences.told or example_value(query).dim() == 4):
        return DenseSite(node, SHAPE_NOT_SUPPORTED.because(f"{_library_name(node)} without batch and heads"))
    per_sample = sequences.per_sample(query, key) if sequences.told else 1
    if not per_sample:
        return DenseSite(node, FORM_NOT_REWRITTEN.because(f"{_library_name(node)} with sequences whose lengths may differ"))
    scale, causal, dropout = arguments.pop("scale", None), bool(arguments.pop("is_causal", False)), arguments.pop("dropout_p", 0.0)
    dropout = dropout or 1.0 - arguments.pop("keep_prob", 1.0)
    mask = arguments.pop("attn_mask") if is_tensor(arguments.get("attn_mask")) else None
    if dropout != 0.0:
        return DenseSite(node, DROPOUT.because(f"dropout_p={dropout}"))
    if is_tensor(scale):
        return DenseSite(node, FORM_NOT_REWRITTEN.because(f"{_library_name(node)} with a scale that is computed"))
    for name, given in arguments.items():
        if name not in _NO_MATTER and not any(type(given) is type(plain) and given == plain for plain in (*_PLAIN, 0.0)):
            return DenseSite(node, FORM_NOT_REWRITTEN.because(f"{_library_name(node)} with {name}={given}"))
    replaces = _output(node)
    if replaces is None:
        return DenseSite(node, FORM_NOT_REWRITTEN.because(f"more than the output of {_library_name(node)} is used"))
    canonical = CanonicalForm(replaces)
    whole: Sequence[fx.Node] = (query, key, value)
    if sequences.told:
        samples = sequences.samples(per_sample, canonical)
        whole = [canonical.call("unflatten", tensor, 0, (samples, -1)) for tensor in whole]
        mask = sequences.mask(samples, whole[0], canonical) if per_sample > 1 else mask
    turned = [node if layout == BHSD else canonical.call(torch.transpose, node, 1, 2) for node in whole]
    attention = canonical.attention(*turned, mask=mask, scale=scale, causal=causal)
    result = attention if layout == BHSD else canonical.call(torch.transpose, attention, 1, 2)
    if sequences.told:
        result = canonical.call("flatten", result, 0, 1)
    if example_value(result).dtype != example_value(replaces).dtype:
        result = canonical.call("to", result, example_value(replaces).dtype)
    return canonical.site(attention, result, replaces, (node,) if replaces is node else (node, replaces))


@dataclass(frozen=True)
class _Sequences:
    """Where the sequences of a call end, ``[sequences + 1]`` from 0 on, and how long the longest is, as the call has it."""

    query_ends: Any
    most_queries: Any
    key_ends: Any
    most_keys: Any

    @property
    def told(self) -> bool:
        """Whether queries or keys are sequences one after the other."""
        return self.query_ends is not None or self.key_ends is not None

    def per_sample(self, query: fx.Node, key: fx.Node) -> int:
        """How many sequences are in a sample, as long as the longest: 1, 2 where the queries' are the keys', or 0 where that is not known.

        All together are as long as the tensors are, as flash-attn's documentation asks for.  So many are as long as all together only if
        each is as long as the longest.  Half as many are so if a sequence and its padding are as long as the longest, or by chance.
        """
        key_ends, most_keys = (self.key_ends, self.most_keys) if self.key_ends is not None else (self.query_ends, self.most_queries)
        if not (is_tensor(self.query_ends) and is_tensor(key_ends) and example_value(query).dim() == example_value(key).dim() == 3):
            return 0
        sequences = example_value(self.query_ends).shape[0] - 1
        longest = (
            (_number(self.most_queries) * sequences, example_value(query).shape[0]),
            (_number(most_keys) * sequences, example_value(key).shape[0]),
        )
        if not compat.holds_here(example_value(key_ends).shape[0] - 1 == sequences):
            return 0
        counts = (1, 2) if key_ends is self.query_ends else (1,)
        return next((n for n in counts if all(compat.holds_here(one == n * other) for one, other in longest)), 0)

    def samples(self, per_sample: int, canonical: CanonicalForm) -> Any:
        """The number of samples, a node where it is symbolic."""
        found = (example_value(self.query_ends).shape[0] - 1) // per_sample
        if isinstance(found, int):
            return found
        sequences = canonical.call(operator.sub, canonical.call("size", self.query_ends, 0), 1)
        return canonical.call(operator.floordiv, sequences, per_sample)

    def mask(self, samples: Any, query: fx.Node, canonical: CanonicalForm) -> fx.Node:
        """Which tokens are of one sequence, ``[samples, 1, tokens, tokens]``."""
        tokens = example_value(query).shape[1]
        tokens = tokens if isinstance(tokens, int) else canonical.call("size", query, 1)
        return canonical.call(SAME_SEQUENCE, self.query_ends, samples, tokens)


def _number(value: Any) -> Any:
    """A number of a call, symbolic or not; 0 where it is none."""
    found = example_value(value) if isinstance(value, fx.Node) else value
    return found if isinstance(found, (int, torch.SymInt)) else 0


def _output(node: fx.Node) -> fx.Node | None:
    """The node that holds the attention output, if no other output is used."""
    if not isinstance(example_value(node), (tuple, list)):
        return node
    users = [user for user in node.users if user.users]
    return users[0] if len(users) == 1 and users[0].target is operator.getitem and users[0].args[1] == 0 else None


def is_known(func: compat.OpOverload) -> bool:
    """Whether an op is attention, of torch or of a library known here."""
    return func is torch.ops.aten.scaled_dot_product_attention.default or _name(func) in LAYOUTS


def layout_of(func: compat.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """How a call of an attention op lays out query, key and value; "" where that is not known here."""
    if func is torch.ops.aten.scaled_dot_product_attention.default:
        return BHSD
    layout = LAYOUTS.get(_name(func))
    if layout != "":
        return layout or ""
    return _NAMED_LAYOUTS.get(compat.arguments_by_name(func, args, kwargs).get("input_layout", ""), "")


def _name(func: Any) -> str:
    return ".".join(str(func).split(".")[:2])


def _library_name(node: fx.Node) -> str:
    if compat.schema_of(node.target) is not None or hasattr(node.target, "overloads"):
        return _name(node.target)
    return f"{(getattr(node.target, '__module__', None) or '').split('.')[0]}.{name_of(node)}"


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by the names used here, defaults included."""
    schema = compat.schema_of(node.target)
    if schema is not None:
        arguments = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
        arguments |= compat.arguments_by_name(node.target, node.args, node.kwargs)
    else:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
        bound.apply_defaults()
        arguments = dict(bound.arguments)
    return {_ROLES.get(name, name): given for name, given in arguments.items()}
