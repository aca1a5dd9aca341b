"""Checks of option values: what is wrong with a value and the remedy, or None."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lvsa_compile.policies.given import given_policy

Check = Callable[[Any], "tuple[str, str] | None"]
"""Returns what is wrong with a value and the remedy, or None."""


def whole(least: int, frames: bool = True) -> Check:
    """A whole number of at least ``least``; ``frames`` says that it counts latent frames."""

    def check(value: Any) -> tuple[str, str] | None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            return (
                f"not a whole number of at least {least}",
                f"{'All lengths are in latent frames; give' if frames else 'Give'} {least} or more.",
            )
        return None

    return check


def positive(value: Any) -> tuple[str, str] | None:
    """A positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        return "not a positive number", "Use 1.0 for the published budget."
    return None


def one_of(*choices: str) -> Check:
    """One of some choices."""

    def check(value: Any) -> tuple[str, str] | None:
        return None if value in choices else ("not a known choice", f"Choose one of: {', '.join(choices)}.")

    return check


def flag(value: Any) -> tuple[str, str] | None:
    """True or False."""
    return None if isinstance(value, bool) else ("not True or False", "Give True or False.")


def indices(value: Any) -> tuple[str, str] | None:
    """A list of whole numbers from 0."""
    if isinstance(value, (list, tuple)) and all(whole(0)(index) is None for index in value):
        return None
    return "not a list of whole numbers from 0", "Give the indices of video attention sites, such as [0, 1]."


def names(value: Any) -> tuple[str, str] | None:
    """A list of names."""
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        return None
    return "not a list of names", "Give names of passes, such as ['rewrite']."


def lowering(value: Any) -> tuple[str, str] | None:
    """The name of a lowering, or auto."""
    from lvsa_compile.selection.select import lowering_names

    return one_of("auto", *lowering_names())(value)


def inner(value: Any) -> tuple[str, str] | None:
    """The name of an inner compiler, or a Dynamo backend."""
    names = ("auto", "inductor", "torchair", "npugraph_ex", "aot_eager", "eager")
    if callable(value) or value in names:
        return None
    return "not a known choice", f"Choose one of: {', '.join(names)}; or give a Dynamo backend as a function."


def inductor_mode(value: Any) -> tuple[str, str] | None:
    """A mode of Inductor."""
    from lvsa_compile import compat

    return one_of("default", *compat.inductor_modes())(value)


def policy(option: str, *others: str) -> Check:
    """A policy, or one of some other words."""

    def check(value: Any) -> tuple[str, str] | None:
        if value not in others:
            given_policy(option, value)
        return None

    return check


def optional(check: Check) -> Check:
    """None, or what ``check`` takes."""
    return lambda value: None if value is None else check(value)
