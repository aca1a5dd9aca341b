"""The results of ``lvsa bench`` as tables: one description of columns for the terminal and for the documents."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

Row = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """Results as a table of text; ``part`` is the part of the benchmark that they are of."""

    part: str
    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_rich(self) -> Table:
        """For the terminal; all but the first column are numbers."""
        table = Table(title=self.title, title_justify="left")
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """For the documents."""
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.headings, *self.rows)]
        return "\n".join([lines[0], "| :-- " + "| --: " * (len(self.headings) - 1) + "|", *lines[1:]])


def seconds(value: float | None) -> str:
    """With three digits, in the unit that fits."""
    if value is None:
        return "–"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{float(f'{value * factor:.3g}'):g} {unit}"
    return f"{value * 1e6:.3g} µs"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _bytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.0f} MiB" if value >= 2**20 else f"{value / 2**10:.0f} KiB"


def _site(row: Row) -> str:
    shape = f"{row['frames']} × {row['tokens_per_frame']}, {row['heads']}×{row['head_dim']}"
    shape += f", horizon {row['reference']}" if row["reference"] != 21 else ""
    return shape + ("" if row["kind"] in ("plain", "sweep", "growth") else f", {row['kind']}")


def _site_and_dtype(row: Row) -> str:
    return f"{_site(row)}, {row['dtype']}"


_Column = tuple[str, Callable[[Row], str]]
_SITE: tuple[_Column, ...] = (
    ("attention by", lambda r: r["contender"]),
    ("time", lambda r: seconds(r["seconds"])),
    ("±", lambda r: _percent(r["spread"])),
    ("speed-up", lambda r: _times(r["speedup"])),
    ("FLOP bound", lambda r: _times(r["bound"])),
    ("share", lambda r: _percent(r["share"])),
    ("peak", lambda r: _bytes(r["peak_bytes"])),
    ("temporaries", lambda r: _times(r["temporaries"])),
    ("worst error", lambda r: _error(r["worst_error"])),
)
_PAIR: tuple[_Column, ...] = (
    ("frames × tokens, heads×head_dim", _site),
    ("density", lambda r: f"{r['density']:.3f}"),
    ("time", lambda r: seconds(r["seconds"])),
    ("±", lambda r: _percent(r["spread"])),
    ("over dense", lambda r: f"{1 / r['speedup']:.3f}"),
    ("share", lambda r: _percent(r["share"])),
)
_MODEL: tuple[_Column, ...] = (
    ("horizons", lambda r: f"{r['horizon']}×"),
    ("latent frames", lambda r: str(r["frames"])),
    ("tokens", lambda r: str(r["tokens"])),
    ("inductor", lambda r: seconds(r.get("inductor"))),
    ("±", lambda r: _percent(r.get("inductor_spread"))),
    ("lvsa", lambda r: seconds(r["lvsa"])),
    ("±", lambda r: _percent(r["lvsa_spread"])),
    ("speed-up", lambda r: _times(r.get("speedup"))),
    ("FLOP bound", lambda r: _times(r["bound"])),
    ("share", lambda r: _percent(r.get("share"))),
)
_MODEL_BESIDE_TIME: tuple[_Column, ...] = (
    ("horizons", lambda r: f"{r['horizon']}×"),
    ("peak, inductor", lambda r: _bytes(r.get("inductor_peak_bytes"))),
    ("peak, lvsa", lambda r: _bytes(r["lvsa_peak_bytes"])),
    ("worst error, inductor", lambda r: _error(r.get("inductor_worst_error"))),
    ("worst error, lvsa", lambda r: _error(r.get("lvsa_worst_error"))),
    ("compile, inductor", lambda r: seconds(r.get("inductor_compile"))),
    ("compile, lvsa", lambda r: seconds(r["lvsa_compile"])),
)
_OVERHEADS: tuple[_Column, ...] = (
    ("cost", lambda r: r["cost"]),
    ("median", lambda r: seconds(r["median"])),
    ("least", lambda r: seconds(r["least"])),
    ("most", lambda r: seconds(r["most"])),
)
_WATCHING: tuple[_Column, ...] = (
    ("40 blocks of width 1536", lambda r: r["forward"]),
    ("plain", lambda r: seconds(r["plain"])),
    ("±", lambda r: _percent(r["spread"])),
    ("followed", lambda r: seconds(r["followed"])),
    ("more", lambda r: seconds(r["more"])),
    ("share", lambda r: f"{r['share']:.1%}"),
)
_BLOCKS: tuple[_Column, ...] = (
    ("tokens", lambda r: str(r["tokens"])),
    ("heads", lambda r: f"{r['heads']} of {r['head_dim']}"),
    ("dtype", lambda r: r["dtype"]),
    ("block", lambda r: str(r["block"])),
    ("density", lambda r: f"{r['density']:.3f}"),
    ("dense", lambda r: seconds(r["dense"])),
    ("sparse", lambda r: seconds(r["sparse"])),
    ("±", lambda r: _percent(r["spread"])),
    ("share of the bound", lambda r: _percent(r["share"])),
    ("a search costs more", lambda r: f"{r['search_more']:.1%}"),
)
_POLICIES: tuple[_Column, ...] = (
    ("policy", lambda r: r["policy"]),
    ("tokens", lambda r: str(r["tokens"])),
    ("steps", lambda r: str(r["steps"])),
    ("density of sparse steps", lambda r: f"{r['density']:.3f}"),
    ("dense", lambda r: seconds(r["dense"])),
    ("sparse", lambda r: seconds(r["seconds"])),
    ("±", lambda r: _percent(r["spread"])),
    ("speed-up", lambda r: _times(r["speedup"])),
    ("FLOP bound", lambda r: _times(r["bound"])),
    ("share", lambda r: _percent(r["share"])),
)
_TABLES: dict[str, tuple[tuple[str, tuple[_Column, ...]], ...]] = {
    "sites": (("One attention site, every way of computing it", _SITE),),
    "variants": (("The same beside text, padded, with guidance, with grouped queries", _SITE),),
    "sweep": (("From tiny to large sites", _PAIR),),
    "growth": (("One site at 2 to 12 times the horizon", _PAIR),),
    "model": (("A Wan-shaped transformer, one denoising step", _MODEL), ("The same: memory, error, compiling", _MODEL_BESIDE_TIME)),
    "blocks": (("Attention over chosen blocks", _BLOCKS),),
    "policies": (("A Wan-shaped transformer at its training length, all steps of a video", _POLICIES),),
    "watching": (("What following a forward costs", _WATCHING),),
    "overheads": (("Costs beside attention", _OVERHEADS),),
}


def tables(results: dict[str, Any]) -> list[Shown]:
    """The tables of each part that was measured, and one of the summary."""
    shown = []
    for part, described in _TABLES.items():
        rows = results.get(part, [])
        for title, columns in described if rows else ():
            headings = tuple(heading for heading, _ in columns)
            if columns is _SITE:
                for site, members in itertools.groupby(rows, _site_and_dtype):
                    shown.append(Shown(part, f"{title}: {site}", headings, _cells(columns, members)))
            else:
                shown.append(Shown(part, title, headings, _cells(columns, (row for row in rows if row.get("chosen", True)))))
    if results.get("summary"):
        figures = tuple((name, f"{value:.3g}") for name, value in results["summary"].items())
        shown.append(Shown("summary", "In short", ("figure", "value"), figures))
    return shown


def _cells(columns: tuple[_Column, ...], rows: Iterable[Row]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(text(row) for _, text in columns) for row in rows)
