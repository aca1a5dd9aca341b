"""The report in a terminal: what is said of the whole, a table of the sites that are alike, and what to do about those that are dense."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lvsa_compile.reasons import NOTHING_TO_DO
from lvsa_compile.report.names import together
from lvsa_compile.report.records import Report, alike_sites

_NARROW = 120  # columns; below, a line per site reads better than a table


def show(report: Report, console: Console) -> None:
    """Prints a report; sites of which all but the name is the same share a row."""
    rows = list(alike_sites(report.sites).values())
    if console.width < _NARROW or not rows:
        console.print(Text(str(report)), soft_wrap=True)
        return
    for line in report.head:
        console.print(Text(line), soft_wrap=True)
    table = Table("sites", "decision", "why", "density", "lowering", "faster", "query", "tokens")
    table.columns[0].overflow = table.columns[7].overflow = "fold"
    for sites in rows:
        site = sites[0]
        sparse = bool(site.lowering)
        times = ", ".join(f"{name} {1e3 * taken:.3g} ms" for name, taken in site.seconds.items())
        faster = f"{site.measured:.2g}× ({times})" if site.measured else f"{site.expected:.2g}× expected" if site.expected else ""
        cells = (
            together([each.name for each in sites]), site.decision, site.reason, f"{site.density:.3f}" if sparse else "", site.lowering,
            faster, site.query_shape, site.layout,
        )  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    told = (report.nearest_miss.reason, report.nearest_miss.detail) if report.nearest_miss is not None else ()
    for code, detail, remedy in dict.fromkeys((sites[0].reason, sites[0].detail, sites[0].remedy) for sites in rows if sites[0].reason):
        if (code, detail) == told:
            continue
        console.print(Text(f"{code}: {detail}. {remedy or NOTHING_TO_DO}"), soft_wrap=True)
