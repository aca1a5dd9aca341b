"""XAttention: blocks that hold most of the mass, as sums along antidiagonals estimate it (arXiv 2503.16428).

Example:
    >>> blocks = xattention.choose_blocks(query, key, block=128, stride=8, threshold=0.9)
"""

from lvsa_compile.policies.xattention.choice import choose_blocks, estimated_mass
from lvsa_compile.policies.xattention.policy import XAttention

__all__ = ["XAttention", "choose_blocks", "estimated_mass"]
