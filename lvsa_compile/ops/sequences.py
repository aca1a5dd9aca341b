"""Sequences laid one after the other, told by where each ends: in numbers a sequence for every token, and in a mask.

``lvsa::same_sequence`` is what attention over such sequences is masked by.  It stands in a canonical form and is not run: at a rewritten
site ``lvsa::sequence_of_tokens`` tells the same by one number per token, and makes sure that the sequences are as the rewrite takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.errors import SequencesError
from lvsa_compile.ops.attention import library


def numbers_of(ends: Tensor, samples: int, tokens: int) -> Tensor:
    """The number of the sequence that each token is of: int64 ``[samples, tokens]``.

    ``ends`` ``[sequences + 1]`` says where each sequence of the ``samples * tokens`` tokens ends, from 0 on.

    Example:
        >>> numbers_of(torch.tensor([0, 2, 3, 6, 6]), samples=2, tokens=3)
        tensor([[1, 1, 2],
                [3, 3, 3]])
    """
    positions = torch.arange(samples * tokens, dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends.contiguous(), positions, right=True).view(samples, tokens)


def holds_videos(numbers: Tensor, first: int, stop: int) -> Tensor:
    """Whether one sequence holds tokens ``first`` to ``stop`` of each sample, and none holds tokens of two: a bool scalar tensor."""
    whole = (numbers[:, first] == numbers[:, stop - 1]).all()
    return whole & (numbers[1:, 0] != numbers[:-1, -1]).all()


def _same_sequence(ends: Tensor, samples: int, tokens: int) -> Tensor:
    numbers = numbers_of(ends, samples, tokens)
    return (numbers[:, :, None] == numbers[:, None, :])[:, None]


def _sequence_of_tokens(ends: Tensor, samples: int, tokens: int, first: int, stop: int, site: str) -> Tensor:
    numbers = numbers_of(ends, samples, tokens)
    fit, error = holds_videos(numbers, first, stop), SequencesError(site)
    if fit.device.type != "cpu":
        compat.assert_on_device(fit, str(error))
    elif not fit:
        raise error
    return numbers


library.define("same_sequence(Tensor ends, SymInt samples, SymInt tokens) -> Tensor", tags=compat.OPAQUE_OP_TAGS)
library.impl("same_sequence", _same_sequence, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lvsa::same_sequence", lambda ends, samples, tokens: ends.new_empty((samples, 1, tokens, tokens), dtype=torch.bool), lib=library
)
SAME_SEQUENCE: compat.OpOverload = torch.ops.lvsa.same_sequence.default

library.define(
    "sequence_of_tokens(Tensor ends, SymInt samples, SymInt tokens, int first, int stop, str site) -> Tensor", tags=compat.OPAQUE_OP_TAGS
)
library.impl("sequence_of_tokens", _sequence_of_tokens, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lvsa::sequence_of_tokens",
    lambda ends, samples, tokens, first, stop, site: ends.new_empty((samples, tokens), dtype=torch.int64),
    lib=library,
)
SEQUENCE_OF_TOKENS: compat.OpOverload = torch.ops.lvsa.sequence_of_tokens.default
