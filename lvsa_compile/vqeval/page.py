"""The results as one self-contained page: frames, the distances of all pairs, motion over time, and bars; everything is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy

from lvsa_compile.vqeval.batch import Result
from lvsa_compile.vqeval.clip import Clip, Frames
from lvsa_compile.vqeval.comparison import Difference
from lvsa_compile.vqeval.distances import distances_of
from lvsa_compile.vqeval.motion import motion_of
from lvsa_compile.vqeval.scores import DIMENSIONS

_FRAMES_SHOWN = 10
_PLOT = (600, 90)


@dataclass(frozen=True)
class Pictures:
    """Of one video, as data URLs, and motion as points of a line."""

    frames: tuple[str, ...]
    distances: str
    motion: str
    fastest: float


def pictures_of(clip: Clip) -> Pictures:
    """Made while the video is in memory."""
    chosen = numpy.linspace(0, clip.count - 1, min(_FRAMES_SHOWN, clip.count)).round().astype(int)
    between = distances_of(clip).between
    grey = (255 * numpy.clip(between / max(float(numpy.percentile(between, 99)), 1e-3), 0, 1)).astype(numpy.uint8)
    coloured = cv2.applyColorMap(cv2.resize(grey, (240, 240), interpolation=cv2.INTER_AREA), cv2.COLORMAP_VIRIDIS)
    series = motion_of(clip).series
    fastest = max(float(series.max()), 1e-6)
    places = numpy.linspace(0, _PLOT[0], len(series)) if len(series) > 1 else numpy.zeros(1)
    points = " ".join(f"{x:.1f},{_PLOT[1] * (1 - y / fastest):.1f}" for x, y in zip(places, series, strict=True))
    shown = tuple(_jpeg(clip.small[place]) for place in chosen)
    return Pictures(shown, _url("png", coloured), points, fastest)


def write_page(path: Path, results: Sequence[Result], pictures: dict[str, Pictures], differences: Sequence[Difference] = ()) -> None:
    """Writes the page; ``pictures`` by the path of the video."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    text = environment.get_template("page.html").render(
        results=results, pictures=pictures, dimensions=DIMENSIONS, differences=differences, plot=_PLOT
    )
    path.write_text(text, encoding="utf-8")


def _jpeg(frame: Frames) -> str:
    return _url("jpeg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 75])


def _url(kind: str, picture: Any, options: Sequence[int] = ()) -> str:
    encoded = cv2.imencode(f".{'jpg' if kind == 'jpeg' else kind}", picture, list(options))[1]
    return f"data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}"
