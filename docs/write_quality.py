"""Writes ``quality.md`` and its pictures from what the quality lab measured: ``python docs/write_quality.py``."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from scipy.stats import spearmanr

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
LAB = ROOT / "examples/quality_lab"
sys.path.insert(0, str(LAB))

from methods import METHODS, TRADE  # noqa: E402
from model import CHECKPOINT, CONFIG, HORIZON  # noqa: E402
from summary import Mean, difference, mean_of  # noqa: E402

MEASURES = {  # name in the results: heading, digits, whether it is a share, shown in percent
    "speed": ("speed", 2, False),
    "net_speed": ("net speed", 2, False),
    "late_speed": ("late speed", 2, False),
    "acceleration": ("acceleration", 2, False),
    "frozen": ("frozen", 1, True),
    "jumps": ("jumps", 1, True),
    "seen": ("seen", 1, True),
    "alone": ("alone", 1, True),
    "coloured": ("coloured", 1, True),
    "size": ("size", 1, True),
    "turns": ("turns", 2, False),
    "vqeval_loop": ("VQeval loop", 1, False),
    "vqeval_temporal": ("VQeval temporal", 1, False),
}
BETTER = {"net_speed": 1, "frozen": -1, "jumps": -1, "alone": 1, "coloured": 1, "size": -1}
SHOWN = ("speed", "net_speed", "late_speed", "acceleration", "frozen", "jumps", "size", "turns", "vqeval_loop")
PLOTTED = {"truth": "#999999", "dense": "#b4482f", "lvsa": "#1f6f8b", "window only": "#6a9f3a", "riflex": "#c08a2a", "ultravico": "#8a5fa8"}
TITLES = {"net_speed": "net speed, pixels per frame", "frozen": "share of frozen steps", "jumps": "share of jumps"}
PIXEL, GAP, SECONDS_PER_FRAME = 5, 12, 0.125


def load() -> dict[str, Any]:
    """The committed results."""
    results: dict[str, Any] = json.loads((LAB / "results.json").read_text())
    return results


def page(results: dict[str, Any]) -> str:
    """The whole page.

    Raises:
        ValueError: the results are of other weights, or of another horizon, than those that lie here.
    """
    if (results["checkpoint"], results["horizon"]) != (hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest(), HORIZON):
        raise ValueError(f"results.json is of other weights than {CHECKPOINT.name}. Run examples/quality_lab/run.py.")
    multiples = _multiples(results, "lvsa")
    shown = results["shown"]
    again = results.get("again")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(FOLDER), trim_blocks=True, keep_trailing_newline=True)
    return environment.get_template("quality.md.j2").render(
        layers=CONFIG["num_layers"],
        width=CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"],
        horizon=HORIZON,
        seeds=len(results["seeds"]),
        steps=results["steps"],
        methods=METHODS,
        shown_caption=results["captions"][results["seeds"].index(shown["seed"])],
        shown_multiple=shown["multiple"],
        findings=findings(results),
        by_length=_by_length(results),
        all_ways=[(_title(multiple), _all_ways(results, multiple)) for multiple in multiples if multiple in (4, 6)],
        rotation=_differences(results, "lvsa", "lvsa fixed", multiples),
        expansion=_differences(results, "lvsa", "lvsa unexpanded", multiples),
        trade=[(_title(multiple), _trade(results, multiple)) for multiple in _multiples(results, TRADE[0].name)],
        vqeval=_vqeval(results),
        again=_by_length(again, ("dense", "lvsa", "lvsa fixed", "window only")) if again else "",
        again_seeds=len(again["seeds"]) if again else 0,
        again_findings=_again(again) if again else [],
    )


def _title(multiple: int) -> str:
    return f"{multiple}× ({multiple * HORIZON} frames)"


def findings(results: dict[str, Any]) -> list[str]:
    """Sentences that follow from the numbers, whichever way these are."""
    multiples = _multiples(results, "lvsa")
    speeds = [f"{mean_of(results, 'dense', n, 'net_speed').value:.2f} at {n}×" for n in (1, *multiples)]
    kept = [f"{mean_of(results, 'lvsa', n, 'net_speed').value:.2f} at {n}×" for n in multiples]
    true = mean_of(results, "truth", 4, "net_speed").value
    found = [f"Net speed in pixels per frame: dense {', '.join(speeds)}; LVSA {', '.join(kept)}; truth {true:.2f} at 4×."]
    for multiple in multiples:
        names = ("net_speed", "acceleration", "frozen", "jumps", "size", "turns")
        clauses = [_clause(difference(results, "lvsa", "dense", multiple, name), name) for name in names]
        found.append(f"At {multiple}×, LVSA minus dense attention: {'; '.join(clauses)}.")
    for way in ("dense", "lvsa"):
        turns = [f"{difference(results, way, 'truth', n, 'turns').value:+.2f} at {n}×" for n in multiples]
        found.append(f"Turns per 16 frames, {way} minus truth: {', '.join(turns)}.")
    halves = {
        "lvsa fixed": "Anchors that rotate, beside anchors that stay",
        "lvsa unexpanded": "A window that grows past anchors, beside one that does not",
    }
    for other, what in halves.items():
        found.append(f"{what}: {_clear(results, 'lvsa', other, multiples) or 'no clear difference'}.")
    for method in ("window only", "window 1", "anchors only", "riflex", "riflex, next", "ultravico"):
        at = [n for n in _multiples(results, method) if n > 1]
        found.append(f"{method[0].upper()}{method[1:]}, beside LVSA: {_clear(results, method, 'lvsa', at) or 'no clear difference'}.")
    return found


def _again(results: dict[str, Any]) -> list[str]:
    """What another training says of LVSA beside dense attention, and of others beside LVSA."""
    multiples = _multiples(results, "lvsa")
    pairs = (("lvsa", "dense"), ("lvsa", "lvsa fixed"), ("window only", "lvsa"))
    return [f"{way}, beside {other}: {_clear(results, way, other, multiples) or 'no clear difference'}." for way, other in pairs]


def _clause(mean: Mean, name: str) -> str:
    heading, digits, share = MEASURES[name]
    value, low, high = (_signed(number, digits, share) for number in (mean.value, mean.low, mean.high))
    return f"{heading} {value} ({low} to {high}{'' if mean.clear else ', not clear'})"


def _clear(results: dict[str, Any], method: str, other: str, multiples: Sequence[int]) -> str:
    """The measures with a better and a worse in which two ways differ for sure."""
    parts = []
    for multiple in multiples:
        said = []
        for name, way in BETTER.items():
            mean = difference(results, method, other, multiple, name)
            if mean.clear:
                heading, digits, share = MEASURES[name]
                judged = "better" if mean.value * way > 0 else "worse"
                said.append(f"{heading} {_signed(mean.value, digits, share)} ({judged})")
        if said:
            parts.append(f"at {multiple}× {', '.join(said)}")
    return "; ".join(parts)


def _by_length(results: dict[str, Any], methods: Sequence[str] = ("truth", "dense", "lvsa")) -> str:
    rows = []
    for multiple in sorted({run["multiple"] for run in results["runs"]}):
        for method in methods:
            if multiple in _multiples(results, method):
                means = [_mean(mean_of(results, method, multiple, name), name) for name in SHOWN]
                rows.append([f"{multiple}×", method, _kept(results, method, multiple), *means])
    return _table(["length", "way", "pairs kept", *(MEASURES[name][0] for name in SHOWN)], rows)


def _run(results: dict[str, Any], method: str, multiple: int) -> dict[str, Any]:
    return next(run for run in results["runs"] if (run["method"], run["multiple"]) == (method, multiple))


def _kept(results: dict[str, Any], method: str, multiple: int) -> str:
    density = _run(results, method, multiple).get("density")
    return "–" if density is None else f"{density:.2f}"


def _all_ways(results: dict[str, Any], multiple: int) -> str:
    names = (*SHOWN[:6], "seen", "alone", "coloured", *SHOWN[6:])
    rows = []
    for method in ("truth", *(method.name for method in METHODS)):
        means = [_mean(mean_of(results, method, multiple, name), name) for name in names]
        rows.append([method, _kept(results, method, multiple), *means])
    return _table(["way", "pairs kept", *(MEASURES[name][0] for name in names)], rows)


def _differences(results: dict[str, Any], method: str, other: str, multiples: Sequence[int]) -> str:
    names = ("speed", "net_speed", "acceleration", *list(BETTER)[1:], "turns", "vqeval_loop", "vqeval_temporal")
    rows = [[f"{n}×", *(_difference(difference(results, method, other, n, name), name) for name in names)] for n in multiples]
    return _table(["length", *(MEASURES[name][0] for name in names)], rows)


def _trade(results: dict[str, Any], multiple: int) -> str:
    windows = {"anchors only": 0, "lvsa": 3, "window only": HORIZON // 2} | {method.name: method.options["window"] for method in TRADE}
    rows = []
    for method, window in sorted(windows.items(), key=lambda item: item[1]):
        run = _run(results, method, multiple)
        about = f"{window}{', no anchors' if method == 'window only' else ''}"
        means = [_mean(mean_of(results, method, multiple, name), name) for name in SHOWN]
        rows.append([about, str(run["interval"] or "–"), f"{run['density']:.3f}", *means])
    return _table(["window", "interval", "pairs kept", *(MEASURES[name][0] for name in SHOWN)], rows)


def _vqeval(results: dict[str, Any]) -> str:
    """How VQeval's dimensions go with the physics, video by video: over all runs at a length, and within each run, the mean."""
    runs = [run["videos"] for run in results["runs"] if run["multiple"] == results["shown"]["multiple"]]
    asked = (("dynamics", "net_speed"), ("dynamics", "frozen"), ("loop", "net_speed"), ("loop", "frozen"), ("temporal", "jumps"))
    rows = []
    for dimension, measure in asked:
        pairs = [np.array([(video[f"vqeval_{dimension}"], video[measure]) for video in videos]) for videos in runs]
        over_all = spearmanr(np.concatenate(pairs)).statistic
        within = [spearmanr(some).statistic for some in pairs if (np.ptp(some, axis=0) > 0).all()]
        rows.append([dimension, MEASURES[measure][0], f"{over_all:+.2f}", f"{np.mean(within):+.2f}"])
    return _table(["VQeval", "physics", "over all videos", "within a way"], rows)


def _multiples(results: dict[str, Any], method: str) -> list[int]:
    return sorted(run["multiple"] for run in results["runs"] if run["method"] == method)


def _mean(mean: Mean, name: str) -> str:
    _, digits, share = MEASURES[name]
    scale, unit = (100, " %") if share else (1, "")
    return f"{mean.value * scale:.{digits}f}{unit} [{mean.low * scale:.{digits}f}, {mean.high * scale:.{digits}f}]"


def _difference(mean: Mean, name: str) -> str:
    _, digits, share = MEASURES[name]
    text = f"{_signed(mean.value, digits, share)} [{_signed(mean.low, digits, share)}, {_signed(mean.high, digits, share)}]"
    return f"**{text}**" if mean.clear else text


def _signed(value: float, digits: int, share: bool) -> str:
    return f"{value * 100:+.{digits}f} pp" if share else f"{value:+.{digits}f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}", *(f"| {' | '.join(row)} |" for row in rows)])


def videos_picture(results: dict[str, Any]) -> str:
    """An animated SVG: each way's video, and under it every fourth frame."""
    shown = results["shown"]
    frames, side = shown["multiple"] * HORIZON, 16 * PIXEL
    every = range(0, frames, 4)
    width, row = 130 + side + GAP + len(every) * (16 * 2 + 2), side + GAP
    height = row * len(shown["sprites"])
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<title>{results['captions'][results['seeds'].index(shown['seed'])]}, {frames} frames, in each way</title>",
        "<style>svg{font:14px sans-serif}text{fill:#888}image{image-rendering:pixelated}"
        f".play{{animation:play {frames * SECONDS_PER_FRAME:g}s steps({frames}) infinite}}"
        f"@keyframes play{{to{{transform:translateX(-{16 * frames}px)}}}}</style>",
    ]
    for place, (name, sprite) in enumerate(shown["sprites"].items()):
        top = place * row
        lines.append(f'<defs><image id="v{place}" width="{16 * frames}" height="16" href="data:image/png;base64,{sprite}"/></defs>')
        lines.append(f'<text x="0" y="{top + side / 2:g}">{name}</text>')
        box = f'y="{top}" width="{side}" height="{side}" viewBox="0 0 16 16"'
        lines.append(f'<svg x="120" {box}><g class="play"><use href="#v{place}"/></g></svg>')
        for number, frame in enumerate(every):
            left = 120 + side + GAP + number * 34
            box = f'y="{top + side / 2 - 16:g}" width="32" height="32" viewBox="0 0 16 16"'
            lines.append(f'<svg x="{left}" {box}><use href="#v{place}" x="-{16 * frame}"/></svg>')
    return "\n".join([*lines, "</svg>", ""])


def digest(results: dict[str, Any]) -> str:
    """Identity of what is drawn; the picture carries it as its description."""
    drawn = [run for run in results["runs"] if run["method"] in PLOTTED]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def plot_lengths(results: dict[str, Any], path: Path) -> None:
    """Draws net speed, frozen steps and jumps against the length."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "lvsa", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        for axes, name in zip(figure.subplots(1, 3), ("net_speed", "frozen", "jumps"), strict=True):
            for number, (method, colour) in enumerate(PLOTTED.items()):
                at = _multiples(results, method)
                at = [1, *at] if 1 not in at else at
                means = [mean_of(results, method if n > 1 or method == "truth" else "dense", n, name) for n in at]
                errors = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
                style = "--" if method == "truth" else "o-"
                places = [n + 0.03 * number for n in at]
                axes.errorbar(places, [m.value for m in means], errors, fmt=style, color=colour, label=method, markersize=3, linewidth=1.2)
            axes.set(xlabel="length, in horizons", title=TITLES[name], ylim=(0, None))
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].legend(frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None, "Description": digest(results)})


def main() -> None:
    """Writes the page and its pictures."""
    results = load()
    (FOLDER / "quality.md").write_text(page(results))
    (FOLDER / "pictures/quality_videos.svg").write_text(videos_picture(results))
    plot_lengths(results, FOLDER / "pictures/quality_lengths.svg")


if __name__ == "__main__":
    main()
