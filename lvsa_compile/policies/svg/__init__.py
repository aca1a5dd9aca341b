"""SVG: heads that attend near frames and heads that attend the same place of all frames (Sparse VideoGen, arXiv 2502.01776).

Example:
    >>> half_width = svg.width(21, 1560, density=0.3)
"""

from lvsa_compile.policies.svg.heads import choose, profile_mask, runtime_mask, width

__all__ = ["choose", "profile_mask", "runtime_mask", "width"]
