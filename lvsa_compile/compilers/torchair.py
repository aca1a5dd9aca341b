"""torch_npu's graph compilers as inner compilers: GE graphs by torchair, and ACL graphs by npugraph_ex."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from lvsa_compile import compat
from lvsa_compile.errors import OptionError

_ENTRY_POINTS = {"torchair": "npu", "npugraph_ex": "npugraph_ex"}
_MODES = {"torchair": "max-autotune", "npugraph_ex": "npugraph_ex"}
NAMES = tuple(_ENTRY_POINTS)
"""Values of the option ``inner`` that are served here."""


def npu_backend(name: str) -> Callable[..., Any]:
    """The Dynamo backend behind ``inner=name``, as torch_npu registers it, else made of ``torch_npu.dynamo.torchair`` (torch_npu 2.11).

    A configuration of one's own is given as a backend: ``options={"inner": torchair.get_npu_backend(compiler_config=config)}``.

    Raises:
        OptionError: torch_npu cannot be imported.
    """
    try:
        importlib.import_module("torch_npu")
    except (ImportError, RuntimeError) as error:
        remedy = "pip install 'lvsa-compile[ascend]' where CANN is installed, or choose another inner."
        raise OptionError("inner", name, f"torch_npu cannot be imported ({error})", remedy) from None
    try:
        return compat.lookup_backend(_ENTRY_POINTS[name])
    except RuntimeError:  # of torch_npu 2.11 the graph compilers are no entry points
        torchair = importlib.import_module("torch_npu.dynamo.torchair")
        config = torchair.CompilerConfig()
        config.mode = _MODES[name]
        backend: Callable[..., Any] = torchair.get_npu_backend(compiler_config=config)
        return backend
