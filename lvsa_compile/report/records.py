"""The report of one compile: a record per attention site, and where horizon and step came from."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from lvsa_compile.passes.compilation import Compilation, Decision

SPARSE, DENSE = "sparse", "dense"


@dataclass(frozen=True)
class SiteReport:
    """One attention site: ``decision`` is "sparse" or "dense", and a dense site has a ``reason`` from the closed list.

    ``layout`` shows the token sequence, ``density`` is the attended share of frame pairs, mean over the phases.
    """

    name: str
    decision: str
    reason: str = ""
    detail: str = ""
    remedy: str = ""
    layout: str = ""
    density: float = 1.0
    lowering: str = ""
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        layout = f"  [{self.layout}]" if self.layout else ""
        if self.decision == SPARSE:
            return f"{self.name}: sparse, density {self.density:.3f}, lowering {self.lowering}{layout}"
        remedy = f"  Remedy: {self.remedy}" if self.remedy else ""
        return f"{self.name}: dense, {self.reason}: {self.detail}{layout if self.layout not in self.detail else ''}{remedy}"


@dataclass(frozen=True)
class Report:
    """What one compile decided.  ``print(report)`` gives a line per site."""

    model: str
    compile_id: str
    sites: tuple[SiteReport, ...]
    horizon: str = ""
    clock: str = ""
    specialised: tuple[str, ...] = ()

    @property
    def sparse_sites(self) -> tuple[SiteReport, ...]:
        """The sites that were rewritten."""
        return tuple(site for site in self.sites if site.decision == SPARSE)

    @property
    def summary(self) -> str:
        """One line: how many sites are sparse, and why the others are not."""
        if not self.sites:
            return f"lvsa {self.model or 'graph'} [{self.compile_id}]: no attention in this graph"
        counts: dict[str, int] = {}
        for site in self.sites:
            if site.decision == DENSE:
                counts[site.reason] = counts.get(site.reason, 0) + 1
        dense = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        return f"lvsa {self.model or 'graph'} [{self.compile_id}]: {len(self.sparse_sites)} of {len(self.sites)} attention sites sparse" + (
            f"; dense: {dense}" if dense else ""
        )

    def __str__(self) -> str:
        lines = [self.summary]
        if self.sparse_sites:
            lines += [f"  horizon: {self.horizon}", f"  denoising step: {self.clock}"]
        lines += [f"  specialised: {what}" for what in self.specialised]
        return "\n".join([*lines, *(f"  {site}" for site in self.sites)])


def report_of(compilation: Compilation) -> Report:
    """The report of a finished compile."""
    horizon, timestep = compilation.horizon, compilation.timestep
    if not compilation.options.rotate:
        clock = "rotate=False, the anchor grid stands still"
    elif timestep is not None:
        clock = f"value of input {timestep.name!r}"
    else:
        clock = "no timestep input found; step 0 unless lvsa_compile.step(i) says otherwise"
    return Report(
        model=compilation.model,
        compile_id=compilation.compile_id,
        sites=tuple(_site(decision) for decision in compilation.decisions),
        horizon=f"{horizon.frames} latent frames ({horizon.found_in})" if horizon is not None else "unknown",
        clock=clock,
        specialised=compilation.specialised,
    )


def _site(decision: Decision) -> SiteReport:
    if decision.plan is not None:
        plan = decision.plan
        return SiteReport(
            decision.name,
            SPARSE,
            layout=decision.layout,
            density=plan.call.pattern.density,
            lowering=plan.choice.lowering.name,
            passed_over=plan.choice.passed_over,
        )
    assert decision.miss is not None
    reason = decision.miss.reason
    return SiteReport(decision.name, DENSE, reason.code, decision.miss.detail or reason.meaning, reason.remedy, decision.layout)


_reports: list[Report] = []
_lock = threading.Lock()


def keep(report: Report) -> None:
    """Adds a report to those that ``reports()`` returns."""
    with _lock:
        _reports.append(report)


def reports() -> list[Report]:
    """Reports of all compiles of this process since the last ``torch._dynamo.reset()``, oldest first."""
    with _lock:
        return list(_reports)


def forget() -> None:
    """Drops all reports."""
    with _lock:
        _reports.clear()
