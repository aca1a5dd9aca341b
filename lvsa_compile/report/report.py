"""The report of a compile: what was decided for the graphs of one forward, and where horizon and step came from."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lvsa_compile.forward.calls import calls_of
from lvsa_compile.ops import verified as verification
from lvsa_compile.policies.contract import Frames, Plan
from lvsa_compile.policies.given import policy_as_dict
from lvsa_compile.policies.lvsa.frame_pattern import FramePattern
from lvsa_compile.reasons import HORIZON_UNKNOWN, NO_GRID, PATTERN_FULL, REASONS
from lvsa_compile.report.names import together
from lvsa_compile.report.page import write_page
from lvsa_compile.report.receipt import Receipt, receipt_of
from lvsa_compile.report.records import ON_THE_REAL_DEVICE, SCHEMA, SPARSE, UNKNOWN_HORIZON, GraphReport, SiteReport, alike_sites

_BETWEEN = "attention in the code between graphs runs eagerly; lvsa_compile.explain runs the model once and counts it"
_CLOSENESS = {reason.code: position for position, reason in enumerate(REASONS)}


@dataclass(frozen=True)
class Report:
    """What was decided for the graphs of one forward.  ``print(report)`` gives a line per site.

    ``options`` are those that are not at their defaults, ``option_sources`` where the ones come from that no call gave.
    """

    model: str
    graphs: tuple[GraphReport, ...]
    horizon: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    option_sources: dict[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """The sites of all graphs."""
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def sparse_sites(self) -> tuple[SiteReport, ...]:
        """The sites that were rewritten."""
        return tuple(site for site in self.sites if site.decision == SPARSE)

    @property
    def work(self) -> str:
        """What the sparse sites compute of what they would dense, in words; "" where none is sparse."""
        dense, sparse = sum(site.flops for site in self.sparse_sites), sum(site.flops * site.density for site in self.sparse_sites)
        if not dense:
            return ""
        counted = f"{_flop(sparse)} of {_flop(dense)} per forward"
        return f"attention over the video computes {sparse / dense:.0%} of what dense attention would ({counted})"

    @property
    def gain(self) -> str:
        """How much of the forward the sparse sites are, and what they are worth to the whole, in words; "" where that is not known."""
        whole, dense = sum(graph.flops for graph in self.graphs), sum(site.flops for site in self.sparse_sites)
        compiled_once_for_many = any("*" in site.name for site in self.sites)
        if not 0 < dense <= whole or compiled_once_for_many or not all(graph.flops for graph in self.graphs if graph.sites):
            return ""
        text = f"attention over the video is {dense / whole:.0%} of the forward's {_flop(whole)}"
        if any(site.lowering == ON_THE_REAL_DEVICE for site in self.sparse_sites):
            left = whole - sum(site.flops * (1.0 - site.density) for site in self.sparse_sites)
            return f"{text}; by FLOPs the whole may become {whole / left:.2g}× as fast (asked on meta; its own device can say more)"
        faster = [site.measured or site.expected for site in self.sparse_sites]
        if not all(faster):
            return text
        left = whole - dense + sum(site.flops / times for site, times in zip(self.sparse_sites, faster, strict=True))
        known = "its sites measured" if all(site.measured for site in self.sparse_sites) else "by what is expected of the lowering"
        return f"{text}; {known} and the rest by its FLOPs, the whole may become {whole / left:.2g}× as fast"

    @property
    def why_none(self) -> str:
        """What the nearest miss is called: where the video is simply no longer than the training length, nothing was missed."""
        miss = self.nearest_miss
        return "nothing is sparse at this length" if miss is not None and miss.reason == PATTERN_FULL.code else "nearest miss"

    @property
    def lengths(self) -> str:
        """How long the videos of the sparse sites are and what makes them sparse, in words."""
        return "; ".join(dict.fromkeys(_length_of(site.plan) for site in self.sparse_sites if site.plan is not None))

    @property
    def also_missing(self) -> str:
        """What stands in the way beside the nearest miss, in words; "" where nothing is known to."""
        miss = self.nearest_miss
        if miss is None or not self.horizon.startswith(UNKNOWN_HORIZON) or miss.reason == HORIZON_UNKNOWN.code or not miss.remedy:
            return ""
        if miss.reason == NO_GRID.code and not miss.mendable:
            return ""  # most likely text or images
        return f"{HORIZON_UNKNOWN.code}: {self.horizon.removeprefix(UNKNOWN_HORIZON + ': ')}.  Remedy: {HORIZON_UNKNOWN.remedy}"

    @property
    def nearest_miss(self) -> SiteReport | None:
        """Of the dense sites the one that came closest to being sparse; None where something is sparse or nothing was found."""
        if self.sparse_sites or not self.sites:
            return None
        return max(self.sites, key=lambda site: _CLOSENESS[site.reason])

    @property
    def mendable_miss(self) -> SiteReport | None:
        """Of the dense sites that the user can mend the one that came closest to being sparse; None where there is none."""
        return max((site for site in self.sites if site.mendable), key=lambda site: _CLOSENESS[site.reason], default=None)

    @property
    def summary(self) -> str:
        """One line: how many sites are sparse, and why the others are not."""
        ids = ", ".join(graph.compile_id for graph in self.graphs)
        start = f"lvsa {self.model or 'graph'} [{ids}]: "
        if not self.sites:
            return start + f"no attention in {'this graph' if len(self.graphs) == 1 else 'these graphs'}"
        counts: dict[str, int] = {}
        for site in self.sites:
            if site.reason:
                counts[site.reason] = counts.get(site.reason, 0) + 1
        dense = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        return start + f"{len(self.sparse_sites)} of {len(self.sites)} attention sites sparse" + (f"; dense: {dense}" if dense else "")

    @property
    def head(self) -> list[str]:
        """Lines about the forward as a whole."""
        lines = [self.summary]
        if miss := self.nearest_miss:
            lines += [f"  {self.why_none}: {miss}", *([f"    attention at {miss.source}"] if miss.source else [])]
        if self.also_missing:
            lines.append(f"    after that there is also {self.also_missing}")
        if self.sparse_sites:
            lines += [f"  {name}: {text}" for name, text in (("work", self.work), ("forward", self.gain)) if text]
            lines += [f"  video: {self.lengths}", f"  horizon: {self.horizon}"]
        turning = [graph for graph in self.graphs if any(site.decision == SPARSE for site in graph.sites)]
        clocks = dict.fromkeys("; ".join((graph.clock, *graph.clock_saw)) for graph in turning)
        lines += [f"  denoising step: {clock}" for clock in clocks]
        lines += [f"  schedule: {words}" for words in dict.fromkeys(words for graph in turning for words in graph.schedules)]
        lines += [f"  state: {graph.state}" for graph in turning if graph.state]
        lines += [f"  anchors: {short}" for short in dict.fromkeys(short for graph in turning for short in graph.short)]
        lines += [f"  option: {name}={self.options.get(name)!r}, from {source}" for name, source in self.option_sources.items()]
        lines += [f"  specialised: {what}" for what in dict.fromkeys(what for graph in self.graphs for what in graph.specialised)]
        return lines

    def __str__(self) -> str:
        lines = self.head
        for graph in self.graphs:
            if len(self.graphs) > 1:
                lines.append(f"  graph {graph.compile_id}: {len(graph.sites) or 'no'} attention sites")
            policy_as_dict = self.nearest_miss.text if self.nearest_miss is not None else ""
            for text, alike in alike_sites(graph.sites).items():
                again = text == policy_as_dict and len(graph.sites) > 1
                shown = f"{alike[0].decision}, {alike[0].reason}, see above" if again else text
                lines.append(f"  {together([site.name for site in alike])}: {shown}")
        if any(graph.breaks for graph in self.graphs):
            lines.append(f"  graph breaks: {_BETWEEN}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        bare = tuple(dataclasses.replace(g, sites=tuple(map(_without_plan, g.sites)), calls=None) for g in self.graphs)
        plain = dataclasses.asdict(dataclasses.replace(self, graphs=bare))
        for graph, own in zip(plain["graphs"], self.graphs, strict=True):
            del graph["calls"]
            for site, record in zip(graph["sites"], own.sites, strict=True):
                del site["plan"], site["measure"]
                site |= {"pattern": _pattern_of(record), "policy": None if record.plan is None else policy_as_dict(record.plan.policy)}
        return {"schema": SCHEMA, **plain, "summary": self.summary, "work": self.work, "forward": self.gain, "versions": versions()}

    def receipt(self, clear: bool = False) -> Receipt:
        """What really ran since compiling: calls of each site and by what they were computed.  Waits for the device.

        Args:
            clear: whether the counts begin anew.

        Example:
            >>> print(lvsa_compile.reports()[-1].receipt())
            blocks.0-29.attn1 (30 sites): cpu, 100 calls
            denoising step: 100 calls, timesteps from 20 to 999, 49 moves, 1 videos begun
        """
        return receipt_of(self.graphs, clear)

    def measured(self) -> Report:
        """The report with the seconds of a call of each sparse site, by its lowering and dense, measured now on its shapes and device.

        What was measured before on this machine is remembered.  Random tensors of the site's sizes are made; a site for which there is
        no room, or whose device is not here, keeps no seconds.
        """
        return _with_sites(self, _measured)

    def to_html(self, path: str) -> None:
        """Writes the report as one self-contained page; everything printed is escaped."""
        write_page(self, path)


def _flop(count: float) -> str:
    """With three digits, in the unit that fits."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def versions() -> dict[str, str]:
    """Versions a report is read with."""
    return {"lvsa-compile": importlib.metadata.version("lvsa-compile"), "torch": torch.__version__, "python": platform.python_version()}


def with_what_ran(report: Report) -> Report:
    """The report with what was seen at run time so far: timesteps, and at each site the worst error of verification."""
    report = _with_sites(report, _with_error)
    return dataclasses.replace(report, graphs=tuple(map(_with_calls, report.graphs)))


def _with_calls(graph: GraphReport) -> GraphReport:
    calls = calls_of(graph.compile_id)
    saw = [(clock, clock.saw()) for clock in calls.clocks]
    turning = {(plan.frames, plan.rows.by_layer) for site in graph.sites if (plan := site.plan) is not None and plan.rows.moves}
    short = dict.fromkeys(_short(*each, seen.steps, clock.layers.count) for clock, seen in saw for each in turning)
    texts = dict.fromkeys(str(seen) for _, seen in saw)
    return dataclasses.replace(graph, calls=calls, clock_saw=tuple(filter(None, texts)), short=tuple(filter(None, short)))


def _short(pattern: Frames | None, by_layer: bool, steps: int, layers: int) -> str:
    """Which frames were never an anchor in videos of so many steps, and what helps; "" where all were one."""
    layers = max(1, layers) if by_layer else 1
    if not isinstance(pattern, FramePattern) or steps < 2 or (share := pattern.coverage(steps, layers)) == 1.0:
        return ""
    remedy = "" if by_layer else ". options={'rotate': 'both'} moves the anchors from layer to layer, too"
    short = f"in {steps} denoising steps {share:.0%} of the {pattern.frames} latent frames were one at least once"
    return f"{short}; all are after {pattern.phases - layers + 1}{remedy}"


def _with_sites(report: Report, changed: Callable[[SiteReport, str], SiteReport]) -> Report:
    """The report with each site changed by a function of it and its graph's compile id."""
    graphs = tuple(
        dataclasses.replace(graph, sites=tuple(changed(site, graph.compile_id) for site in graph.sites)) for graph in report.graphs
    )
    return dataclasses.replace(report, graphs=graphs)


def _with_error(site: SiteReport, compile_id: str) -> SiteReport:
    seen = verification.seen(compile_id, site.name)
    return site if seen is None else dataclasses.replace(site, worst_error=seen[0], tolerance=seen[1])


def _measured(site: SiteReport, compile_id: str) -> SiteReport:
    return site if site.measure is None else dataclasses.replace(site, seconds={**site.seconds, **site.measure()})


def _length_of(plan: Plan) -> str:
    frames, horizon = plan.geometry.total_frames, plan.facts.horizon
    if not plan.policy.needs_horizon or horizon is None:
        return f"{frames} latent frames, sparse by policy {plan.policy.name!r}"
    return f"{frames} latent frames, {frames / horizon.frames:.2g}× the training horizon, so its attention is sparse"


def _without_plan(site: SiteReport) -> SiteReport:
    return dataclasses.replace(site, plan=None, measure=None)


def _pattern_of(site: SiteReport) -> dict[str, Any] | None:
    """The frame pattern of a site as plain values, where it has one."""
    frames: Any = None if site.plan is None else site.plan.frames
    return dataclasses.asdict(frames) if dataclasses.is_dataclass(frames) and not isinstance(frames, type) else None
