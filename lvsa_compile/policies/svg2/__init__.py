"""SVG2: clusters of queries attend the clusters of keys that hold most of their weight (Sparse VideoGen2, arXiv 2505.18875).

Example:
    >>> labels, centroids = svg2.kmeans(key, svg2.first_centroids(key, 1000), iterations=50)
"""

from lvsa_compile.policies.svg2.clusters import choose_clusters, cluster_sizes, first_centroids, kmeans

__all__ = ["choose_clusters", "cluster_sizes", "first_centroids", "kmeans"]
