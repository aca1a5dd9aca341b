"""The report in a terminal: lines about the whole, a table of the sites that are alike, and what to do about those that are dense."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lvsa_compile.reasons import NOTHING_TO_DO
from lvsa_compile.report.names import together
from lvsa_compile.report.records import SiteReport, alike_sites
from lvsa_compile.report.report import Report

_HEADINGS = ("sites", "decision", "why", "density", "lowering", "faster", "query", "tokens")
_NARROW = 120  # columns; below, a line per site reads better than a table


def show(report: Report, console: Console) -> None:
    """Prints a report; sites of which all but the name is the same share a row."""
    rows = list(alike_sites(report.sites).values())
    if console.width < _NARROW or not rows:
        console.print(Text(str(report)), soft_wrap=True)
        return
    for line in report.head:
        console.print(Text(line), soft_wrap=True)
    found = [_cells(sites) for sites in rows]
    shown = [name for name in _HEADINGS if any(cells[name] for cells in found)]
    table = Table(*shown)
    for column, name in zip(table.columns, shown, strict=True):
        column.overflow = "fold" if name in ("sites", "tokens") else "ellipsis"
    for cells in found:
        table.add_row(*(Text(cells[name]) for name in shown))
    console.print(table)
    shown_above = (report.nearest_miss.reason, report.nearest_miss.detail) if report.nearest_miss is not None else ()
    for code, detail, remedy in dict.fromkeys((sites[0].reason, sites[0].detail, sites[0].remedy) for sites in rows if sites[0].reason):
        if (code, detail) == shown_above:
            continue
        console.print(Text(f"{code}: {detail}. {remedy or NOTHING_TO_DO}"), soft_wrap=True)


def _cells(sites: list[SiteReport]) -> dict[str, str]:
    """A row for sites that are alike, by heading."""
    site = sites[0]
    times = ", ".join(f"{name} {1e3 * taken:.3g} ms" for name, taken in site.seconds.items())
    faster = f"{site.measured:.2g}× ({times})" if site.measured else f"{site.expected:.2g}× expected" if site.expected else ""
    return {
        "sites": together([each.name for each in sites]),
        "decision": site.decision,
        "why": site.reason,
        "density": f"{site.density:.3f}" if site.lowering else "",
        "lowering": site.lowering,
        "faster": faster,
        "query": site.query_shape,
        "tokens": site.layout,
    }
