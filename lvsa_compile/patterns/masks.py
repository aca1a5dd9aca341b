"""Masks that are a conjunction: ``padding[:, None, None, :] & padding[:, None, :, None]`` and its spellings.

A mask ``[B, heads, queries, keys]`` whose parts each depend on the keys alone, or on the queries alone, need not be made.  The parts are
put beside the mask as views, so that the axes of each can be read; nothing uses them until a site is rewritten.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from lvsa_compile.compat import example_value
from lvsa_compile.patterns.shadow import Shadow, is_tensor, name_of

AS_GOOD_AS_MINUS_INFINITY = -9999.0
"""What is added to a score that is not to count; models write anything from here down."""

_SAME_TRUTH = frozenset("bool to type contiguous clone type_as".split())
_AND = frozenset("and_ __and__ logical_and bitwise_and iand".split())
_AND_ONCE_BOOL = _AND | frozenset("mul __mul__ multiply".split())


def parts_of(mask: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """Boolean parts whose conjunction is ``mask``, each of its shape, and the nodes that were added for them; one part: the mask."""
    value = example_value(mask)
    if value.dtype != torch.bool or not all(isinstance(size, int) for size in value.shape):
        return (mask,), ()
    shadow = Shadow(mask.next)
    try:
        found = _split(mask, [], shadow)
    except (RuntimeError, ValueError, TypeError, IndexError):  # a spelling nobody foresaw: the mask is one part
        shadow.undo()
        return (mask,), ()
    if len(found) == 1:
        shadow.undo()
        return (mask,), ()
    return tuple(found), tuple(shadow.nodes)


def _split(node: fx.Node, after: list[fx.Node], shadow: Shadow) -> list[fx.Node]:
    """Parts of what ``node`` is after the view ops ``after``, the last one first."""
    name, inputs = name_of(node), [argument for argument in node.args if is_tensor(argument)]
    if name in _SAME_TRUTH and inputs[:1] == [node.args[0]]:
        found = _split(inputs[0], after, shadow)
        return found if len(found) > 1 else [node]
    if (name == "unsqueeze" or (name == "getitem" and _adds_axes(node))) and len(inputs) == 1:
        found = _split(inputs[0], [*after, node], shadow)
        return found if len(found) > 1 else [node]
    if name in _AND_ONCE_BOOL and len(inputs) == 2 and len(node.args) == 2:
        return [part for each in inputs for part in _split_shaped(each, node, after, shadow)]
    return [node]


def _split_shaped(part: fx.Node, conjunction: fx.Node, after: list[fx.Node], shadow: Shadow) -> list[fx.Node]:
    """Parts of one side of a conjunction, each as a view of the whole mask's shape."""
    sides = _split(part, [], shadow)
    whole = list(example_value(conjunction).shape)
    views = []
    for side in sides:
        view = shadow.call(torch.broadcast_to, side, whole)
        for step in reversed(after):
            view = shadow.call(torch.unsqueeze if name_of(step) == "unsqueeze" else operator.getitem, view, *step.args[1:])
        views.append(view if example_value(view).dtype == torch.bool else shadow.call("to", view, torch.bool))
    return views


def _adds_axes(node: fx.Node) -> bool:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(i is None or i is Ellipsis or i == slice(None) for i in index)
