"""The receipt of a compiled model: what really ran since it was compiled, site by site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lvsa_compile.passes.compilation import EAGER
from lvsa_compile.report.names import together
from lvsa_compile.report.records import BETWEEN_GRAPHS, SPARSE, GraphReport, SiteReport


@dataclass(frozen=True)
class SiteReceipt:
    """What ran at one attention site: ``lowering`` is "dense" or "masked" where it is not sparse.

    ``calls`` are those of its graph, ``dense_step_calls`` those of them in the first steps that ``dense_steps`` leaves dense,
    ``fallbacks`` those that a faster lowering would have computed, had it not failed on this machine.  A block that is compiled once for
    all of its kind counts the calls of all.  Attention between graphs is not counted: its ``calls`` are -1.
    """

    name: str
    lowering: str
    calls: int
    dense_step_calls: int = 0
    fallbacks: int = 0

    @property
    def ran(self) -> str:
        """All but the name, in a line."""
        if self.calls < 0:
            return f"{self.lowering}, runs eagerly and is not counted"
        dense = f", {self.dense_step_calls} of them at dense steps" if self.dense_step_calls else ""
        fell = f", {self.fallbacks} in place of a faster lowering that failed" if self.fallbacks else ""
        return f"{self.lowering}, {self.calls} calls{dense}{fell}"


@dataclass(frozen=True)
class Receipt:
    """What really ran.  ``clocks`` say which timesteps the clocks of the models saw."""

    sites: tuple[SiteReceipt, ...]
    clocks: tuple[str, ...] = ()

    def __str__(self) -> str:
        alike: dict[str, list[str]] = {}
        for site in self.sites:
            alike.setdefault(site.ran, []).append(site.name)
        lines = [f"{together(names)}: {ran}" for ran, names in alike.items()] or ["no attention site ran"]
        return "\n".join([*lines, *(f"denoising step: {clock}" for clock in self.clocks)])


def receipt_of(graphs: Iterable[GraphReport], clear: bool) -> Receipt:
    """Reads what the graphs counted, waiting for their devices; with ``clear`` they begin anew."""
    sites: list[SiteReceipt] = []
    clocks: dict[str, None] = {}
    for graph in graphs:
        if graph.calls is None:
            continue
        calls, dense = graph.calls.read()
        sites += [_site(site, calls, dense, graph.compile_id.startswith(EAGER)) for site in graph.sites]
        clocks |= dict.fromkeys(saw for clock in graph.calls.clocks if (saw := str(clock.saw())))
    for graph in graphs if clear else ():
        if graph.calls is not None:
            graph.calls.clear()
    return Receipt(tuple(sites), tuple(clocks))


def _site(site: SiteReport, calls: int, dense: int, eager: bool) -> SiteReceipt:
    if site.name == BETWEEN_GRAPHS or (eager and site.decision != SPARSE):
        return SiteReceipt(site.name, site.decision, -1)
    if not site.lowering:
        return SiteReceipt(site.name, site.decision, calls)
    return SiteReceipt(site.name, site.lowering, calls, dense, calls if site.fell_back else 0)
