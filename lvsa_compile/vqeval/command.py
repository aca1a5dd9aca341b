"""``lvsa vqeval``: scores of videos as a table, JSON, CSV and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from lvsa_compile.errors import VideoQualityError

if TYPE_CHECKING:
    from lvsa_compile.vqeval.batch import Result
    from lvsa_compile.vqeval.clip import Clip
    from lvsa_compile.vqeval.comparison import Difference

SCORES = ("composite", "spatial", "temporal", "loop", "artefacts", "dynamics", "text")


def vqeval(
    paths: Annotated[list[Path], typer.Argument(help="Videos, folders of videos, or a CSV of paths.", show_default=False)],
    against: Annotated[list[Path] | None, typer.Option(help="A second set, compared with the first; repeat for more of it.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the videos should show.")] = None,
    weights: Annotated[
        str, typer.Option(help="Weights of the composite: default, paper (without temporal coherence), or such as loop=1,dynamics=0.5.")
    ] = "default",
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP model; nothing is downloaded.")] = None,
    dinov2: Annotated[Path | None, typer.Option(help="Folder of a DINOv2 model.")] = None,
    pyiqa: Annotated[Path | None, typer.Option(help="Folder with pyiqa's files of parameters for BRISQUE and NIQE.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all that was measured into this file.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write a row per video into this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with frames, distances and motion.")] = None,
) -> None:
    """Whether videos stay alive: six dimensions from 0 to 100, with no pretrained network but those whose folders are given.

    Exit code 1 where a video cannot be read.
    """
    try:
        from lvsa_compile.vqeval import batch, comparison, page
        from lvsa_compile.vqeval.networks import NONE
        from lvsa_compile.vqeval.scores import weights_of
    except ImportError as error:
        raise VideoQualityError("vqeval", error.name or str(error), "is not installed", "pip install 'lvsa-compile[vqeval]'") from None
    chosen = _numbers(weights) if "=" in weights else weights
    weights_of(chosen)
    for file in (json_file, csv_file, html):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise typer.BadParameter(f"{str(file)!r} is a folder, or in one that does not exist. Give the path of a file.")
    networks = NONE
    if clip or dinov2 or pyiqa:
        from lvsa_compile.vqeval.loading import load_networks

        networks = load_networks(clip=clip, dinov2=dinov2, pyiqa=pyiqa)
    sets = [batch.videos_of(paths), batch.videos_of(against or [])]
    pictures: dict[str, page.Pictures] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("videos", total=sum(map(len, sets)))

        def seen(path: Path, seen_clip: Clip | None, result: Result) -> None:
            if html is not None and seen_clip is not None and result.scores is not None:
                pictures[str(path)] = page.pictures_of(seen_clip)
            progress.advance(task)

        results = [batch.evaluated(videos, prompt, chosen, networks, seen) for videos in sets]
    scores = [[result.scores for result in group if result.scores is not None] for group in results]
    differences = comparison.compared(*scores) if against else []
    both = [*results[0], *results[1]]
    for file, text in ((json_file, batch.as_json(both)), (csv_file, batch.as_csv(both))):
        if file is not None:
            file.write_text(text, encoding="utf-8")
    if html is not None:
        page.write_page(html, both, pictures, differences)
    _show(both, differences)
    if any(result.error for result in both):
        raise typer.Exit(1)


def _numbers(given: str) -> dict[str, float]:
    """Weights such as ``loop=1,dynamics=0.5``."""
    found = {}
    for part in given.split(","):
        name, _, number = part.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise VideoQualityError("weights", part, "not a dimension and its weight", "Give weights such as loop=1,text=1.") from None
    return found


def _show(results: Sequence[Result], differences: Sequence[Difference]) -> None:
    console = Console()
    console = console if console.is_terminal else Console(width=max(console.width, 160))
    table = Table("video", *SCORES)
    table.columns[0].overflow = "fold"
    for result in results:
        values = [getattr(result.scores, name, None) for name in SCORES]
        table.add_row(Text(result.path), *("–" if value is None else f"{value:.1f}" for value in values))
    console.print(table)
    for result in results:
        if result.error:
            console.print(Text(result.error), soft_wrap=True)
    if differences:
        table = Table("the second set beside the first", "first", "second", "difference", "95 % interval")
        for found in differences:
            sure = f"{found.interval[0]:+.1f} to {found.interval[1]:+.1f}" if found.interval else "too few videos"
            table.add_row(found.name, f"{found.first:.1f}", f"{found.second:.1f}", f"{found.second - found.first:+.1f}", sure)
        console.print(table)
    for name, why in _reasons(results).items():
        console.print(Text(f"{name} – : {why}"), style="dim")
    if any(result.scores is not None for result in results):
        console.print("The composite is no test of life, since a frozen video is clean and coherent: read loop and dynamics.", style="dim")


def _reasons(results: Sequence[Result]) -> dict[str, str]:
    """Why scores are missing, by name, as of the first video that misses them."""
    found: dict[str, str] = {}
    for scores in (result.scores for result in results if result.scores is not None):
        for name in SCORES[1:]:
            if getattr(scores, name) is None:
                whys = [why for metric, why in scores.missing.items() if metric.startswith(f"{name}.")]
                found.setdefault(name, whys[0] if whys else scores.missing.get(name, ""))
        if scores.composite is None:
            found.setdefault("composite", "no dimension that counts could be computed")
    return found
