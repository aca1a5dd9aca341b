"""Pass 3: the training horizon of the model being compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvsa_compile import compat
from lvsa_compile.horizons import horizon_of
from lvsa_compile.passes.compilation import Compilation, Horizon


def find_horizon(compilation: Compilation) -> Compilation:
    """Fills in ``model`` and ``horizon``: from the option, else from the table by the outermost known module around a site."""
    modules = [module for site in compilation.sites[:1] for module in compat.modules_around(site.node)]
    root = compat.root_module()
    model = type(root).__name__ if root is not None else modules[0][0] if modules else ""
    rows = ((name, horizon_of(name, _config(module))) for name, module in modules)
    name, row = next(((name, row) for name, row in rows if row is not None), ("", None))
    model = name or model
    if compilation.options.reference_frames is not None:
        horizon = Horizon(compilation.options.reference_frames, "option reference_frames")
    elif row is not None:
        horizon = Horizon(row.frames, f"table: {row.class_name}, {row.seed}")
    else:
        horizon = None
    return dataclasses.replace(compilation, model=model, horizon=horizon)


def _config(module: Any) -> Mapping[str, Any] | None:
    """The config of a module as a mapping, whatever kind of object it is."""
    config = getattr(module, "config", None)
    return config if config is None or isinstance(config, Mapping) else dict(getattr(config, "__dict__", {}))
