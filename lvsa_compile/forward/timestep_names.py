"""Names under which models get the timestep."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NAMES = tuple(
    re.compile(pattern) for pattern in (r"timesteps?", r"t|time|times|ts", r"\w*timesteps?\w*", r"sigmas?|noise_levels?", r"\w*sigma\w*")
)
"""Names that say "timestep", the surest first."""


def says_timestep(name: str) -> bool:
    """Whether a name can mean nothing else, as ``t`` and ``sigma`` can."""
    return "timestep" in name.lower()


def timestep_among(names: Sequence[str]) -> int | None:
    """Which of the names of a model's inputs says most surely that it is the timestep; None where none does."""
    ranked = [(rank_of_name(name), position) for position, name in enumerate(names)]
    known = [(rank, position) for rank, position in ranked if rank is not None]
    return min(known)[1] if known else None


def rank_of_name(name: str) -> int | None:
    """How surely a name says that an input is the timestep, 0 the surest; None where it does not."""
    short = name.split("[")[0].lower()
    return next((rank for rank, pattern in enumerate(_NAMES) if pattern.fullmatch(short)), None)
