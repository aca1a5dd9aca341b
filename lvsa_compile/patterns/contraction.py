"""What two products with a softmax between them do, read from symbolic axes: batch, heads, queries, keys, head_dim.

Whatever the spelling (einsum, bmm on merged batch and heads, a transposed factor), an axis of the scores that comes from both operands
is batch or heads, one that comes from one operand alone counts queries, and the softmax runs over the keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.axes.algebra import INPUT, Axis, Digit, Factor, Size, Source, axis_of, leaves, merge_factors, same, split_factor
from lvsa_compile.axes.call import Axes, sizes_of
from lvsa_compile.axes.tracker import AxisTracker
from lvsa_compile.compat import example_value
from lvsa_compile.patterns.canonical import CanonicalForm

PRODUCTS = frozenset("matmul __matmul__ bmm baddbmm einsum".split())
"""Names of the ops that multiply two tensors."""

FIRST, SECOND, VALUE = "first", "second", "value"
"""Names of the operands: of the product that gives the scores, and the other factor of the product with the weights."""


class NotThisForm(Exception):
    """Why a softmax between two products is not rewritten."""


@dataclass(frozen=True)
class Roles:
    """Factors of the scores by what they count.  ``query_name`` and ``key_name`` say which operand is which."""

    query_name: str
    key_name: str
    batch: tuple[Factor, ...]
    query: Factor
    key: Factor


def follow(way: list[fx.Node], first: fx.Node, second: fx.Node, value: fx.Node) -> dict[fx.Node, Axes]:
    """Axes of every node on the way from one product to the other, in terms of the operands' axes, all cut at the same positions."""
    tracker = AxisTracker()
    found: dict[fx.Node, Axes] = {}
    env: dict[fx.Node, Any] = {}
    with compat.isolated_run(compat.fake_mode_of_graph(way[0].graph)), tracker, torch.no_grad():
        env[first], env[second] = _labelled(tracker, first, FIRST), _labelled(tracker, second, SECOND)
        for node in way:
            if node is way[-1]:
                env[value] = _labelled(tracker, value, VALUE)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env.get(n, example_value(n)))
            call: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
            env[node] = call(*(args[1:] if node.op == "call_method" else args), **kwargs)
            found[node] = tracker.axes_of(env[node])
    cuts = {
        (digit.source, edge)
        for axes in found.values()
        for axis in axes
        for factor in leaves(axis)
        for digit in factor.digits
        for edge in (_int(digit.stride), _int(digit.stride) * _int(digit.size))
    }
    return {node: tuple(_cut(axis, cuts) for axis in axes) for node, axes in found.items()}


def _labelled(tracker: AxisTracker, node: fx.Node, name: str) -> Tensor:
    alias: Tensor = example_value(node).detach()
    tracker.set_axes(alias, tuple(axis_of(Source(INPUT, name, dim, size)) for dim, size in enumerate(sizes_of(alias))))
    return alias


def _cut(axis: Axis, cuts: set[tuple[Source, int]]) -> Axis:
    """An axis with every factor split where any axis has a boundary."""
    done: list[Any] = []
    waiting = list(axis)
    while waiting:
        factor = waiting.pop(0)
        if not isinstance(factor, Factor):
            raise NotThisForm("the scores are joined with something")
        edges = [
            edge // _int(digit.stride)
            for digit in factor.digits
            for source, edge in cuts
            if source == digit.source and _int(digit.stride) < edge < _int(digit.stride) * _int(digit.size)
        ]
        split = split_factor(factor, _int(factor.size) // max(edges)) if edges else None
        if split is None:
            done.append(factor)
        else:
            waiting = [*split[0], *split[1], *waiting]
    return tuple(done)


def roles(scores: Axes, key_dim: int) -> Roles:
    """What the factors of the scores count, the softmax being over axis ``key_dim``."""
    sides = {digit.source.name for factor in scores[key_dim] if isinstance(factor, Factor) for digit in factor.digits}
    if len(scores[key_dim]) != 1 or sides not in ({FIRST}, {SECOND}):
        raise NotThisForm("the softmax is not over the keys")
    query_name, key_name = (FIRST, SECOND) if sides == {SECOND} else (SECOND, FIRST)
    query: list[Factor] = []
    batch: list[Factor] = []
    for axis in (*scores[:key_dim], *scores[key_dim + 1 :]):
        for factor in axis:
            assert isinstance(factor, Factor)
            if _digits(factor, query_name) and _digits(factor, key_name):
                batch.append(factor)
            elif _digits(factor, query_name) and len(axis) == 1:
                query.append(factor)
            else:
                raise NotThisForm("an axis of the scores is neither batch, heads, queries nor keys")
    if len(query) != 1:
        raise NotThisForm(f"the scores have {len(query)} axes of queries")
    key = scores[key_dim][0]
    assert isinstance(key, Factor)
    return Roles(query_name, key_name, tuple(batch), query[0], key)


def query_atoms(node: fx.Node, found: Roles) -> list[Factor]:
    """Batch, query and head_dim factors of the query."""
    return [*found.batch, found.query, _contracted(node, found.query_name, (*found.batch, found.query))]


def key_atoms(node: fx.Node, found: Roles) -> list[Factor]:
    """Batch, key and head_dim factors of the key."""
    return [*found.batch, found.key, _contracted(node, found.key_name, (*found.batch, found.key))]


def value_atoms(node: fx.Node, found: Roles, out: Axes) -> list[Factor]:
    """Batch, key and value_dim factors of the value; ``out`` are the axes of the product with it."""
    factors = [factor for axis in out for factor in axis if isinstance(factor, Factor)]
    if not any(found.query.digits <= factor.digits for factor in factors) or any(found.key.digits & factor.digits for factor in factors):
        raise NotThisForm("the product with the value does not sum over the keys")
    alone = [factor for factor in factors if {digit.source.name for digit in factor.digits} == {VALUE}]
    batch = [factor for atom in found.batch for factor in factors if atom.digits <= factor.digits and _digits(factor, VALUE)]
    if len(alone) != 1 or len(batch) != len(found.batch):
        raise NotThisForm("batch and heads of the value are not those of the scores")
    return [*batch, _contracted(node, VALUE, factors), alone[0]]


def _digits(factor: Factor, name: str) -> list[Digit]:
    return [digit for digit in factor.digits if digit.source.name == name]


def _contracted(node: fx.Node, name: str, remaining: Sequence[Factor]) -> Factor:
    """The one axis of an operand that a product has summed over."""
    seen = {digit.source.axis for factor in remaining for digit in _digits(factor, name)}
    left = [(dim, size) for dim, size in enumerate(sizes_of(example_value(node))) if dim not in seen and not same(size, 1)]
    if len(left) != 1:
        raise NotThisForm(f"a product sums over {len(left)} axes")
    dim, size = left[0]
    return Factor(size, frozenset((Digit(Source(INPUT, name, dim, size), size),)))


def lead_sizes(leading: Sequence[Axis], found: Roles) -> list[int]:
    """Sizes of batch and heads: the two leading axes of the scores; where they are not two, all is batch."""
    if len(leading) == 2 and tuple(factor for axis in leading for factor in axis) == found.batch:
        return [math.prod(_int(factor.size) for factor in axis) for axis in leading]
    return [math.prod(_int(factor.size) for factor in found.batch), 1]


def brought(canonical: CanonicalForm, node: fx.Node, name: str, atoms: Sequence[Factor], lead: list[int]) -> fx.Node:
    """An operand as ``[batch, heads, tokens, head_dim]``: split into its atoms, put in order, batch and heads joined as ``lead``."""
    digits = []
    for atom in atoms:
        own = _digits(atom, name)
        if len(own) != 1:
            raise NotThisForm("an operand is broadcast")
        digits.append(own[0])
    in_memory = sorted(range(len(digits)), key=lambda i: (digits[i].source.axis, -_int(digits[i].stride)))
    for dim, size in enumerate(sizes_of(example_value(node))):
        here = tuple(Factor(digits[i].size, frozenset((digits[i],))) for i in in_memory if digits[i].source.axis == dim)
        if merge_factors(here) != axis_of(Source(INPUT, name, dim, size)):
            raise NotThisForm("an operand is not used whole")
    split = canonical.call(torch.reshape, node, [_int(digits[i].size) for i in in_memory])
    ordered = canonical.call(torch.permute, split, [in_memory.index(i) for i in range(len(digits))])
    return canonical.call(torch.reshape, ordered, [*lead, *(_int(digit.size) for digit in digits[-2:])])


def laid_out(canonical: CanonicalForm, node: fx.Node, atoms: Sequence[Factor], out: Axes, like: Tensor) -> fx.Node:
    """``[batch, heads, queries, value_dim]`` laid out as the product with the value was."""
    order: list[int] = []
    for factor in (factor for axis in out for factor in axis):
        assert isinstance(factor, Factor)
        order.extend(i for i, atom in enumerate(atoms) if atom.digits <= factor.digits)
    if sorted(order) != list(range(len(atoms))):
        raise NotThisForm("the output does not have batch, heads, queries and value_dim once each")
    split = canonical.call(torch.reshape, node, [_int(atom.size) for atom in atoms])
    permuted = canonical.call(torch.permute, split, order)
    return canonical.call(torch.reshape, permuted, [_int(size) for size in sizes_of(like)])


def without(axes: Axes, found: Roles) -> list[Axis]:
    """The axes that are neither queries nor keys."""
    return [axis for axis in axes if axis not in ((found.query,), (found.key,))]


def _int(size: Size) -> int:
    if not isinstance(size, int):
        raise NotThisForm("a size is known only while the model runs")
    return size
