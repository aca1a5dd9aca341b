"""The training horizon of the model being compiled."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from lvsa_compile.forward import context
from lvsa_compile.horizons import Unreadable, horizon_of, rows_of, rows_of_class
from lvsa_compile.passes.compilation import Compilation
from lvsa_compile.passes.model_settings import reader
from lvsa_compile.policies.contract import Horizon


def find_horizon(compilation: Compilation) -> Compilation:
    """Fills in ``model`` and ``horizon``: from the option, else from the table by the outermost known module around a site.

    Where neither says it, ``horizon_missing`` says why.
    """
    around = _around(compilation)
    kind, module, rows = next(((kind, module, rows) for kind, module in around if (rows := rows_of_class(kind))), (None, None, ()))
    root = context.root_module()
    kind = kind or (type(root) if root is not None else next((kind for kind, _ in around), None))
    compilation = dataclasses.replace(compilation, model=kind.__name__ if kind is not None else "")
    given, unreadable = compilation.options.reference_frames, ""
    try:
        row = horizon_of(rows, reader(module))
    except Unreadable as setting:
        row, unreadable = None, str(setting)
    if given is not None:
        return dataclasses.replace(compilation, horizon=Horizon(given, "option reference_frames", None if row is None else row.frames))
    if unreadable:
        why = (
            f"the horizon of {rows[0].class_name} depends on {unreadable}, which its config and attributes do not tell, or tell in two ways"
        )
        return dataclasses.replace(compilation, horizon_missing=why)
    if row is not None:
        return dataclasses.replace(compilation, horizon=Horizon(row.frames, f"table: {row.class_name}, {row.seed}"))
    missing = "is not in the table of training horizons"
    wholes = [] if compilation.has_video or compilation.timestep is not None else _wholes([kind for kind, _ in around])
    if wholes:
        missing = f"is a part of {' or '.join(wholes)}, and only the whole model tells its horizon"
    return dataclasses.replace(compilation, horizon_missing=f"{compilation.model or 'this model'} {missing}")


def _around(compilation: Compilation) -> list[tuple[type, Any]]:
    """Classes and modules around the sites, outermost first; then the model among a function's arguments that these are parts of."""
    found = [each for site in compilation.sites for each in context.modules_around(site.node)]
    kinds, modules = {kind for kind, _ in found}, {id(module) for _, module in found if module is not None}

    def has_the_sites(model: Any) -> bool:
        parts = list(model.modules())
        return any(id(part) in modules for part in parts) if modules else not kinds or any(type(part) in kinds for part in parts)

    holding = [model for model in context.modules_among_arguments() if rows_of_class(type(model)) and has_the_sites(model)]
    if len({id(model) for model in holding}) == 1:  # of several nobody can tell whose pieces these are
        found.append((type(holding[0]), holding[0]))
    return list({(kind, id(module)): (kind, module) for kind, module in found}.values())


def _wholes(parts: Sequence[type]) -> list[str]:
    """Known model classes of which one of ``parts`` is a part: those of the file its class is from, else of the files beside it."""
    bases = [base for part in parts for base in part.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]
    for name in dict.fromkeys(base.__module__ for base in bases):
        folder = name.rpartition(".")[0]
        beside = [other for other in list(sys.modules) if folder and other.rpartition(".")[0] == folder]
        for files in ([name], beside):
            classes = [value for file in files for value in vars(sys.modules.get(file, object)).values() if isinstance(value, type)]
            wholes = sorted({each.__name__ for each in classes if rows_of(each.__name__) and each.__module__ in files})
            if wholes:
                return wholes
    return []
