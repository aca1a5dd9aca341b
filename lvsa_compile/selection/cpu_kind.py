"""Which instructions the CPU kernel may use: those of this machine, or fewer where ``LVSA_CPU`` hides some."""

from __future__ import annotations

import functools
import os

from lvsa_compile import compat
from lvsa_compile.errors import CpuKindError

VARIABLE = "LVSA_CPU"
"""Environment variable that hides what a kind of CPU does not have; it never adds anything."""
KINDS = ("plain", "avx2", "avx512", "amx")
"""Each has what those before it have."""
_FLAGS = {"plain": ("-march=x86-64",), "avx2": ("-march=haswell",), "avx512": ("-mno-amx-tile",), "amx": ()}


@functools.cache
def of_machine() -> str:
    """The kind of this machine's CPU; one that is not x86 is plain, its own vectors included."""
    return KINDS[sum(1 for feature in compat.cpu_features() if feature)]


def cpu_kind() -> str:
    """The kind that is played: that of the machine, or the one that ``LVSA_CPU`` names if that has less.

    Raises:
        CpuKindError: the variable names no kind.
    """
    wanted = os.environ.get(VARIABLE) or KINDS[-1]
    if wanted not in KINDS:
        raise CpuKindError(VARIABLE, wanted, KINDS)
    return min(wanted, of_machine(), key=KINDS.index)


def compiler_flags(kind: str) -> tuple[str, ...]:
    """What makes a compiler leave out what ``kind`` does not have; nothing where that is the machine's own."""
    return () if kind == of_machine() else _FLAGS[kind]
