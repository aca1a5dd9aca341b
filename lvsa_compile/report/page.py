"""The report as one plain, self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

if TYPE_CHECKING:
    from lvsa_compile.report.records import Report


def write_page(report: Report, path: str) -> None:
    """Writes ``report`` to ``path``; every value is escaped by the template engine."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    Path(path).write_text(environment.get_template("page.html").render(report=report, versions=report.to_dict()["versions"]))
