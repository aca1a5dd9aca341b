"""Linear attention: ``query @ (key.T @ value)`` with no softmax between; it is cheap at any length and is left alone."""

from __future__ import annotations

from torch import fx

from lvsa_compile.compat import example_value
from lvsa_compile.graph.edit import is_tensor, name_of
from lvsa_compile.patterns.contraction import PRODUCTS
from lvsa_compile.patterns.site import DenseSite
from lvsa_compile.reasons import ALREADY_SPARSE

_BETWEEN = frozenset(
    "to type type_as float half bfloat16 contiguous clone transpose permute unsqueeze getitem mul __mul__ div truediv pad mT t".split()
)
_FAR = 6


def match(node: fx.Node) -> DenseSite | None:
    """The site whose second product is ``node``, or None."""
    if name_of(node) not in PRODUCTS or not _of_activations(node):
        return None
    waiting = [(argument, 0) for argument in node.all_input_nodes]
    while waiting:
        other, distance = waiting.pop()
        if name_of(other) in PRODUCTS and _of_activations(other) and _sums_over_tokens(other):
            return DenseSite(node, ALREADY_SPARSE.because("linear attention: a product of keys and values with no softmax"))
        if name_of(other) in _BETWEEN and distance < _FAR:
            waiting.extend((earlier, distance + 1) for earlier in other.all_input_nodes if is_tensor(earlier))
    return None


def _of_activations(product: fx.Node) -> bool:
    """Whether both factors are computed and have batch axes, as weights have not."""
    factors = [argument for argument in product.all_input_nodes if is_tensor(argument)]
    return len(factors) >= 2 and all(factor.op != "placeholder" and example_value(factor).dim() >= 3 for factor in factors)


def _sums_over_tokens(product: fx.Node) -> bool:
    """Whether the result has no more elements than its factors: the long axis is summed over."""
    factors = [example_value(argument) for argument in product.all_input_nodes if is_tensor(argument)]
    sizes = [factor.numel() for factor in factors]
    result = example_value(product).numel()
    return all(isinstance(size, int) for size in (*sizes, result)) and result < min(sizes)
