"""Has a model's forwards followed where its graphs do not show all of its attention: the next forward tells what this one could not."""

from __future__ import annotations

import dataclasses

from lvsa_compile import compat, reasons
from lvsa_compile.passes.compilation import Compilation, Decision, Outside
from lvsa_compile.passes.decide import may_be_sparse
from lvsa_compile.watching.find_model import follow_broken


def follow_forwards(compilation: Compilation) -> Compilation:
    """Fills in ``followed``: whether the forwards of the model are followed from the next one on, attention between its graphs too."""
    broken = any(decision.miss is not None and decision.miss.reason is reasons.GRAPH_BREAK for decision in compilation.decisions)
    eager = compilation.attend is not None
    outside = compilation.forward.outside if eager else ()
    last = eager and compat.is_last_compile() and bool(compilation.sites)
    may_be_outside = eager and compilation.position.leads_on and compilation.forward.shows_video
    if not (broken or outside or last or may_be_outside):
        return compilation
    unseen = next((_left_outside(compilation.model, found) for found in outside if may_be_sparse(compilation)), "")
    followed = follow_broken(compilation.attend, unseen, only_looking=not (broken or outside or last))
    decisions = tuple(map(_once_more, compilation.decisions)) if followed else compilation.decisions
    return dataclasses.replace(compilation, decisions=decisions, followed=followed and (last or bool(outside)))


def _once_more(decision: Decision) -> Decision:
    """The decision, with what the next forward may mend by itself where a graph break hid what its tokens are."""
    if decision.miss is None or decision.miss.reason is not reasons.GRAPH_BREAK:
        return decision
    again = "Call the model again: the next forward is followed through the code between its graphs. Where it stays dense: "
    return dataclasses.replace(decision, miss=dataclasses.replace(decision.miss, remedy=again + decision.miss.remedy))


def _left_outside(model: str, found: Outside) -> str:
    """What a user is told where attention that was seen in the code between graphs shows up in no forward."""
    miss = reasons.OUTSIDE_GRAPHS.because(f"{found.line}: {found.why}, by no op that lvsa sees", found.remedy)
    return f"lvsa left attention of {model or 'the model'} dense: {miss}. Remedy: {miss.remedy}"
