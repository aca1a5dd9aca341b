"""What becomes of a compile in which this package itself fails: the graph stays as it came, and says so."""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path

from lvsa_compile import compat
from lvsa_compile.errors import LvsaError, RewriteError, in_a_line
from lvsa_compile.forward import context
from lvsa_compile.options import Options
from lvsa_compile.passes.compilation import Compilation, Decision
from lvsa_compile.patterns import sdpa
from lvsa_compile.reasons import INTERNAL_ERROR

_PACKAGE = Path(__file__).parent.parent


def is_internal(error: Exception, options: Options) -> bool:
    """Whether an error is a defect of this package that the user did not ask to see: no mistake of theirs, no message to Dynamo."""
    meant = isinstance(error, LvsaError) and not isinstance(error, RewriteError)
    return not (options.strict or meant or compat.is_dynamos(error))


def where(error: Exception) -> str:
    """The error in a line, with the innermost line of this package that it came through."""
    cause = error.__cause__ or error
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if Path(frame.filename).is_relative_to(_PACKAGE)]
    line = f", lvsa_compile/{Path(frames[-1].filename).relative_to(_PACKAGE).as_posix()}:{frames[-1].lineno}" if frames else ""
    return f"{in_a_line(error)}{line}"


def left_as_it_came(beginning: Compilation, error: Exception) -> Compilation:
    """A compile of which nothing is known but where attention is, each site dense with the error."""
    miss = INTERNAL_ERROR.because(where(error))
    nodes = list(beginning.graph_module.graph.nodes)
    attention = [node for node in nodes if node.op == "call_function" and node.target in sdpa.TARGETS]
    decisions = [Decision(context.module_path(node) or node.name, node, miss=miss) for node in attention]
    return dataclasses.replace(beginning, decisions=tuple(decisions) or (Decision("the graph", nodes[-1], miss=miss),))
