"""``scaled_dot_product_attention`` where torch runs it as its formula: in eager code only the ops of the formula are seen."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

_BRINGS_INTO_SHAPE = frozenset(("expand", "view", "_unsafe_view", "reshape", "clone"))


class Formula:
    """Follows ``softmax(query @ key + mask) @ value`` op by op; only ``scaled_dot_product_attention`` runs ``_safe_softmax``.

    The scores are computed by the time the second product shows what they are for, so that nothing is saved there.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._query: Tensor | None = None
        self._key: Tensor | None = None
        self._mask: Tensor | None = None
        self._scores: Tensor | None = None
        self._weights: Tensor | None = None
        self._leading: tuple[int, ...] = ()

    @property
    def begun(self) -> bool:
        """Whether what ran last may be the beginning of the formula."""
        return self._query is not None

    def note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Notes an op that ran: a product begins, and each further op goes on or ends it."""
        first = args[0] if args else None
        if name == "bmm":
            self._forget()
            self._query, self._key, self._scores = args[0], args[1], result
        elif self._weights is not None:
            if first is self._weights and name in _BRINGS_INTO_SHAPE:
                self._weights = result
            elif name not in _BRINGS_INTO_SHAPE:
                self._forget()
        elif first is self._scores and name == "_unsafe_view":
            self._scores = result
        elif first is self._scores and name in ("add", "add_") and self._mask is None and isinstance(args[1], Tensor):
            self._mask, self._scores = args[1], result
        elif first is self._scores and name == "_safe_softmax":
            self._weights, self._scores, self._leading = result, None, tuple(result.shape[:-2])
        else:
            self._forget()

    def ends_with(self, weights: Any) -> bool:
        """Whether a product with ``weights`` is the second one of the formula."""
        return weights is not None and weights is self._weights

    def call(self, value: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """The arguments of ``scaled_dot_product_attention`` for the product with ``value`` ``[batch * heads, keys, value_dim]``."""
        query, key, mask, leading = self._query, self._key, self._mask, self._leading
        self._forget()  # the ops below are not part of the formula
        assert query is not None
        assert key is not None
        heads = leading[-1] if len(leading) > 1 else 1
        shape = (math.prod(leading) // heads, heads)
        tensors = tuple(each.view(*shape, *each.shape[1:]) for each in (query, key.transpose(1, 2), value))
        return (tensors[0], tensors[1], tensors[2]), {"attn_mask": mask, "scale": 1.0}
