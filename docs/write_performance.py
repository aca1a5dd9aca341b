"""Writes ``performance.md`` from what ``lvsa bench --output`` wrote: ``python docs/write_performance.py``."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from lvsa_compile.bench.plot import plot
from lvsa_compile.bench.tables import Shown, tables

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "benchmarks/results"

HEAD = """# Performance

Written by `python docs/write_performance.py` from the files in `benchmarks/results/`. Measure your own machine with `lvsa bench`; quiet,
and with as many threads as you mean to use.

* The **FLOP bound** is the speed-up that counting kept pairs of tokens allows, if each took as long as in dense attention.
* The **share** is the speed-up over the bound. More than 100 % means that a kept pair takes less time than in dense attention.
* Contenders run in turn within one process, in reversed order every other round. Times are medians, ± is the distance of the quartiles
  over the median, a speed-up is the ratio of the medians of its row.
* **Temporaries** are the most memory held at once beside inputs and output, over that of query, key, value and output together. On the CPU
  they are counted by the operating system.
* The **worst error** is the largest difference from float64 relative to the largest value, over 512 rows of each head for a site and over
  the whole output for a model; of sparse attention from sparse attention, of dense from dense.
* `FlexAttention` is compiled with the same mask. `gather per frame` is the loop that the reference implementation of LVSA runs.
"""

SECTIONS = {
    "summary": ("In short", ""),
    "model": (
        "End to end",
        "One denoising step of a transformer shaped as Wan 2.1 1.3B, with 2 of 30 layers and 4 of 12 heads, 96 tokens per latent frame\n"
        'and a horizon of 21 latent frames, compiled with `backend="inductor"` and `backend="lvsa"`. At the horizon they are the same.',
    ),
    "sites": ("Attention by itself", "Frames × tokens per frame, heads × head dim; `[B, S, heads, head_dim]` in memory, as in models."),
    "variants": ("Beside text, padded, with guidance, with grouped queries", ""),
    "sweep": (
        "From tiny to large sites",
        "`over dense` is the time over that of dense attention. Where the pattern is full, dense attention is what runs.",
    ),
    "growth": ("Growth with frames", ""),
    "blocks": (
        "Blocks that are chosen",
        "Attention over key blocks that are kept at random, other numbers of them in each head, beside dense attention of torch. A search\n"
        "attends everything and finds the mass of all blocks: what that costs more than the same kernel without it.",
    ),
    "policies": (
        "Whole videos at the training length",
        "All denoising steps of a video by a model shaped as above, dense and with policies that choose blocks ([policies](policies.md)).\n"
        "The bound counts dense steps, searches and the blocks that were kept. LoSA has a threshold of 0.5, since random weights spread\n"
        "attention over all keys.",
    ),
    "watching": (
        "Following a forward",
        "A forward whose blocks are compiled one by one, and one that is wholly eager, against the same that nobody follows.\n"
        "All are dense and short: the cost is that of each op of the model's own code, whatever the sizes. `more` is the median\n"
        "of the differences of pairs.",
    ),
    "overheads": ("Costs beside attention", ""),
}  # fmt: skip


def performance_page() -> str:
    """The page, from all committed results of ``lvsa bench``."""
    found = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    return "\n".join([HEAD, *("\n".join(_machine(path, results)) for path, results in found.items() if "machine" in results)])


def _machine(path: Path, results: dict[str, Any]) -> list[str]:
    facts = ", ".join(f"{name} {value}" for name, value in (results["machine"] | results["versions"]).items())
    lines = [f"## {results['machine'].get('accelerator') or results['machine']['processor']}", "", f"{facts}.", ""]
    lines += [*(f"    {command}" for command in results["commands"]), ""]
    by_part = {part: list(shown) for part, shown in itertools.groupby(tables(results), lambda table: table.part)}
    for part, (title, text) in SECTIONS.items():
        if part in by_part:
            lines += [f"### {title}", "", *([text, ""] if text else []), *_tables(by_part[part])]
        if part == "model" and "model" in by_part:
            lines += [f"![Seconds per denoising step against latent frames](pictures/{_picture(path).name})", ""]
    return lines


def _tables(shown: list[Shown]) -> list[str]:
    return [line for table in shown for line in (*([f"{table.title}", ""] if len(shown) > 1 else []), table.to_markdown(), "")]


def _picture(path: Path) -> Path:
    return FOLDER / "pictures" / f"{path.stem}_time_against_frames.svg"


def main() -> None:
    """Writes the page and its pictures."""
    (FOLDER / "performance.md").write_text(performance_page())
    for path in sorted(RESULTS.glob("*.json")):
        results = json.loads(path.read_text())
        if results.get("model"):
            _picture(path).parent.mkdir(exist_ok=True)
            plot(results, _picture(path))


if __name__ == "__main__":
    main()
