"""The record of an attention site, whatever form it had in the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from lvsa_compile.reasons import Miss


@dataclass(frozen=True)
class Replacement:
    """Which nodes of the graph a canonical form replaces (see ``canonical.py``): its ``result`` replaces ``replaces``.

    ``nodes`` are the canonical form's own, ``unneeded`` those that nobody needs once it has taken their place; both in graph order.
    """

    result: fx.Node
    replaces: fx.Node
    nodes: tuple[fx.Node, ...]
    unneeded: tuple[fx.Node, ...]


@dataclass(frozen=True)
class AttentionSite:
    """Attention ``softmax(query @ key.T * scale + mask) @ value`` at one node, all of ``[B, heads, tokens, head_dim]``.

    ``scale`` is a float, a graph node, or None for ``1 / sqrt(head_dim)``.  ``replacement`` is None where ``node`` is the graph's own.
    ``mask_parts`` are nodes whose conjunction is the mask as long as the first of each pair of ``mask_unwritten`` was not written to
    after the second (see ``masks.py``).
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None = None
    causal: bool = False
    dropout: Any = 0.0
    scale: Any = None
    replacement: Replacement | None = None
    mask_parts: tuple[fx.Node, ...] = ()
    mask_unwritten: tuple[tuple[fx.Node, fx.Node], ...] = ()


@dataclass(frozen=True)
class DenseSite:
    """Attention that was recognised and is left as it is."""

    node: fx.Node
    miss: Miss
