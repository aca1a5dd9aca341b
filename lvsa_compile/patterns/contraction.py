"""What two products with a softmax between them do, read from symbolic axes: batch, heads, queries, keys, head_dim.

Whatever the spelling (einsum, bmm on merged batch and heads, a transposed factor), an axis of the scores that comes from both operands
is batch or heads, one that comes from one operand alone counts queries, and the softmax runs over the keys.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.axes.algebra import INPUT, Axis, Digit, Factor, Size, Source, axis_of, leaves, merge_factors, quotient, same, split_factor
from lvsa_compile.axes.call import Axes, sizes_of
from lvsa_compile.axes.tracker import AxisTracker
from lvsa_compile.compat import example_value, size_expression
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
            scores = next((env[arg] for arg in node.all_input_nodes if arg in found), None)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), functools.partial(_operand, env, scores))
            call: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
            env[node] = call(*(args[1:] if node.op == "call_method" else args), **kwargs)
            found[node] = tracker.axes_of(env[node])
    cuts = {
        (digit.source, edge)
        for axes in found.values()
        for axis in axes
        for factor in leaves(axis)
        for digit in factor.digits
        for edge in (digit.stride, digit.stride * digit.size)
    }
    return {node: tuple(_cut(axis, cuts) for axis in axes) for node, axes in found.items()}


def _operand(env: Mapping[fx.Node, Any], scores: Tensor | None, node: fx.Node) -> Any:
    """What ``node`` gives; where the scores meet it, as a mask, its sizes as theirs: guards may say that two symbols are equal."""
    value = env[node] if node in env else example_value(node)
    if node in env or scores is None or not isinstance(value, Tensor) or value.dim() > scores.dim():
        return value
    theirs = scores.shape[scores.dim() - value.dim() :]
    sizes = [other if compat.statically_true(size == other) else size for size, other in zip(value.shape, theirs, strict=True)]
    return value if sizes_of(value) == [size_expression(size) for size in sizes] else value.new_empty(sizes)


def _labelled(tracker: AxisTracker, node: fx.Node, name: str) -> Tensor:
    alias: Tensor = example_value(node).detach()
    tracker.set_axes(alias, tuple(axis_of(Source(INPUT, name, dim, size)) for dim, size in enumerate(sizes_of(alias))))
    return alias


def _cut(axis: Axis, cuts: set[tuple[Source, Size]]) -> Axis:
    """An axis with every factor split where any axis has a boundary."""
    done: list[Any] = []
    waiting = list(axis)
    while waiting:
        factor = waiting.pop(0)
        if not isinstance(factor, Factor):
            raise NotThisForm("the scores are joined with something")
        outers = (_outside(digit, source, edge) for digit in factor.digits for source, edge in cuts)
        outer = next((found for found in outers if found is not None), None)
        split = None if outer is None else split_factor(factor, outer)
        if split is None:
            done.append(factor)
        else:
            waiting = [*split[0], *split[1], *waiting]
    return tuple(done)


def _outside(digit: Digit, source: Source, edge: Size) -> Size | None:
    """How many times a stretch of ``edge`` elements of a source comes again in a digit; None where it is not a part of it."""
    inner = quotient(edge, digit.stride) if source == digit.source else None
    outer = None if inner is None else quotient(digit.size, inner)
    return None if inner is None or outer is None or same(inner, 1) or same(outer, 1) else outer


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


def lead_factors(leading: Sequence[Axis], found: Roles) -> tuple[int, int]:
    """How many of the batch factors are batch and how many heads: the two leading axes of the scores; else all are batch."""
    if len(leading) == 2 and tuple(factor for axis in leading for factor in axis) == found.batch:
        return len(leading[0]), len(leading[1])
    return len(found.batch), 0


def brought(canonical: CanonicalForm, node: fx.Node, name: str, atoms: Sequence[Factor], lead: tuple[int, int]) -> fx.Node:
    """An operand as ``[batch, heads, tokens, head_dim]``: split into its atoms, put in order, batch and heads joined as ``lead``."""
    digits = []
    for atom in atoms:
        own = _digits(atom, name)
        if len(own) != 1:
            raise NotThisForm("an operand is broadcast")
        digits.append(own[0])
    sizes = sizes_of(example_value(node))
    in_memory: list[int] = []
    pieces: list[list[Size]] = []
    for dim, size in enumerate(sizes):
        here = _in_memory([i for i, digit in enumerate(digits) if digit.source.axis == dim], digits)
        factors = tuple(Factor(digits[i].size, frozenset((digits[i],))) for i in here)
        if merge_factors(factors) != axis_of(Source(INPUT, name, dim, size)):
            raise NotThisForm("an operand is not used whole")
        in_memory += here
        pieces.append([digits[i].size for i in here])
    ordered = _permuted(canonical, _split(canonical, node, pieces), [in_memory.index(i) for i in range(len(digits))])
    return _joined(canonical, ordered, [*lead, 1, 1])


def laid_out(canonical: CanonicalForm, node: fx.Node, atoms: Sequence[Factor], out: Axes, lead: tuple[int, int]) -> fx.Node:
    """``[batch, heads, queries, value_dim]``, batch and heads joined as ``lead``, laid out as the product with the value was."""
    order: list[int] = []
    joined: list[int] = []
    for axis in out:
        here = [i for factor in axis for i, atom in enumerate(atoms) if isinstance(factor, Factor) and atom.digits <= factor.digits]
        order += here
        joined.append(len(here))
    if sorted(order) != list(range(len(atoms))):
        raise NotThisForm("the output does not have batch, heads, queries and value_dim once each")
    sizes = [atom.size for atom in atoms]
    pieces = [sizes[: lead[0]], sizes[lead[0] : lead[0] + lead[1]], *([size] for size in sizes[lead[0] + lead[1] :])]
    return _joined(canonical, _permuted(canonical, _split(canonical, node, pieces), order), joined)


def _in_memory(chosen: list[int], digits: Sequence[Digit]) -> list[int]:
    """The digits of one axis from the one with the largest stride on."""

    def is_outside(i: int, j: int) -> bool:
        return quotient(digits[i].stride, digits[j].stride * digits[j].size) is not None

    return sorted(chosen, key=lambda i: sum(is_outside(j, i) for j in chosen if j != i))


def _split(canonical: CanonicalForm, node: fx.Node, pieces: Sequence[Sequence[Size]]) -> fx.Node:
    """Splits each axis into axes of the given sizes, of which one may be a symbol; axes of one element without a size go."""
    for dim in reversed(range(len(pieces))):
        sizes = [size if isinstance(size, int) else -1 for size in pieces[dim]]
        if sizes.count(-1) > 1:
            raise NotThisForm("more than one size of an axis that is split is a symbol")
        if not sizes:
            node = canonical.call(torch.squeeze, node, dim)
        elif len(sizes) > 1:
            node = canonical.call(torch.unflatten, node, dim, sizes)
    return node


def _permuted(canonical: CanonicalForm, node: fx.Node, order: list[int]) -> fx.Node:
    return node if order == sorted(order) else canonical.call(torch.permute, node, order)


def _joined(canonical: CanonicalForm, node: fx.Node, counts: Sequence[int]) -> fx.Node:
    """Joins as many axes as ``counts`` say, one after the other; none become an axis of one element."""
    for dim, count in enumerate(counts):
        if count == 0:
            node = canonical.call(torch.unsqueeze, node, dim)
        elif count > 1:
            node = canonical.call(torch.flatten, node, dim, dim + count - 1)
    return node


def without(axes: Axes, found: Roles) -> list[Axis]:
    """The axes that are neither queries nor keys."""
    return [axis for axis in axes if axis not in ((found.query,), (found.key,))]
