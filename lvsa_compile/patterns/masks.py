"""Masks that are a conjunction: ``padding[:, None, None, :] & padding[:, None, :, None]`` and its spellings.

A mask ``[B, heads, queries, keys]`` whose parts each depend on the keys alone, or on the queries alone, need not be made.  The parts are
put beside the mask as views, so that the axes of each can be read; nothing uses them until a site is rewritten.  A write to the mask
after it was made, or to what it was made of, ends that: ``MaskParts.unwritten`` says what must not have been written to.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from lvsa_compile.compat import example_value
from lvsa_compile.graph.edit import is_tensor, name_of
from lvsa_compile.patterns.canonical import CanonicalForm

AS_GOOD_AS_MINUS_INFINITY = -9999.0
"""What is added to a score that is not to count; models write anything from here down."""

_SAME_TRUTH = frozenset("bool to type contiguous clone type_as".split())
_CASTS_AND_VIEWS = _SAME_TRUTH | frozenset(
    "int long float half bfloat16 double short unsqueeze getitem view reshape expand repeat transpose permute flatten".split()
)
_AND = frozenset("and_ __and__ logical_and bitwise_and iand".split())
_AND_ONCE_BOOL = _AND | frozenset("mul __mul__ multiply".split())


Since = tuple[fx.Node, fx.Node]
"""A tensor, and the node after which it must not have been written to."""


@dataclass(frozen=True)
class MaskParts:
    """Boolean ``parts`` whose conjunction is a mask, each of its shape, as long as what is ``unwritten`` was not written to.

    ``added`` are the nodes that were put into the graph for them.
    """

    parts: tuple[fx.Node, ...]
    unwritten: tuple[Since, ...] = ()
    added: tuple[fx.Node, ...] = ()


def parts_of(mask: fx.Node) -> MaskParts:
    """The parts of a mask; one part, the mask itself, where it is no conjunction."""
    value = example_value(mask)
    if value.dtype != torch.bool:
        return MaskParts((mask,))
    canonical, unwritten = CanonicalForm(mask.next), list[Since]()
    try:
        found = _split(mask, [], canonical, unwritten)
    except (RuntimeError, ValueError, TypeError, IndexError):  # a spelling nobody foresaw: the mask is one part
        canonical.undo()
        return MaskParts((mask,))
    if len(found) == 1:
        canonical.undo()
        return MaskParts((mask,))
    return MaskParts(tuple(found), tuple(unwritten), tuple(canonical.nodes))


def _split(node: fx.Node, after: list[fx.Node], canonical: CanonicalForm, unwritten: list[Since]) -> list[fx.Node]:
    """Parts of what ``node`` is after the view ops ``after``, the last one first; ``node`` alone where it is no conjunction."""
    name, inputs = name_of(node), [argument for argument in node.args if is_tensor(argument)]
    if name in _SAME_TRUTH and inputs[:1] == [node.args[0]]:
        found = _split(inputs[0], after, canonical, unwritten)
    elif (name == "unsqueeze" or (name == "getitem" and _adds_axes(node))) and len(inputs) == 1:
        found = _split(inputs[0], [*after, node], canonical, unwritten)
    elif name in _AND_ONCE_BOOL and len(inputs) == 2 and len(node.args) == 2 and all(map(_is_truth, inputs)):
        found = [part for each in inputs for part in _split_shaped(each, node, after, canonical, unwritten)]
    else:
        return [node]
    if len(found) == 1:
        return [node]
    unwritten.append((node, node))
    return found


def _split_shaped(
    part: fx.Node, conjunction: fx.Node, after: list[fx.Node], canonical: CanonicalForm, unwritten: list[Since]
) -> list[fx.Node]:
    """Parts of one side of a conjunction, each as a view of the whole mask's shape."""
    sides = _split(part, [], canonical, unwritten)
    unwritten.extend((side, conjunction) for side in sides)
    whole = list(example_value(conjunction).shape)
    in_numbers = all(isinstance(size, int) for size in whole)  # else only a node can give the shape
    views = []
    for side in sides:
        view = canonical.call(torch.broadcast_to, side, whole) if in_numbers else canonical.call("expand_as", side, conjunction)
        for step in reversed(after):
            view = canonical.call(torch.unsqueeze if name_of(step) == "unsqueeze" else operator.getitem, view, *step.args[1:])
        views.append(view if example_value(view).dtype == torch.bool else canonical.call("to", view, torch.bool))
    return views


def _is_truth(node: fx.Node) -> bool:
    """Whether a tensor holds truth values, or the 0 and 1 that they were cast to: of other numbers a product or a conjunction may be 0."""
    while example_value(node).dtype != torch.bool:
        if name_of(node) not in _CASTS_AND_VIEWS or not node.args or not is_tensor(node.args[0]):
            return False
        node = node.args[0]
    return True


def _adds_axes(node: fx.Node) -> bool:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(i is None or i is Ellipsis or i == slice(None) for i in index)
