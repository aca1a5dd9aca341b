"""Canonical forms: nodes beside an attention that compute the same thing by ``scaled_dot_product_attention``.

Nothing uses a canonical form until its site is rewritten.  So any form of attention becomes a site without being touched, and a site that
stays dense stays exactly what the user wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from lvsa_compile.compat import example_value
from lvsa_compile.graph.edit import called, provenance
from lvsa_compile.patterns.site import AttentionSite, Replacement


class CanonicalForm:
    """Adds nodes before ``beside``, each with the fake value it would have.

    ``undo`` takes them out again, for a form that turns out not to fit.
    """

    def __init__(self, beside: fx.Node) -> None:
        self.graph, self._beside = beside.graph, beside
        self.nodes: list[fx.Node] = []

    def call(self, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that calls ``function``, or the method of that name of its first argument."""
        with self.graph.inserting_before(self._beside):
            node = called(self.graph, function, *args, **kwargs)
        node.meta |= provenance(self._beside)
        self.nodes.append(node)
        return node

    def attention(
        self, query: fx.Node, key: fx.Node, value: fx.Node, *, mask: fx.Node | None = None, scale: Any = None, causal: bool = False
    ) -> fx.Node:
        """The attention node itself, in the widest dtype of its inputs."""
        dtypes = [example_value(node).dtype for node in (query, key, value)]
        widest = max(dtypes, key=lambda dtype: dtype.itemsize)
        query, key, value = (
            node if dtype == widest else self.call("to", node, widest) for node, dtype in zip((query, key, value), dtypes, strict=True)
        )
        if mask is not None and example_value(mask).dtype not in (torch.bool, widest):
            mask = self.call("to", mask, widest)
        arguments: dict[str, Any] = {"attn_mask": mask, "scale": scale, "is_causal": causal}
        if example_value(query).shape[1] != example_value(key).shape[1]:
            arguments["enable_gqa"] = True
        return self.call(torch.nn.functional.scaled_dot_product_attention, query, key, value, **arguments)

    def site(self, node: fx.Node, result: fx.Node, replaces: fx.Node, unneeded: tuple[fx.Node, ...]) -> AttentionSite:
        """The finished site: ``node`` is what ``attention`` returned, ``result`` what stands for ``replaces``."""
        query, key, value = node.args
        return AttentionSite(
            node,
            query,  # type: ignore[arg-type]
            key,  # type: ignore[arg-type]
            value,  # type: ignore[arg-type]
            mask=node.kwargs["attn_mask"],  # type: ignore[arg-type]
            causal=bool(node.kwargs["is_causal"]),
            scale=node.kwargs["scale"],
            replacement=Replacement(result, replaces, tuple(self.nodes), unneeded),
        )

    def undo(self) -> None:
        """Takes all nodes out again."""
        for node in reversed(self.nodes):
            self.graph.erase_node(node)
        self.nodes.clear()


def discard(site: AttentionSite) -> None:
    """Takes a site's canonical form out of the graph."""
    if site.replacement is not None:
        for node in reversed(site.replacement.nodes):
            node.graph.erase_node(node)


def substitute(site: AttentionSite, rewritten: fx.Node) -> None:
    """Puts a site's canonical form, its attention now ``rewritten``, in place of what it replaces; removes what nobody needs any more."""
    if site.replacement is not None:
        result = site.replacement.result
        site.replacement.replaces.replace_all_uses_with(rewritten if result is site.node else result)
        for node in reversed(site.replacement.unneeded):
            if not node.users:
                node.graph.erase_node(node)


def is_tensor(node: Any) -> TypeGuard[fx.Node]:
    """Whether a node's value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(example_value(node), Tensor)
