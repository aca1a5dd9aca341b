"""LoSA: for each query block the fewest key blocks that hold nearly all of its mass, found once (arXiv 2608.12032).

Example:
    >>> mass = losa.block_mass(query, key, block=128, key_block=32)
    >>> blocks = losa.choose_blocks(mass, torch.full((mass.shape[2],), 128), 0.99)
"""

from lvsa_compile.policies.blocks import block_mass
from lvsa_compile.policies.losa.choice import choose_blocks
from lvsa_compile.policies.losa.policy import LoSA

__all__ = ["LoSA", "block_mass", "choose_blocks"]
