"""The report in a terminal: what is said of the whole, a table of the sites that are alike, and what to do about those that are dense."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lvsa_compile.reasons import NOTHING_TO_DO
from lvsa_compile.report.names import together
from lvsa_compile.report.records import Report, alike_sites


def show(report: Report, console: Console) -> None:
    """Prints a report; sites of which all but the name is the same share a row."""
    for line in report.head:
        console.print(Text(line), soft_wrap=True)
    rows = list(alike_sites(report.sites).values())
    if not rows:
        return
    table = Table("sites", "decision", "why", "density", "lowering", "faster", "query", "tokens")
    table.columns[0].overflow = table.columns[7].overflow = "fold"
    for sites in rows:
        site = sites[0]
        sparse = bool(site.lowering)
        faster = f"{site.measured:.2g}× measured" if site.measured else f"{site.expected:.2g}× expected" if site.expected else ""
        cells = (
            together([each.name for each in sites]), site.decision, site.reason, f"{site.density:.3f}" if sparse else "", site.lowering,
            faster, site.query_shape, site.layout,
        )  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    for code, detail, remedy in dict.fromkeys((sites[0].reason, sites[0].detail, sites[0].remedy) for sites in rows if sites[0].reason):
        console.print(Text(f"{code}: {detail}. {remedy or NOTHING_TO_DO}"), soft_wrap=True)
