"""The report as one self-contained page: no network, everything printed is escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2

from lvsa_compile.passes.compilation import Segments
from lvsa_compile.policies.contract import Plan
from lvsa_compile.policies.picture import picture_of
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
            _pattern(plan, [site for site in sites if site.plan is not None and _picture_key(site.plan) == key])
            for key, plan in {_picture_key(site.plan): site.plan for site in sites if site.plan is not None}.items()
        ],
        layouts=_layouts(sites),
        blocks=_blocks(sites),
        trails=_trails(sites),
        passed_over=list(dict.fromkeys(pair for site in report.sparse_sites for pair in site.passed_over)),
    )


def _picture_key(plan: Plan) -> object:
    """What tells two pictures apart."""
    return (plan.frames, plan.rows) if plan.frames is not None else plan


def _pattern(plan: Plan, sites: Sequence[SiteReport]) -> dict[str, Any]:
    """The picture of a plan, turn by turn: columns that all attend, and from where to where each query block attends others."""
    picture = picture_of(plan)
    interval = getattr(plan.frames, "interval", 0)
    of = f"{picture.columns} latent frames" if picture.of_frames else f"policy {plan.policy.name!r}"
    turning = f"; anchors every {interval or '–'} frames" if picture.of_frames else ""
    count = len(picture.views)
    of_heads = {"head": f"{count} heads", "step × head": f"{count} views, step by step all heads"}
    phases = of_heads.get(picture.turns, f"{count} {'phase' if count == 1 else 'phases'} of the rotation")
    return {
        "title": f"{'Frame pattern' if picture.of_frames else 'Pattern'} of {len(sites)} {'site' if len(sites) == 1 else 'sites'}",
        "text": f"{of}; density {plan.density:.3f}{turning}, {phases}.",
        "turns": picture.turns,
        "columns": picture.columns,
        "phases": [[list(view.shared), [list(map(list, runs)) for runs in view.own]] for view in picture.views],
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
            "text": ", ".join(label for _, label, _ in segments),
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
        alike.setdefault(tuple((site.name.removeprefix(name), site.text) for site in members), []).append(name)
    return [
        {
            "name": together(names, "blocks"),
            "alike": len(names),
            "sites": blocks[names[0]],
            "text": ", ".join(f"{count} {what}" for what, count in Counter(s.reason or s.decision for s in blocks[names[0]]).items()),
        }
        for names in alike.values()
    ]


def _block_of(name: str) -> str:
    """The path of a site up to the number of its block: blocks.3 of blocks.3.attn1."""
    parts = name.split(".")
    numbered = [position for position, part in enumerate(parts) if part.isdigit() or part == "*"]
    return ".".join(parts[: numbered[0] + 1]) if numbered else parts[0]


def _trails(sites: Iterable[SiteReport]) -> list[dict[str, Any]]:
    """A trail for each outcome, and for each op where one was lost; those that were lost first."""
    found: dict[tuple[str, str], SiteReport] = {}
    for site in sites:
        if site.trail:
            last = site.trail[-1]
            found.setdefault((site.reason, last.source if last.lost else ""), site)
    order = sorted(found.values(), key=lambda site: not site.trail[-1].lost)[:_TRAILS_SHOWN]
    return [{"title": f"{site.name}: {site.reason or site.decision}", "steps": site.trail, "lost": site.trail[-1].lost} for site in order]
