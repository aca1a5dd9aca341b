"""Makes the report of one graph from what was decided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lvsa_compile import compat
from lvsa_compile.compat import example_value
from lvsa_compile.forward.explicit_step import explicit_step, explicit_steps
from lvsa_compile.forward.state import BRANCHES, VIDEOS
from lvsa_compile.passes.compilation import Compilation, Decision, sizes_of
from lvsa_compile.passes.decide import may_be_sparse
from lvsa_compile.policies.rows import Searches, WithDenseSteps
from lvsa_compile.reasons import FIRST_FORWARD, OUTSIDE_GRAPHS, Miss
from lvsa_compile.report.records import BETWEEN_GRAPHS, DENSE, MASKED, ON_THE_REAL_DEVICE, SPARSE, UNKNOWN_HORIZON, GraphReport, SiteReport
from lvsa_compile.report.report import Report
from lvsa_compile.selection.contract import AttentionCall
from lvsa_compile.selection.measure import seconds_of, seconds_of_dense
from lvsa_compile.selection.select import lowerings

_STILL = {
    False: "rotate=False, the anchor grid stands still",
    "layer": "rotate='layer', the anchor grid moves from layer to layer and not from step to step",
}


def report_of(compilation: Compilation) -> Report:
    """The report of one graph."""
    timestep, options = compilation.timestep, compilation.options
    if not moves(compilation):
        rotate = getattr(options.chosen_policy, "rotate", True) if options.chosen_policy.name == "lvsa" else True
        clock = _STILL.get(rotate, "all steps are alike")
    elif explicit_step() is not None:
        clock = "lvsa_compile.step(i), as given when this was compiled"
    elif timestep is not None:
        clock = f"value of input {timestep.name!r}"
    elif compilation.clock_before:
        clock = f"value of input {compilation.clock_before!r}, where the forward began"
    else:
        clock = "no timestep input found; step 0 unless lvsa_compile.step(i) says otherwise"
    forward = compilation.forward
    mendable = forward.shows_video and may_be_sparse(compilation)
    if compilation.followed:
        outside = [_between_graphs(FIRST_FORWARD.because(f"{found.line}: {found.why}"), found.line) for found in forward.outside]
    else:
        outside = [outside_graphs(found.line, found.why, found.remedy, mendable) for found in forward.outside]
    graph = GraphReport(
        compilation.compile_id,
        (*(_site(decision) for decision in compilation.decisions), *outside),
        clock,
        compilation.specialised,
        compilation.position.breaks,
        compilation.flops,
        schedules=_schedules(compilation),
        state=_state(compilation),
        passes=compilation.passes,
    )
    return Report(compilation.model, (graph,), _horizon(compilation), options.changed(), dict(options.sources))


def moves(compilation: Compilation) -> bool:
    """Whether any sparse site depends on the denoising step; as far as nothing is sparse, whether it would."""
    plans = [decision.plan.call.plan for decision in compilation.sparse if decision.plan is not None]
    rotate = getattr(compilation.options.chosen_policy, "rotate", True)
    return any(plan.rows.moves or plan.state for plan in plans) if plans else rotate not in tuple(_STILL)


def _schedules(compilation: Compilation) -> tuple[str, ...]:
    rules = [decision.plan.call.plan.rows for decision in compilation.sparse if decision.plan is not None]
    more = f"; dense_steps={compilation.options.dense_steps} before that" if compilation.options.dense_steps else ""
    own = dict.fromkeys(rule.rows if isinstance(rule, WithDenseSteps) else rule for rule in rules)
    return tuple(rule.words(explicit_steps()) + more for rule in own if isinstance(rule, Searches))


def _state(compilation: Compilation) -> str:
    """The memory of what is kept from step to step, in words."""
    calls = [decision.plan.call for decision in compilation.sparse if decision.plan is not None]
    kept = [each.of_call(call.batch, call.head_dim) for call in calls for each in call.plan.state]
    size = sum(math.prod(each.shape) * each.dtype.itemsize for each in kept)
    if not size:
        return ""
    entries = f"{VIDEOS} videos of {BRANCHES - 1} guidance branches and one more call each"
    return f"{size * VIDEOS * BRANCHES / 2**20:.1f} MiB kept from step to step, {size / 2**20:.1f} for each of {entries}"


def _horizon(compilation: Compilation) -> str:
    horizon, policy = compilation.horizon, compilation.options.chosen_policy
    if horizon is not None:
        return f"{horizon.frames} latent frames ({horizon.found_in})"
    return f"{UNKNOWN_HORIZON}: {compilation.horizon_missing}" if policy.needs_horizon else f"not asked for by policy {policy.name!r}"


def outside_graphs(line: str, why: str, remedy: str = "", mendable: bool = True) -> SiteReport:
    """A site for attention that runs in eager code at ``line``."""
    return _between_graphs(OUTSIDE_GRAPHS.because(f"{line}: {why}", remedy), line, mendable)


def _between_graphs(miss: Miss, line: str, mendable: bool = False) -> SiteReport:
    return SiteReport(BETWEEN_GRAPHS, DENSE, miss.reason.code, miss.detail, miss.remedy, line, mendable=mendable)


def _site(decision: Decision) -> SiteReport:
    site = decision.site
    shapes = [_shape(node) for node in ((site.query, site.key) if site is not None else ())] or ["", ""]
    if decision.plan is not None:
        plan = decision.plan
        return SiteReport(
            decision.name,
            SPARSE,
            source=compat.source_line(decision.node),
            layout=decision.layout,
            density=plan.call.plan.density,
            lowering=plan.choice.lowering.name if plan.call.device.type != "meta" else ON_THE_REAL_DEVICE,
            passed_over=plan.choice.passed_over if plan.call.device.type != "meta" else (),
            faster=plan.choice.faster if plan.call.device.type != "meta" else (),
            fell_back=plan.choice.fell_back and plan.call.device.type != "meta",
            seconds=dict(plan.choice.seconds),
            query_shape=shapes[0],
            key_shape=shapes[1],
            flops=plan.call.flops,
            plan=plan.call.plan,
            expected=plan.choice.lowering.expected(plan.call) if plan.call.device.type != "meta" else 0.0,
            measure=Seconds(plan.choice.lowering.name, plan.call),
            segments=decision.segments,
            key_segments=decision.key_segments,
            trail=decision.trail,
        )
    assert decision.miss is not None
    miss, reason = decision.miss, decision.miss.reason
    return SiteReport(
        decision.name,
        DENSE if decision.mask is None else MASKED,
        reason.code,
        miss.detail or reason.meaning,
        miss.remedy,
        compat.source_line(decision.node),
        decision.layout,
        query_shape=shapes[0],
        key_shape=shapes[1],
        segments=decision.segments,
        key_segments=decision.key_segments,
        trail=decision.trail,
        mendable=decision.mendable,
    )


@dataclass(frozen=True)
class Seconds:
    """Measures a call by a lowering and dense: seconds, of those that can be measured here."""

    lowering: str
    call: AttentionCall

    def __call__(self) -> dict[str, float]:
        """Seconds by name; nothing on the meta device."""
        lowering = next((each for each in lowerings() if each.name == self.lowering), None)
        if self.call.device.type == "meta" or lowering is None:
            return {}
        found = {self.lowering: seconds_of(lowering, self.call), DENSE: seconds_of_dense(self.call)}
        return {name: taken for name, taken in found.items() if isinstance(taken, float)}


def _shape(node: Any) -> str:
    value = example_value(node)
    return sizes_of(value) if isinstance(value, torch.Tensor) else ""
