"""AdaSpa: the key blocks of most mass for each query block, more of them in heads that need more (Xia et al., arXiv 2502.21079).

Where the paper says nothing: the kept blocks of a query block are rounded up, at least one; text is kept in addition to them; at most half
of the heads get less; of equal heads, and of equal blocks, the first comes first.

Example:
    >>> mass = adaspa.block_mass(query, key, block=128)
    >>> sparsity = adaspa.head_sparsity(adaspa.recall(mass, 0.8, mass.shape[-1]), 0.8)
    >>> blocks = adaspa.choose_blocks(mass, sparsity, mass.shape[-1])
"""

from lvsa_compile.policies.adaspa.choice import choose_blocks, head_sparsity, recall
from lvsa_compile.policies.adaspa.policy import AdaSpa
from lvsa_compile.policies.blocks import block_mass

__all__ = ["AdaSpa", "block_mass", "choose_blocks", "head_sparsity", "recall"]
