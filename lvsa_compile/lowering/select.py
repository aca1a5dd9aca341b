"""Chooses the lowering of a site.  A lowering is any module of this folder that has a ``LOWERING``."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass

from lvsa_compile.errors import LoweringUnavailableError
from lvsa_compile.lowering.contract import AttentionCall, Lowering


@dataclass(frozen=True)
class Choice:
    """The lowering chosen for a site, and why the better ones were passed over."""

    lowering: Lowering
    passed_over: tuple[tuple[str, str], ...]


@functools.cache
def lowerings() -> tuple[Lowering, ...]:
    """All lowerings, best first."""
    import lvsa_compile.lowering as folder

    modules = [importlib.import_module(f"{folder.__name__}.{found.name}") for found in pkgutil.iter_modules(folder.__path__)]
    return tuple(sorted((m.LOWERING for m in modules if hasattr(m, "LOWERING")), key=lambda lowering: lowering.priority))


def lowering_names() -> tuple[str, ...]:
    """Names that the option ``lowering`` takes beside "auto"."""
    return tuple(lowering.name for lowering in lowerings())


def select(call: AttentionCall, wanted: str = "auto") -> Choice:
    """The best lowering that can serve ``call``, or the one asked for by name.

    Raises:
        LoweringUnavailableError: the lowering asked for refuses the call; names the reason.
    """
    passed_over: list[tuple[str, str]] = []
    for lowering in lowerings():
        if wanted not in ("auto", lowering.name):
            continue
        refusal = lowering.refusal(call)
        if refusal is None:
            return Choice(lowering, tuple(passed_over))
        passed_over.append((lowering.name, refusal))
    raise LoweringUnavailableError(wanted, "; ".join(f"{name}: {why}" for name, why in passed_over) or "there is no such lowering")
