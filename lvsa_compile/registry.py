"""What can be added from outside: policies and lowerings, found in this package's own folders and by entry points.

An entry point of the group ``lvsa_compile.lowerings`` names a ``Lowering``, one of ``lvsa_compile.policies`` a policy class.  One that
cannot be imported is left out, and ``lvsa doctor`` says so.

Example of a ``pyproject.toml``:
    [project.entry-points."lvsa_compile.policies"]
    block_diagonal = "my_package.block_diagonal:BlockDiagonal"
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvsa_compile.errors import in_a_line

log = logging.getLogger(__name__)
LOWERINGS, POLICIES = "lvsa_compile.lowerings", "lvsa_compile.policies"
"""The groups of entry points."""
_FOLDERS = {LOWERINGS: ("lvsa_compile.lowering", "LOWERING"), POLICIES: ("lvsa_compile.policies", "POLICY")}


@dataclass(frozen=True)
class Failed:
    """A registered thing that could not be imported: its name, where it is, and the error in a line."""

    name: str
    where: str
    error: str


@dataclass(frozen=True)
class Registered:
    """What is registered in a group, that of this package first; what could not be imported; the modules of other packages."""

    values: tuple[Any, ...]
    failed: tuple[Failed, ...]
    modules: tuple[str, ...]


_MEMBERS = {LOWERINGS: ("priority", "op", "refusal"), POLICIES: ("needs_horizon", "applies", "plan")}


def _check(group: str, value: Any) -> None:
    """Raises TypeError where something registered is no policy class or no lowering."""
    missing = [name for name in _MEMBERS[group] if not hasattr(value, name)]
    if not isinstance(getattr(value, "name", None), str):
        missing = ["name", *missing]
    if missing:
        raise TypeError(f"{value!r} has no {', no '.join(missing)}")
    if group == POLICIES and not (isinstance(value, type) and dataclasses.is_dataclass(value)):
        raise TypeError(f"{value!r} is no dataclass")


_here: dict[str, list[Any]] = {LOWERINGS: [], POLICIES: []}


def register_policy(kind: type) -> None:
    """Makes a policy class known by its name in this process, as an entry point does in all.

    Raises:
        ValueError: this package or an entry point has one of that name; one that was registered here is replaced.

    Example:
        >>> register_policy(BlockDiagonal)
        >>> torch.compile(model, backend="lvsa", options={"policy": "block_diagonal"})
    """
    _register(POLICIES, kind)


def register_lowering(lowering: Any) -> None:
    """Makes a ``Lowering`` serve in this process, as an entry point does in all.

    Raises:
        ValueError: this package or an entry point has one of that name; one that was registered here is replaced.
    """
    _register(LOWERINGS, lowering)


def _register(group: str, value: Any) -> None:
    _check(group, value)
    others = [each for each in _here[group] if each.name != value.name]
    if value.name in {each.name for each in registered(group).values if each not in _here[group]}:
        raise ValueError(f"{group} has a {value.name!r} already")
    _here[group][:] = [*others, value]
    registered.cache_clear()


@functools.cache
def registered(group: str) -> Registered:
    """What is registered in a group."""
    found: list[Any] = []
    failed: list[Failed] = []
    modules: list[str] = []
    folder, attribute = _FOLDERS[group]
    package = importlib.import_module(folder)
    for module in pkgutil.walk_packages(package.__path__, f"{folder}."):
        value = getattr(importlib.import_module(module.name), attribute, None)
        found += [] if value is None else [value]
    found += _here[group]
    modules += [getattr(value, "body", value).__module__ or "__main__" for value in _here[group]]
    names = {each.name for each in found}
    for point in sorted(importlib.metadata.entry_points(group=group), key=lambda point: point.name):
        try:
            value = point.load()
            _check(group, value)
            if value.name in names:
                raise ValueError(f"there is a {value.name!r} already")
        except (Exception, SystemExit) as error:  # somebody else's package: whatever is wrong with it, ours goes on
            log.warning("lvsa leaves %s %r out: %s", group, point.name, in_a_line(error))
            failed.append(Failed(point.name, point.value, in_a_line(error)))
        else:
            names.add(value.name)
            found.append(value)
            modules.append(point.module)
    return Registered(tuple(found), tuple(failed), tuple(modules))


def stamp_of_registered() -> str:
    """A digest of the modules of other packages that registered something; "" where none did."""
    modules = sorted({name for group in _FOLDERS for name in registered(group).modules})
    digest = hashlib.sha256()
    for name in modules:
        file = getattr(sys.modules.get(name), "__file__", None)
        digest.update(name.encode() + b"\0" + (Path(file).read_bytes() if file is not None else b""))
    return digest.hexdigest() if modules else ""
