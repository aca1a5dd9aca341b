"""The op ``lvsa::attention``: attention of query blocks over ranges of keys, and its meaning in plain PyTorch.

Every lowering is an op of the same schema, defined with ``define_attention_op``, so that lowering a site means choosing a target.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.errors import PlanError, ShapeError
from lvsa_compile.policies.contract import Plan

library = torch.library.Library("lvsa", "FRAGMENT")
"""Where all ops of this package are defined."""

_SCHEMA = (
    "{name}(Tensor query, Tensor key, Tensor value, Tensor query_bounds, Tensor key_ranges, Tensor phase{state}, *,"
    " float? scale=None, Tensor? key_mask=None{arguments})"
    " -> (Tensor, Tensor)"
)
_STATE = ", Tensor branch, Tensor(a!)[] state"
_ROWS_AT_A_TIME = 1024
_LEAST_SCORE = -1e38  # that is still finite when it is taken to base 2


Body = TypeVar("Body", bound=Callable[..., tuple[Tensor, Tensor]])


class AttentionBody(Protocol):
    """Computes the op on real tensors."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_bounds: Tensor,
        key_ranges: Tensor,
        phase: Tensor,
        *,
        scale: float | None = None,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention output and natural log-sum-exp of the scores."""


def define_attention_op(name: str, body: AttentionBody, plans_on_host: bool = False) -> compat.OpOverload:
    """Registers ``lvsa::<name>`` with the schema, output strides and autocast rule all lowerings share.

    The op takes ``key_ranges`` ``[rows, heads or 1, query_blocks, ranges, 2]``; ``body`` gets those of one head, or of all that share them.
    One that ``plans_on_host`` is never recorded in a CUDA graph, which would keep the phase of that moment.
    """
    return _defined(name, by_heads(body), tags=compat.HOST_OP_TAGS if plans_on_host else compat.OPAQUE_OP_TAGS)


def define_stateful_op(name: str, body: Callable[..., tuple[Tensor, Tensor]], arguments: str = "") -> compat.OpOverload:
    """Registers ``lvsa::<name>``, an attention op that keeps tensors from step to step.

    ``body`` gets ``(query, key, value, query_bounds, key_ranges, phase, branch, state, *, scale, key_mask)``: ``state`` is a list of
    tensors ``[entries, ...]``, and ``branch`` an int32 scalar tensor that says which entry it may read and write.  ``arguments`` declares
    those of ``Plan.arguments``, as a schema has them: ``"float share, SymInt[] video"``.

    A second definition replaces the body of the first, as where a cell of a notebook runs again.
    """
    defined_before = name in _bodies
    _bodies[name] = body
    if defined_before:
        return meaning_of(name)
    return _defined(name, lambda *args, **more: _bodies[name](*args, **more), _STATE, f", {arguments}" if arguments else "")


_bodies: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}
"""Bodies of stateful ops by name."""


def _defined(
    name: str,
    body: Callable[..., tuple[Tensor, Tensor]],
    state: str = "",
    arguments: str = "",
    tags: tuple[torch.Tag, ...] = compat.OPAQUE_OP_TAGS,
) -> compat.OpOverload:
    library.define(_SCHEMA.format(name=name, state=state, arguments=arguments), tags=tags)
    library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lvsa::{name}", _fake, lib=library)
    operator: compat.OpOverload = getattr(torch.ops.lvsa, name).default
    for device in compat.AUTOCAST_KEYS:
        compat.register_autocast(library, name, device, operator)
    return operator


def by_heads(body: AttentionBody) -> AttentionBody:
    """A body that takes key ranges of all heads, from one that takes those of heads that share them."""

    @functools.wraps(body)
    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_bounds: Tensor,
        key_ranges: Tensor,
        phase: Tensor,
        *,
        scale: float | None = None,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if key_ranges.dim() != 5 or key_ranges.shape[1] not in (1, query.shape[1]):
            remedy = "Give heads an axis, of size 1 where they share their keys."
            raise ShapeError("key_ranges", tuple(key_ranges.shape), "not [rows, heads or 1, query_blocks, ranges, 2]", remedy)
        if key_ranges.shape[1] == 1:
            return body(query, key, value, query_bounds, key_ranges[:, 0], phase, scale=scale, key_mask=key_mask)
        output = output_like(query, value)
        log_sum_exp = torch.empty(query.shape[:3], dtype=accumulation_dtype(query.dtype), device=query.device)
        group = query.shape[1] // key.shape[1]
        for head in range(query.shape[1]):
            own, of_keys = slice(head, head + 1), slice(head // group, head // group + 1)
            mask = key_mask[:, own] if key_mask is not None and key_mask.shape[1] > 1 else key_mask
            output[:, own], log_sum_exp[:, own] = body(
                query[:, own], key[:, of_keys], value[:, of_keys], query_bounds, key_ranges[:, head].contiguous(), phase,
                scale=scale, key_mask=mask,
            )  # fmt: skip
        return output, log_sum_exp

    return run


def check_op(plan: Plan) -> None:
    """Whether the op of a plan is there and takes the state of the plan.

    Raises:
        PlanError: it is not, or does not.
    """
    operator = getattr(torch.ops.lvsa, plan.op, None)
    if operator is None:
        raise PlanError(plan.policy.name, "op", f"there is no op lvsa::{plan.op}", f"Define it: define_stateful_op({plan.op!r}, body).")
    names = {argument.name for argument in compat.schema_of(operator).arguments}
    unknown = [name for name, _ in plan.arguments if name not in names]
    if unknown:
        raise PlanError(plan.policy.name, "arguments", f"lvsa::{plan.op} has no {', no '.join(unknown)}", "Give what its schema has.")
    takes_state = "state" in names
    if takes_state != bool(plan.state):
        problem = f"lvsa::{plan.op} {'keeps' if takes_state else 'keeps no'} state, the plan has {len(plan.state)} tensors of it"
        raise PlanError(plan.policy.name, "state", problem, "Give state=(State(...), ...) where the op has it, and nowhere else.")


def meaning_of(op: str) -> compat.OpOverload:
    """The op of a plan, in plain PyTorch: ``lvsa::<op>``."""
    operator: compat.OpOverload = getattr(torch.ops.lvsa, op).default
    return operator


def on_the_querys_device(body: Body) -> Body:
    """Makes the query's GPU the current one while ``body`` runs: Triton and others launch on the current one."""

    @functools.wraps(body)
    def run(query: Tensor, *others: Any, **more: Any) -> tuple[Tensor, Tensor]:
        if query.device.type != "cuda":
            return body(query, *others, **more)
        with torch.cuda.device(query.device):
            return body(query, *others, **more)

    return cast(Body, run)


def output_like(query: Tensor, value: Tensor) -> Tensor:
    """Uninitialised ``[B, heads, Sq, value_dim]`` in the memory order SDPA gives: the query's, if head_dim is its fastest axis."""
    size = (*query.shape[:-1], value.shape[-1])
    order = compat.axes_in_memory_order(query)
    if order[-1] != query.dim() - 1:
        order = sorted(order)
    return torch.empty_permuted(size, order, dtype=query.dtype, device=query.device)


def default_scale(head_dim: int, scale: float | None) -> float:
    """The softmax scale: SDPA's default where none is given."""
    return 1.0 / math.sqrt(head_dim) if scale is None else scale


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and log-sum-exp are kept in float32, or in float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def score_mask(key_mask: Tensor, keys: int) -> Tensor:
    """A key mask as what is added to the scores: float32 ``[B or 1, heads or 1, 1, keys]``."""
    if key_mask.dtype == torch.bool:
        key_mask = torch.zeros(key_mask.shape, device=key_mask.device).masked_fill_(~key_mask, float("-inf"))
    key_mask = key_mask.float()
    key_mask = torch.where(key_mask == float("-inf"), key_mask, key_mask.clamp(min=_LEAST_SCORE))
    return key_mask.expand(-1, -1, -1, keys)


def broadcast_strides(mask: Tensor | None) -> tuple[int, ...]:
    """Strides of a four-axis mask with 0 where it has one place for all; all 0 without a mask."""
    return (0,) * 4 if mask is None else tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_ranges: Tensor,
    phase: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The meaning of ``lvsa::attention`` for heads that share their keys; the default lowering and the oracle of all others.

    Query row ``i`` of block ``b`` (``query_bounds[b] <= i < query_bounds[b + 1]``) attends key ``j`` when one of
    ``key_ranges[phase, b]`` holds ``start <= j < end``.  Softmax in float32 (float64 for float64 inputs).

    Args:
        query: ``[B, heads, Sq, head_dim]``; key: ``[B, key_heads, Sk, head_dim]``; value: ``[B, key_heads, Sk, value_dim]``,
            ``heads`` a multiple of ``key_heads`` (grouped queries).
        query_bounds: int32 ``[query_blocks + 1]``, in tokens; at most three blocks without rows in a row.
        key_ranges: int32 ``[phases, query_blocks, ranges, 2]``, in tokens; empty ranges are padding.  The op has an axis of heads after
            the first, of size 1 or ``heads``.
        phase: int32 scalar tensor, the row of ``key_ranges`` to use.
        scale: factor on the scores, by default ``1 / sqrt(head_dim)``.
        key_mask: which keys count, the same for every query: bool (True counts) or added to the scores, ``[B or 1, heads or 1, 1, Sk]``.
            A row that no key counts for gives 0, as in SDPA.

    Returns:
        Output ``[B, heads, Sq, value_dim]`` in the query's dtype and memory order, and log-sum-exp ``[B, heads, Sq]``.
    """
    value_a = value.to(accumulation_dtype(query.dtype)).repeat_interleave(query.shape[1] // key.shape[1], 1)
    output = output_like(query, value)
    log_sum_exp = torch.empty(query.shape[:3], dtype=value_a.dtype, device=query.device)
    for part, scores in scores_of(query, key, query_bounds, key_ranges, phase, scale=scale, key_mask=key_mask):
        weights, log_sum_exp[:, :, part] = weights_of(scores)
        output[:, :, part] = (weights @ value_a).to(query.dtype)
    return output, log_sum_exp


def weights_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of scores, 0 in a row that attends no key, and their log-sum-exp."""
    log_sum_exp = torch.logsumexp(scores, -1)
    return torch.softmax(scores, -1).masked_fill(log_sum_exp[..., None] == float("-inf"), 0), log_sum_exp


def scores_of(
    query: Tensor,
    key: Tensor,
    query_bounds: Tensor,
    key_ranges: Tensor,
    phase: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Scores ``[B, heads, rows, Sk]`` of ``attention`` for some rows at a time: minus infinity where a key is not attended."""
    accumulate = accumulation_dtype(query.dtype)
    key_t = key.to(accumulate).repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)
    query_bounds, key_ranges, phase = (table.to(query.device) for table in (query_bounds, key_ranges, phase))
    ranges = key_ranges.index_select(0, phase.reshape(1).long())[0]
    rows, columns = (torch.arange(n, device=query.device) for n in (query.shape[2], key.shape[2]))
    block_of_row = torch.bucketize(rows, query_bounds[1:], right=True)
    for start in range(0, query.shape[2], _ROWS_AT_A_TIME):
        part = slice(start, start + _ROWS_AT_A_TIME)
        attended = torch.zeros(rows[part].shape[0], columns.shape[0], dtype=torch.bool, device=query.device)
        for bounds in ranges[block_of_row[part]].unbind(1):
            attended |= (columns >= bounds[:, :1]) & (columns < bounds[:, 1:])
        scores = (query[:, :, part].to(accumulate) @ key_t) * default_scale(query.shape[-1], scale)
        scores = scores.masked_fill(~attended, float("-inf"))
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask, float("-inf")) if key_mask.dtype == torch.bool else scores + key_mask
        yield part, scores


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_ranges: Tensor,
    phase: Tensor,
    *state: Any,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Shapes and strides of the op's results."""
    lse_dtype = accumulation_dtype(query.dtype)
    return output_like(query, value), torch.empty(query.shape[:3], dtype=lse_dtype, device=query.device)


ATTENTION = define_attention_op("attention", attention)
