"""The report as one self-contained page: no network, everything printed is escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2

from lvsa_compile.passes.compilation import Segments
from lvsa_compile.policies.lvsa.frame_pattern import FramePattern
from lvsa_compile.reasons import NOTHING_TO_DO
from lvsa_compile.report.names import together
from lvsa_compile.report.records import GraphReport, SiteReport


class Shown(Protocol):
    """What the page takes of a report."""

    @property
    def options(self) -> dict[str, Any]:
        """Those that are not at their defaults."""

    @property
    def graphs(self) -> tuple[GraphReport, ...]:
        """Those of a forward."""

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """The sites of all graphs."""

    @property
    def sparse_sites(self) -> tuple[SiteReport, ...]:
        """The sites that were rewritten."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""


_COLOURS = {"video": "video", "conditioning": "video", "image": "video", "other": "text", "unknown": "unknown", "contradicted": "unknown"}
_TRAILS_SHOWN = 12


def write_page(report: Shown, path: str) -> None:
    """Writes ``report`` to ``path``; every value is escaped by the template engine."""
    Path(path).write_text(page(report), encoding="utf-8")


def page(report: Shown) -> str:
    """The page's text."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    sites = report.sites
    return environment.get_template("page.html").render(
        report=report,
        nothing_to_do=NOTHING_TO_DO,
        versions=report.to_dict()["versions"],
        clocks=list(dict.fromkeys(graph.clock for graph in report.graphs if graph.clock and graph.sites)),
        specialised=list(dict.fromkeys(what for graph in report.graphs for what in graph.specialised)),
        patterns=[
            _pattern(found, [site for site in sites if site.pattern == found], report.options.get("rotate", True))
            for found in dict.fromkeys(site.pattern for site in sites if site.pattern is not None)
        ],
        layouts=_layouts(sites),
        blocks=_blocks(sites),
        trails=_trails(sites),
        passed_over=list(dict.fromkeys(pair for site in report.sparse_sites for pair in site.passed_over)),
    )


def _pattern(pattern: FramePattern, sites: Sequence[SiteReport], rotate: bool) -> dict[str, Any]:
    """A frame pattern, phase by phase: anchors, and from where to where each frame's window reaches."""
    phases = []
    for phase in range(pattern.phases if rotate else 1):
        anchors = set(pattern.anchors(phase))
        reach = ([f for f in pattern.attended(frame, phase) if f not in anchors] for frame in range(pattern.frames))
        phases.append([sorted(anchors), [[own[0], own[-1]] if own else [0, -1] for own in reach]])
    return {
        "title": f"Frame pattern of {len(sites)} {'site' if len(sites) == 1 else 'sites'}",
        "frames": pattern.frames,
        "density": pattern.density,
        "interval": pattern.interval,
        "phases": phases,
    }


def _layouts(sites: Iterable[SiteReport]) -> list[dict[str, Any]]:
    """Each token layout once, as parts to scale."""
    counts = Counter((site.segments, site.key_segments, site.layout) for site in sites if site.segments)
    return [{"count": count, "text": text, "sequences": _sequences(query, key)} for (query, key, text), count in counts.most_common(20)]


def _sequences(query: Segments, key: Segments) -> list[dict[str, Any]]:
    """The query's sequence, and the key's where it is another, the longer one as wide as there is room."""
    named = {"queries": query, "keys": key} if key else {"queries and keys": query}
    tokens = {name: sum(size for _, _, size in segments) for name, segments in named.items()}
    return [
        {
            "name": name,
            "tokens": tokens[name],
            "said": ", ".join(label for _, label, _ in segments),
            "width": round(100 * tokens[name] / max(*tokens.values(), 1), 2),
            "parts": [
                {"colour": _COLOURS.get(kind, "other"), "size": max(size, 1), "title": label, "label": label if size else ""}
                for kind, label, size in segments
            ],
        }
        for name, segments in named.items()
    ]


def _blocks(sites: Iterable[SiteReport]) -> list[dict[str, Any]]:
    """Sites by the block of the model they are in, blocks that are alike as one, with a line that says what became of them."""
    blocks: dict[str, list[SiteReport]] = {}
    for site in sites:
        blocks.setdefault(_block_of(site.name), []).append(site)
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, members in blocks.items():
        alike.setdefault(tuple((site.name.removeprefix(name), site.said) for site in members), []).append(name)
    return [
        {
            "name": together(names, "blocks"),
            "alike": len(names),
            "sites": blocks[names[0]],
            "said": ", ".join(f"{count} {what}" for what, count in Counter(s.reason or s.decision for s in blocks[names[0]]).items()),
        }
        for names in alike.values()
    ]


def _block_of(name: str) -> str:
    """The path of a site up to the number of its block: blocks.3 of blocks.3.attn1."""
    parts = name.split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdigit() or part == "*"]
    return ".".join(parts[: numbered[0] + 1]) if numbered else parts[0]


def _trails(sites: Iterable[SiteReport]) -> list[dict[str, Any]]:
    """A trail for each outcome, and for each place where one was lost; those that were lost first."""
    found: dict[tuple[str, str], SiteReport] = {}
    for site in sites:
        if site.trail:
            last = site.trail[-1]
            found.setdefault((site.reason, last.source if last.lost else ""), site)
    order = sorted(found.values(), key=lambda site: not site.trail[-1].lost)[:_TRAILS_SHOWN]
    return [{"title": f"{site.name}: {site.reason or site.decision}", "steps": site.trail, "lost": site.trail[-1].lost} for site in order]
