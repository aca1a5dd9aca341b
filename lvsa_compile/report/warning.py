"""What a user is warned of when a graph is compiled: what was most likely not meant, each with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

from lvsa_compile import compat
from lvsa_compile.forward.explicit_step import explicit_step
from lvsa_compile.forward.labels import watched_forward
from lvsa_compile.passes.compilation import Compilation
from lvsa_compile.reasons import TRAINING
from lvsa_compile.report.recording import moves
from lvsa_compile.report.report import Report


def warnings_of(report: Report, compilation: Compilation) -> list[str]:
    """The warnings that a graph and its report are due, but for ``left_dense``."""
    found = (
        _training(report),
        _no_timestep(report, compilation),
        _several_steps(report, compilation),
        _slower(report),
        _limit(report, compilation),
    )
    return [message for warnings in found for message in warnings]


def left_dense(forward: Report) -> str:
    """What keeps a model dense that the user can mend, with the remedy; "" where nothing is to be done.

    ``forward`` is the report of all graphs of a forward so far.
    """
    miss = forward.mendable_miss
    if miss is None:
        return ""
    also = f" After that there is also {forward.also_missing}" if forward.also_missing else ""
    return f"lvsa left attention of {forward.model or 'the model'} dense: {miss.reason}: {miss.detail}. Remedy: {miss.remedy}{also}"


def _training(report: Report) -> Iterator[str]:
    if any(site.reason == TRAINING.code for site in report.sites):
        yield f"lvsa left attention dense: {TRAINING.meaning} {TRAINING.remedy}"


def _no_timestep(report: Report, compilation: Compilation) -> Iterator[str]:
    if report.sparse_sites and moves(compilation) and compilation.timestep is None and not compilation.clock_before:
        yield (
            f"lvsa found no timestep among the inputs of {report.model or 'the model'}, so the {_what(compilation)} stays at step 0. "
            f"Wrap each denoising step in `with lvsa_compile.step(i):`{_or_else(compilation)}."
        )


def _several_steps(report: Report, compilation: Compilation) -> Iterator[str]:
    if explicit_step() is not None and compilation.timestep is not None and compilation.timestep.steps:
        yield (
            f"lvsa found several denoising steps in one graph of {report.model or 'a function'}, and lvsa_compile.step(i) around it says "
            "one for all. Take it away: the graph's own timesteps tell them apart."
        )


def _slower(report: Report) -> Iterator[str]:
    slow = next((site for site in report.sparse_sites if site.slower), None)
    if slow is not None and report.options.get("lowering", "auto") == "auto":
        yield (
            f"lvsa computes sparse attention of {report.model or 'the model'} by lowering {slow.lowering!r}, {slow.slower}. "
            "options={'when_slower': 'dense'} leaves it dense."
        )


def _limit(report: Report, compilation: Compilation) -> Iterator[str]:
    if report.sites and compat.is_last_compile():
        limit, changed = compat.recompile_limit(), compat.recompile_reason()
        followed = compilation.followed or (watched_forward.get() is not None and compilation.attend is not None)
        how = "" if followed else " with dense attention"
        yield (
            f"lvsa compiled {report.model or 'this model'} for the {limit}th time, the last that torch._dynamo.config.recompile_limit = "
            f"{limit} allows; what changed last: {changed or 'unknown'}. What differs from all of them runs in eager mode{how}. "
            f"Raise the limit (torch._dynamo.config.recompile_limit = {8 * limit}), or keep that from changing."
        )


def _is_lvsa(compilation: Compilation) -> bool:
    return compilation.options.chosen_policy.name == "lvsa"


def _what(compilation: Compilation) -> str:
    return "anchor grid" if _is_lvsa(compilation) else f"pattern of policy {compilation.options.chosen_policy.name!r}"


def _or_else(compilation: Compilation) -> str:
    return ", or pass options={'rotate': False} if that is meant" if _is_lvsa(compilation) else ""
