"""Many videos: which a user means, their scores, and what went wrong with those that cannot be read."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvsa_compile.errors import VideoQualityError, in_a_line
from lvsa_compile.vqeval.clip import Clip, is_video, read
from lvsa_compile.vqeval.evaluation import scored
from lvsa_compile.vqeval.networks import NONE, Networks
from lvsa_compile.vqeval.scores import DIMENSIONS, Scores, Weights


@dataclass(frozen=True)
class Result:
    """One video: its scores, or why there are none."""

    path: str
    scores: Scores | None = None
    error: str = ""


def videos_of(paths: Iterable[Path]) -> list[Path]:
    """The files meant by paths of videos, of folders, and of CSV files whose first column, or one named
    ``path``, ``file``, ``filename`` or ``video``, names videos.

    Raises:
        VideoQualityError: a path is none of these, or holds no video.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and is_video(file))
            if not inside:
                raise VideoQualityError("path", str(path), "a folder without a video", "Give a folder of .mp4, .mov, .webm, .avi or .mkv.")
            found += inside
        elif path.suffix.lower() == ".csv" and path.is_file():
            found += _listed(path)
        elif path.is_file():
            found.append(path)
        else:
            raise VideoQualityError("path", str(path), "there is no such file or folder", "Give videos, folders, or a CSV of paths.")
    return list(dict.fromkeys(found))


def _listed(path: Path) -> list[Path]:
    rows = [row for row in csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"))) if row and row[0].strip()]
    column = 0
    if rows and not is_video(Path(rows[0][0])):
        names = [name.strip().lower() for name in rows.pop(0)]
        column = next((names.index(name) for name in ("path", "file", "filename", "video") if name in names), 0)
    listed = [Path(row[column].strip()) for row in rows if len(row) > column]
    if not listed:
        raise VideoQualityError("path", str(path), "a CSV without paths", "Give one path of a video in each line.")
    return [file if file.is_absolute() else path.parent / file for file in listed]


def evaluated(
    paths: Sequence[Path],
    prompt: str | None = None,
    weights: Weights = "default",
    networks: Networks = NONE,
    seen: Callable[[Path, Clip | None, Result], None] = lambda *_: None,
) -> list[Result]:
    """The result of each video; one that cannot be read stops nothing.  ``seen`` is told of each, with its clip."""
    results = []
    for path in paths:
        clip = None
        try:
            clip = read(path)
            result = Result(str(path), scored(clip, prompt, weights, networks))
        except VideoQualityError as error:
            result = Result(str(path), error=str(error))
        except Exception as error:  # of a decoder or of memory: the next video may be well
            result = Result(str(path), error=in_a_line(error))
        results.append(result)
        seen(path, clip, result)
    return results


def as_json(results: Sequence[Result]) -> str:
    """All that is known, as text."""
    return json.dumps([_plain(result) for result in results], indent=1)


def _plain(result: Result) -> dict[str, Any]:
    return dataclasses.asdict(result)


def as_csv(results: Sequence[Result]) -> str:
    """A row per video: the composite, the dimensions, and what went wrong; empty where a score is missing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "composite", *DIMENSIONS, "error"])
    for result in results:
        scores = [getattr(result.scores, name, None) for name in ("composite", *DIMENSIONS)]
        writer.writerow([result.path, *("" if value is None else f"{value:.3f}" for value in scores), result.error])
    return text.getvalue()
