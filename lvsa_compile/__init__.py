"""Long Video Sparse Attention as a torch.compile backend: ``torch.compile(model, backend="lvsa")``.

Nothing is imported until it is used: torch imports this package while it starts, when ``TORCH_LOGS="+lvsa_compile"`` is set.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvsa_compile.enabling import enable
    from lvsa_compile.errors import LvsaError, LvsaWarning, OptionError
    from lvsa_compile.explaining import explain
    from lvsa_compile.forward.clock import reset
    from lvsa_compile.forward.explicit_step import step
    from lvsa_compile.functional import sparse_attention
    from lvsa_compile.options import make_options, set_default_options
    from lvsa_compile.policies.adaspa.policy import AdaSpa
    from lvsa_compile.policies.haste.policy import Haste
    from lvsa_compile.policies.losa.policy import LoSA
    from lvsa_compile.policies.lvsa.frame_pattern import FramePattern
    from lvsa_compile.policies.lvsa.policy import LVSA
    from lvsa_compile.policies.radial.policy import Radial
    from lvsa_compile.policies.xattention.policy import XAttention
    from lvsa_compile.regional import compile_repeated_blocks, undo
    from lvsa_compile.report.report import Report
    from lvsa_compile.report.store import reports

__version__ = "0.1.0"

_HOMES = {
    "AdaSpa": "policies.adaspa.policy",
    "FramePattern": "policies.lvsa.frame_pattern",
    "Haste": "policies.haste.policy",
    "LVSA": "policies.lvsa.policy",
    "LoSA": "policies.losa.policy",
    "LvsaError": "errors",
    "LvsaWarning": "errors",
    "OptionError": "errors",
    "Radial": "policies.radial.policy",
    "Report": "report.report",
    "XAttention": "policies.xattention.policy",
    "compile_repeated_blocks": "regional",
    "enable": "enabling",
    "explain": "explaining",
    "make_options": "options",
    "reports": "report.store",
    "reset": "forward.clock",
    "set_default_options": "options",
    "sparse_attention": "functional",
    "step": "forward.explicit_step",
    "undo": "regional",
}

__all__ = [
    "LVSA",
    "AdaSpa",
    "FramePattern",
    "Haste",
    "LoSA",
    "LvsaError",
    "LvsaWarning",
    "OptionError",
    "Radial",
    "Report",
    "XAttention",
    "compile_repeated_blocks",
    "enable",
    "explain",
    "make_options",
    "reports",
    "reset",
    "set_default_options",
    "sparse_attention",
    "step",
    "undo",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
