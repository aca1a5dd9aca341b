"""Two reports beside each other: which sites another version, other options or another model decide differently."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvsa_compile.errors import ReportFileError
from lvsa_compile.report.names import together
from lvsa_compile.report.records import SCHEMA

_COMPARED = ("decision", "reason", "detail", "density", "lowering", "layout", "query_shape", "key_shape", "policy", "pattern")
_OF_THE_WHOLE = ("model", "horizon", "options", "versions", "work", "forward")


@dataclass(frozen=True)
class Difference:
    """What differs, at a site or of the report as a whole (``site`` empty); "" stands for a site that is not there."""

    site: str
    what: str
    before: str
    after: str


def read_report(path: Path) -> dict[str, Any]:
    """A report as ``report.to_dict()`` or ``lvsa explain --json`` wrote it.

    Raises:
        ReportFileError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportFileError(str(path), "does not exist") from None
    except (OSError, ValueError) as error:
        raise ReportFileError(str(path), f"cannot be read as JSON ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("graphs"), list):
        raise ReportFileError(str(path), "is no report: it has no list of graphs")
    schema = found.get("schema", 1)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ReportFileError(str(path), f"has schema {schema}, a newer version's: this one reads 1 to {SCHEMA}")
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """All that two reports say differently; sites are matched by name, and where names repeat by their order."""
    found = [
        Difference("", what, _text(before.get(what)), _text(after.get(what)))
        for what in _OF_THE_WHOLE
        if before.get(what) != after.get(what)
    ]
    sites = [_sites(report) for report in (before, after)]
    for name in dict.fromkeys([*sites[0], *sites[1]]):
        old, new = sites[0].get(name), sites[1].get(name)
        if old is None or new is None:
            shown = ["" if site is None else f"{site.get('decision')} {site.get('reason')}".strip() for site in (old, new)]
            found.append(Difference(name, "site", *shown))
            continue
        for what in _COMPARED:
            if old.get(what) != new.get(what) and (what in old) == (what in new):  # a schema may not know it
                found.append(Difference(name, what, _text(old.get(what)), _text(new.get(what))))
    return found


def gathered(found: Iterable[Difference]) -> list[tuple[str, Difference]]:
    """Differences that are the same but for the site as one, under one name for all their sites; in order."""
    alike: dict[Difference, list[str]] = {}
    for difference in found:
        alike.setdefault(dataclasses.replace(difference, site=""), []).append(difference.site)
    return [(together(names), difference) for difference, names in alike.items()]


def _sites(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    named: dict[str, dict[str, Any]] = {}
    for graph in report["graphs"]:
        for site in graph.get("sites", []):
            name, number = str(site.get("name")), 1
            while (key := name if number == 1 else f"{name} ({number})") in named:
                number += 1
            named[key] = site
    return named


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
