"""Chooses the lowering of a site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lvsa_compile.errors import LoweringUnavailableError
from lvsa_compile.registry import LOWERINGS, registered
from lvsa_compile.selection.contract import AttentionCall, Failure, Lowering
from lvsa_compile.selection.measure import seconds_of
from lvsa_compile.selection.smoke_test import smoke_tested


@dataclass(frozen=True)
class Choice:
    """The lowering chosen for a site, why others could not serve it, and the seconds a call took where they were measured.

    ``faster`` are those of the others that are expected to be faster.
    """

    lowering: Lowering
    passed_over: tuple[tuple[str, str], ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    faster: tuple[tuple[str, str], ...] = ()

    @property
    def fell_back(self) -> bool:
        """Whether a faster one failed on this machine."""
        return any(isinstance(why, Failure) for _, why in self.faster)


def lowerings() -> tuple[Lowering, ...]:
    """All lowerings, in the order in which they are listed."""
    return tuple(sorted(registered(LOWERINGS).values, key=lambda lowering: lowering.priority))


def lowering_names() -> tuple[str, ...]:
    """Names that the option ``lowering`` takes beside "auto"."""
    return tuple(lowering.name for lowering in lowerings())


def select(call: AttentionCall, wanted: str = "auto", measure: bool = False) -> Choice:
    """The lowering asked for by name, or of those that can serve ``call`` the one expected to be fastest; found so if ``measure``.

    Raises:
        LoweringUnavailableError: the lowering asked for refuses the call; names the reason.
    """
    passed_over: list[tuple[str, str]] = []
    serving: list[Lowering] = []
    for lowering in lowerings():
        if wanted not in ("auto", lowering.name) or (wanted == "auto" and lowering.op != call.plan.op):
            continue
        refusal = lowering.refusal(call)
        if refusal is None:
            serving.append(lowering)
        else:
            passed_over.append((lowering.name, refusal))
    serving.sort(key=lambda lowering: -lowering.expected(call))
    seconds: dict[str, float] = {}
    for lowering in serving if measure else ():
        if lowering.expected(call) > 0.0 and smoke_tested(lowering, call) is None:
            found = seconds_of(lowering, call)
            if isinstance(found, str):
                passed_over.append((lowering.name, found))  # though it may serve: tensors of this size found no room beside the model
            else:
                seconds[lowering.name] = found
    serving.sort(key=lambda lowering: seconds.get(lowering.name, math.inf))  # those not measured stay in the order of their estimates
    for lowering in serving:
        problem = smoke_tested(lowering, call)
        if problem is None:
            estimates = {other.name: other.expected(call) for other in lowerings()}
            faster = tuple(found for found in passed_over if estimates[found[0]] > estimates[lowering.name])
            return Choice(lowering, tuple(passed_over), seconds, faster)
        passed_over.append((lowering.name, problem))
    raise LoweringUnavailableError(wanted, "; ".join(f"{name}: {why}" for name, why in passed_over) or _no_such(wanted, call))


def _no_such(wanted: str, call: AttentionCall) -> str:
    if wanted != "auto":
        return "there is no such lowering"
    return f"no registered lowering computes op {call.plan.op!r} of policy {call.plan.policy.name!r}"
