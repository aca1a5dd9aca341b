"""A policy as users give it: a name, a policy, or a name with fields as JSON has them."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from lvsa_compile.errors import OptionError
from lvsa_compile.policies.contract import Policy
from lvsa_compile.registry import POLICIES, registered


def policy_names() -> tuple[str, ...]:
    """The names of all policies."""
    return tuple(kind.name for kind in registered(POLICIES).values)


def given_policy(option: str, value: Any) -> Policy:
    """The policy that ``value`` of an option stands for.

    Args:
        option: the option's name, for errors.
        value: a name (its defaults), a policy, or a dict with ``name`` and fields, such as ``{"name": "lvsa", "window": 2}``.

    Raises:
        OptionError: there is no such policy, or it has no such field, or a field cannot have the value.
    """
    if isinstance(value, Policy) and not isinstance(value, type):
        try:
            hash(value)
        except TypeError as error:
            raise OptionError(
                option, value, f"a policy that cannot be hashed ({error})", "Give it fields that can be, as tuples."
            ) from None
        return value
    fields = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    kinds = {kind.name: kind for kind in registered(POLICIES).values}
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in kinds:
        raise OptionError(option, value, *_problem(value, name, list(kinds)))
    known = {field.name: field for field in dataclasses.fields(kinds[name])}
    for field in fields:
        if field not in known:
            raise OptionError(option, value, f"policy {name!r} has no field {field!r}", f"Its fields are: {', '.join(known)}.")
    try:
        policy: Policy = kinds[name](**{field: tuple(v) if isinstance(v, list) else v for field, v in fields.items()})
    except TypeError as error:
        raise OptionError(option, value, str(error), f"Its fields are: {', '.join(known)}.") from None
    return policy


def _problem(value: Any, name: Any, names: list[str]) -> tuple[str, str]:
    """Why a value stands for no policy, and the remedy."""
    failed = next((each for each in registered(POLICIES).failed if each.name == name), None)
    if failed is not None:
        return f"{failed.where} cannot be imported ({failed.error})", "Mend that, or give another policy."
    if isinstance(value, type) and hasattr(value, "applies"):
        return "this is a class", f"Give a policy, such as {value.__name__}()."
    missing = [each for each in ("name", "needs_horizon", "applies", "plan", "__hash__") if getattr(value, each, None) is None]
    if 0 < len(missing) < 4 and not isinstance(value, (str, Mapping)):
        frozen = " Make it a dataclass(frozen=True)." if "__hash__" in missing else ""
        return f"a policy without {', '.join(missing)}", f"Give it what a policy has.{frozen}"
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    remedy = f"Did you mean {nearest[0]!r}?" if nearest else f"Give one of {', '.join(map(repr, names))}, or a policy object."
    return "no policy has this name" if isinstance(name, str) else "no policy", remedy


def policy_as_dict(policy: Policy) -> dict[str, Any]:
    """A policy as reports have it: its name and the fields that are not at their defaults, as JSON has them or as text."""
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(policy) if dataclasses.is_dataclass(policy) else ()
    values = {f.name: (getattr(policy, f.name), f.default) for f in fields if f.compare}
    return {"name": policy.name, **{name: _plain(value) for name, (value, default) in values.items() if repr(value) != repr(default)}}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Policy):
        return policy_as_dict(value)
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
