"""SVG2's clusters of tokens, and which of them attend which, in plain PyTorch (arXiv 2505.18875)."""

from __future__ import annotations

import torch
from torch import Tensor

from lvsa_compile.errors import OptionError, ShapeError
from lvsa_compile.policies.blocks import in_falling_order


def first_centroids(tokens: Tensor, count: int) -> Tensor:
    """Tokens ``floor(j * N / count)`` of ``[B, H, N, head_dim]`` as the first centroids: no random number is drawn."""
    number = torch.arange(count, device=tokens.device) * tokens.shape[2] // count
    return tokens.index_select(2, number)


def kmeans(tokens: Tensor, centroids: Tensor, iterations: int, tolerance: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Clusters of tokens by squared Euclidean distance, each head and sample by itself.

    An iteration assigns each token to the nearest centroid, of equally near ones the first, and moves each centroid to the mean of its
    tokens; one without tokens stays.  Where no centroid of any head of a sample moves by ``tolerance``, that sample keeps its centroids.

    Args:
        tokens: ``[B, H, N, head_dim]``.
        centroids: where they begin, ``[B, H, C, head_dim]``.
        iterations: how many at most, 1 or more.
        tolerance: the distance of a move that still counts as none.

    Returns:
        The clusters that the last iteration assigned, int64 ``[B, H, N]``, and centroids, float64 of float64, else float32: those that
        iteration moved to.

    Raises:
        ShapeError: the shapes do not fit.
        OptionError: there is no iteration.

    Example:
        >>> labels, centroids = svg2.kmeans(key, svg2.first_centroids(key, 1000), iterations=50)
    """
    if tokens.dim() != 4 or centroids.dim() != 4 or tokens.shape[:2] != centroids.shape[:2] or tokens.shape[3] != centroids.shape[3]:
        remedy = "Give [B, H, clusters, head_dim]."
        raise ShapeError("centroids", tuple(centroids.shape), f"it does not fit tokens {tuple(tokens.shape)}", remedy)
    if iterations < 1:
        raise OptionError("iterations", iterations, "clusters take at least one", "Give 1 or more; the paper has 50 at first, then 2.")
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    tokens, centroids = tokens.to(dtype), centroids.to(dtype)
    done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    labels = torch.zeros(tokens.shape[:3], dtype=torch.int64, device=tokens.device)
    for _ in range(iterations):
        nearest = _nearest(tokens, centroids)
        sizes = cluster_sizes(nearest, centroids.shape[2])
        sums = torch.zeros_like(centroids).scatter_add_(2, nearest[..., None].expand_as(tokens), tokens)
        moved = torch.where(sizes[..., None] > 0, sums / sizes[..., None].clamp(min=1), centroids)
        still = (moved - centroids).norm(dim=-1).amax((1, 2)) < tolerance
        labels = torch.where(done[:, None, None], labels, nearest)
        centroids = torch.where((done | still)[:, None, None, None], centroids, moved)
        done = done | still
    return labels, centroids


def cluster_sizes(labels: Tensor, clusters: int) -> Tensor:
    """How many tokens each cluster has, int64 ``[B, H, clusters]``, by labels ``[B, H, N]``."""
    return labels.new_zeros(*labels.shape[:2], clusters).scatter_add_(2, labels, torch.ones_like(labels))


def choose_clusters(
    query_centroids: Tensor, key_centroids: Tensor, key_sizes: Tensor, *, top_p: float, min_ratio: float, scale: float | None = None
) -> Tensor:
    """Which key clusters each query cluster attends: those of most weight that together reach ``top_p``.

    A key cluster weighs as all its tokens at its centroid: ``size * exp(query centroid · key centroid * scale)``, normalised over those
    that hold a token.  In falling order an entry is kept where those before it hold at most ``top_p``, and the first
    ``int(min_ratio * clusters)`` in any case.

    Args:
        query_centroids: ``[B, H, QC, head_dim]``.
        key_centroids: ``[B, H, KC, head_dim]``.
        key_sizes: tokens of each key cluster, ``[B, H, KC]``.
        top_p: share of the weight, from 0 to 1.
        min_ratio: share of the key clusters that are kept at least, from 0 to 1.
        scale: of the scores, ``head_dim ** -0.5`` if None.

    Returns:
        bool ``[B, H, QC, KC]``, at least one in each row.

    Raises:
        OptionError: ``top_p`` or ``min_ratio`` is no share.

    Example:
        >>> kept = svg2.choose_clusters(of_query, of_key, svg2.cluster_sizes(labels, 1000), top_p=0.9, min_ratio=0.1)
    """
    for name, value in (("top_p", top_p), ("min_ratio", min_ratio)):
        if not 0.0 <= value <= 1.0:
            raise OptionError(name, value, "it is a share", "Give a number from 0 to 1.")
    scale = query_centroids.shape[-1] ** -0.5 if scale is None else scale
    held = (key_sizes > 0)[:, :, None]
    scores = (query_centroids @ key_centroids.mT * scale).masked_fill(~held, float("-inf"))
    weight = (scores - scores.amax(-1, keepdim=True)).exp() * key_sizes[:, :, None]
    ordered, place = in_falling_order((weight / weight.sum(-1, keepdim=True)).double())
    before = ordered.cumsum(-1) - ordered
    needed = (before <= top_p).sum(-1, keepdim=True).clamp(min=max(1, int(min_ratio * key_sizes.shape[-1])))
    kept: Tensor = place < torch.where(torch.tensor(top_p >= 1.0, device=needed.device), key_sizes.shape[-1], needed)
    return kept


def _nearest(tokens: Tensor, centroids: Tensor) -> Tensor:
    """The first of the nearest centroids of each token."""
    distance = centroids.square().sum(-1)[:, :, None] - 2 * tokens @ centroids.mT
    number = torch.arange(centroids.shape[2], device=tokens.device)
    return torch.where(distance == distance.amin(-1, keepdim=True), number, centroids.shape[2]).amin(-1)
