"""Written-out attention: ``softmax(query @ key.T * scale + mask) @ value`` with matmul, bmm, baddbmm, einsum or ``@``."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lvsa_compile import compat
from lvsa_compile.axes.call import Axes
from lvsa_compile.compat import example_value
from lvsa_compile.graph.edit import is_tensor, name_of, writes
from lvsa_compile.patterns.canonical import CanonicalForm
from lvsa_compile.patterns.contraction import (
    FIRST,
    PRODUCTS,
    VALUE,
    NotThisForm,
    Roles,
    brought,
    follow,
    key_atoms,
    laid_out,
    lead_factors,
    query_atoms,
    roles,
    value_atoms,
    without,
)
from lvsa_compile.patterns.masks import AS_GOOD_AS_MINUS_INFINITY
from lvsa_compile.patterns.site import AttentionSite, DenseSite
from lvsa_compile.reasons import DROPOUT, FORM_NOT_REWRITTEN

_CASTS = frozenset("to type type_as float half bfloat16 double contiguous clone".split())
_SHAPES = frozenset("view reshape flatten unflatten unsqueeze squeeze permute transpose swapaxes swapdims movedim".split())
_MULTIPLIES = frozenset("mul __mul__ imul mul_ multiply".split())
_DIVIDES = frozenset("div truediv __truediv__ itruediv div_ true_divide divide".split())
_ADDS = frozenset("add __add__ iadd add_".split())
_FILLS = frozenset("masked_fill masked_fill_ where".split())
_SEEN = _CASTS | _SHAPES | _MULTIPLIES | _DIVIDES | _ADDS | _FILLS | {"dropout", "clamp", "tanh", "sub", "nan_to_num"}
_FAR = 12  # nodes between a product and its softmax
_MOST_LOOKED_AT = 64


def match(node: fx.Node) -> AttentionSite | DenseSite | None:
    """The site whose softmax is ``node``, or None where it is no softmax between two products."""
    if name_of(node) != "softmax":
        return None
    before = _way(node, lambda n: n.all_input_nodes)
    after = _way(node, lambda n: n.users)
    if before is None or after is None:
        return _with_something_unknown(node)
    canonical = CanonicalForm(after[-1])
    try:
        return _site(node, before[::-1], after, canonical)
    except NotThisForm as why:
        canonical.undo()
        return DenseSite(node, why.args[1] if len(why.args) > 1 else FORM_NOT_REWRITTEN.because(f"written-out softmax: {why}"))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # a spelling nobody foresaw must not fail the compile
        canonical.undo()
        return DenseSite(node, FORM_NOT_REWRITTEN.because(f"written-out softmax: {type(error).__name__} while it was read"))


def _with_something_unknown(softmax: fx.Node) -> DenseSite | None:
    """The site of a softmax between two products where an unknown op that keeps the shape stands on the way; None where there is none."""
    before, after = (_unknown(softmax, step) for step in (lambda n: n.all_input_nodes, lambda n: n.users))
    if before is None or after is None or not (before or after):
        return None
    where = "its product and the softmax" if before else "the softmax and its product"
    return DenseSite(softmax, FORM_NOT_REWRITTEN.because(f"written-out softmax: {', '.join(before or after)} stands between {where}"))


def _unknown(softmax: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> list[str] | None:
    """Names of unknown ops on the way from the softmax to the nearest product; None where no way of scores leads to one."""
    scores = example_value(softmax)
    ways: list[tuple[fx.Node, list[str]]] = [(node, []) for node in step(softmax)]
    for _ in range(_MOST_LOOKED_AT):
        if not ways:
            return None
        node, unknown = ways.pop(0)
        name = name_of(node)
        if name in PRODUCTS:
            return unknown
        value = example_value(node)
        if is_tensor(node) and value.dim() >= 3 and compat.statically_true(value.numel() == scores.numel()) and node.op != "placeholder":
            ways.extend((each, unknown if name in _SEEN else [*unknown, name]) for each in step(node))
    return None


def _way(softmax: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> list[fx.Node] | None:
    """Nodes from next to the softmax to the nearest product in the direction of ``step``; None where there is none."""
    ways = [[node] for node in step(softmax)]
    while ways:
        way = ways.pop(0)
        name = name_of(way[-1])
        if name in PRODUCTS:
            return way
        if name in _SEEN and len(way) < _FAR:
            ways.extend([*way, node] for node in step(way[-1]) if is_tensor(node))
    return None


@dataclass(frozen=True)
class _Scores:
    """What happens between the product and the softmax: the scale, and the mask with the scores' axes where it meets them.

    ``fill`` is what masked scores become, or None where the mask is added; ``true_keeps`` says that True keeps a score.
    """

    scale: float = 1.0
    mask: fx.Node | None = None
    fill: float | None = None
    true_keeps: bool = False
    axes: Axes = ()


def _site(softmax: fx.Node, before: list[fx.Node], after: list[fx.Node], canonical: CanonicalForm) -> AttentionSite:
    way = [*before, softmax, *after]
    product, result = way[0], way[-1]
    if any(set(node.users) != {following} for node, following in itertools.pairwise(way)):
        raise NotThisForm("the scores or the weights are used elsewhere")
    if any(writes(node) for node in _between(product, result) if node not in way):
        raise NotThisForm("something is written to between its two products")
    for node in after[:-1]:
        _check_weights(node)

    first, second = _operands(product)
    value = next((node for node in _operands(result) if node is not way[-2]), None)
    if first is second or value is None:
        raise NotThisForm("both factors of a product are one tensor")
    axes = follow(way, first, second, value)
    scores = _scores(before, axes)
    found = roles(axes[softmax], _softmax_dim(softmax, len(axes[softmax])))
    lead = lead_factors(without(scores.axes if scores.mask is not None else axes[softmax], found), found)
    query, key = (first, second) if found.query_name == FIRST else (second, first)
    values = value_atoms(value, found, axes[result])

    mask = None if scores.mask is None else _mask(canonical, scores, found)
    attention = canonical.attention(
        brought(canonical, _uncast(query, value), found.query_name, query_atoms(query, found), lead),
        brought(canonical, _uncast(key, value), found.key_name, key_atoms(key, found), lead),
        brought(canonical, value, VALUE, values, lead),
        mask=mask,
        scale=scores.scale,
    )
    answer = laid_out(canonical, attention, [*found.batch, found.query, values[-1]], axes[result], lead)
    if example_value(answer).dtype != example_value(result).dtype:
        answer = canonical.call("to", answer, example_value(result).dtype)
    return canonical.site(attention, answer, result, tuple(way))


def _between(first: fx.Node, last: fx.Node) -> Iterable[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _check_weights(node: fx.Node) -> None:
    """Between softmax and value the weights may be cast and reshaped, and dropped out with no effect."""
    name = name_of(node)
    if name == "dropout":
        call = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
        if call.get("training", True) is not False and call.get("p", 0.5) != 0.0:
            raise NotThisForm("dropout", DROPOUT.because(f"dropout_p={call.get('p', 0.5)}"))
    elif name not in _CASTS | _SHAPES:
        raise NotThisForm(f"{name} is applied to the weights")


def _operands(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    name, arguments = name_of(product), [*product.args, *product.kwargs.values()]
    if name == "einsum":
        arguments = list(arguments[1]) if isinstance(arguments[1], (list, tuple)) else arguments[1:]
    elif name == "baddbmm":
        arguments = [
            product.kwargs.get(word, product.args[i] if i < len(product.args) else None) for i, word in ((1, "batch1"), (2, "batch2"))
        ]
    if len(arguments) != 2 or not all(map(is_tensor, arguments)):
        raise NotThisForm(f"{name} has other than two factors")
    return arguments[0], arguments[1]  # type: ignore[return-value]


def _softmax_dim(softmax: fx.Node, rank: int) -> int:
    dim = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    if not isinstance(dim, int):
        raise NotThisForm("the softmax names no axis")
    return dim % rank


# --- scale and mask ------------------------------------------------------------------------------------------------------------


def _scores(before: list[fx.Node], axes: dict[fx.Node, Axes]) -> _Scores:
    """What is done to the scores from their product, ``before[0]``, on."""
    scores, product = _Scores(), before[0]
    if name_of(product) == "baddbmm":
        beta, alpha = product.kwargs.get("beta", 1), product.kwargs.get("alpha", 1)
        scores = _scaled(scores, alpha)
        if beta != 0:
            scores = _masked(scores, product.kwargs.get("input", product.args[0] if product.args else None), axes[product])
        if beta not in (0, 1):
            raise NotThisForm("baddbmm has a beta that is neither 0 nor 1")
    for earlier, node in itertools.pairwise(before):
        scores = _after(scores, node, earlier, axes[earlier])
    return scores


def _after(scores: _Scores, node: fx.Node, earlier: fx.Node, axes: Axes) -> _Scores:
    """What is known of the scores after one more node."""
    name = name_of(node)
    others = [argument for argument in (*node.args, *node.kwargs.values()) if argument is not earlier]
    if name in _CASTS | _SHAPES:
        return scores
    if name in _MULTIPLIES and len(others) == 1:
        return _scaled(scores, others[0])
    if name in _DIVIDES and len(others) == 1 and node.args[0] is earlier:
        return _scaled(scores, 1.0 / others[0] if isinstance(others[0], (int, float)) else others[0])
    if name in _ADDS and len(others) == 1:
        return scores if isinstance(others[0], (int, float)) else _masked(scores, others[0], axes)
    if name in _FILLS and len(others) == 2 and isinstance(others[1], (int, float)):
        if others[1] > AS_GOOD_AS_MINUS_INFINITY:
            raise NotThisForm(f"masked scores become {others[1]}")
        return _masked(scores, others[0], axes, fill=float(others[1]), true_keeps=name == "where" and node.args[1] is earlier)
    raise NotThisForm(f"{name} is applied to the scores")


def _scaled(scores: _Scores, by: Any) -> _Scores:
    if not isinstance(by, (int, float)):
        raise NotThisForm("the scale is no number")
    if scores.mask is not None:
        raise NotThisForm("the scores are scaled after they are masked")
    return dataclasses.replace(scores, scale=scores.scale * float(by))


def _masked(scores: _Scores, mask: Any, axes: Axes, fill: float | None = None, true_keeps: bool = False) -> _Scores:
    if scores.mask is not None or not is_tensor(mask):
        raise NotThisForm("more than one mask is applied to the scores")
    return _Scores(scores.scale, mask, fill, true_keeps, axes)


def _mask(canonical: CanonicalForm, scores: _Scores, found: Roles) -> fx.Node:
    """The mask as ``scaled_dot_product_attention`` takes it: True counts, or added to the scores."""
    mask, leading = scores.mask, without(scores.axes, found)
    assert mask is not None
    in_order = tuple(factor for axis in leading for factor in axis) == found.batch
    if scores.axes[-2:] != ((found.query,), (found.key,)) or len(leading) > 2 or not in_order:
        raise NotThisForm("the mask meets the scores where they are not [batch, heads, queries, keys]")
    if len(leading) == 1 and example_value(mask).dim() == 3:
        mask = canonical.call("unsqueeze", mask, 1)
    elif example_value(mask).dim() == 1:
        mask = canonical.call("unsqueeze", mask, 0)
    if scores.fill is None:
        return mask
    if scores.fill == -math.inf:
        return mask if scores.true_keeps else canonical.call(torch.logical_not, mask)
    device = example_value(mask).device
    nothing, fill = (canonical.call(torch.full, (), n, dtype=torch.float32, device=device) for n in (0.0, scores.fill))
    return canonical.call(torch.where, mask, *((nothing, fill) if scores.true_keeps else (fill, nothing)))


def _uncast(node: fx.Node, value: fx.Node) -> fx.Node:
    """What an operand was before it was cast up for the scores alone, the value keeping its dtype."""
    if name_of(node) not in ("to", "float", "type") or len(node.all_input_nodes) != 1:
        return node
    before = node.all_input_nodes[0]
    return before if is_tensor(before) and example_value(before).dtype == example_value(value).dtype else node
