"""Temporal coherence: whether neighbouring frames belong together.  A frozen video is most coherent; see ``dynamics`` and ``loop``."""

from __future__ import annotations

import numpy

from lvsa_compile.vqeval.clip import Clip, Numbers
from lvsa_compile.vqeval.distances import distances_of
from lvsa_compile.vqeval.motion import motion_of
from lvsa_compile.vqeval.networks import NONE, Images, Networks, series_of
from lvsa_compile.vqeval.scores import Dimension, Metric, beside, by_network, ramp

_TILES = 4
_AROUND = 4  # steps on either side that a cut is measured by
_LEAST_CUT = 0.15  # in contrasts
_STANDS_OUT = 1.4  # times the longest of those steps


def temporal(clip: Clip, networks: Networks = NONE) -> Dimension:
    """Flicker of brightness and of CLIP's embeddings, smoothness of motion and warps by VQeval's formulas, consistency, and cuts."""
    flicker = _flicker(clip)
    cuts = _cuts(clip)
    events, pairs = _warps(clip)
    return Dimension(
        "temporal",
        (
            *beside(
                Metric("flicker", 0.25, ramp(flicker, 0.04, 0.002), flicker, "share of full brightness", surrogate=True),
                _clip_flicker(clip, networks),
            ),
            Metric("motion", 0.30, _smoothness(motion_of(clip).series), float(motion_of(clip).series.mean()), "pixels per frame"),
            by_network("subject", 0.20, _alike(clip, networks.dino_images), (0.0, 1.0), "mean cosine", "DINOv2"),
            by_network("background", 0.15, _alike(clip, networks.clip_images), (0.0, 1.0), "mean cosine", "CLIP"),
            Metric("warp", 0.10, ramp(events / pairs, 0.3, 0.0), float(events), f"of {pairs} pairs"),
            Metric("cuts", 0.20, ramp(cuts * 64.0 / clip.count, 3.0, 0.0), float(cuts), "jumps", surrogate=True),
        ),
    )


def _clip_flicker(clip: Clip, networks: Networks) -> Metric:
    """VQeval's: how far CLIP's embeddings of neighbouring frames are apart, and how unevenly."""
    if networks.clip_images is None:
        return by_network("clip_flicker", 0.25, None, (0.15, 0.0), "", "CLIP")
    frames, following = series_of(clip, networks.clip_images)
    apart = 1 - (frames * following).sum(1)
    value = ramp(float(apart.mean()), 0.15, 0.0) - min(20.0, 200 * float(apart.std()))
    return Metric("clip_flicker", 0.25, max(0.0, value), float(apart.mean()), "1 - cosine of neighbours")


def _alike(clip: Clip, network: Images | None) -> float | None:
    """Mean cosine of frames that follow each other among those looked at closely."""
    if network is None:
        return None
    frames, _ = series_of(clip, network)
    return float((frames[1:] * frames[:-1]).sum(1).mean()) if len(frames) > 1 else 1.0


def _flicker(clip: Clip) -> float:
    """How far brightness leaves the line between its neighbours in time, in the worst quarter of the tiles of a frame."""
    rows, columns = (size // _TILES * _TILES for size in clip.grey.shape[1:])
    tiles = clip.grey[:, :rows, :columns].reshape(clip.count, _TILES, rows // _TILES, _TILES, columns // _TILES).mean((2, 4))
    if clip.count < 3:
        return 0.0
    bent = numpy.abs(tiles[1:-1] - (tiles[:-2] + tiles[2:]) / 2).mean(0)
    return float(numpy.sort(bent, axis=None)[-(_TILES**2) // 4 :].mean())


def _smoothness(series: Numbers) -> float:
    """VQeval's motion smoothness, of the mean flow of each pair in pixels per frame."""
    if len(series) < 2:
        return 100.0
    variance, mean = float(series.var()), float(series.mean())
    jerk = float(numpy.abs(numpy.diff(series)).max())
    steady = 1.0 - min(1.0, variance / mean) if mean > 1e-6 else 1.0
    return 0.5 * max(0.0, 100 - 10 * variance) + 0.3 * max(0.0, 100 - 5 * jerk) + 0.2 * 100 * steady


def _warps(clip: Clip) -> tuple[int, int]:
    """Pairs in which a few parts jump while most stay, VQeval's rule on dense flow: the 95th percentile over the median."""
    lengths = motion_of(clip).lengths
    high, middle = (numpy.percentile(lengths, share, axis=(1, 2)) for share in (95, 50))
    return int(((high / numpy.maximum(middle, 1e-3) > 5) & (high > 20)).sum()), len(lengths)


def _cuts(clip: Clip) -> int:
    """Neighbours that are far farther apart than any of the steps before and after them."""
    steps = numpy.diag(distances_of(clip).between, 1)
    found = 0
    for place, step in enumerate(steps):
        around = numpy.concatenate([steps[max(0, place - _AROUND) : place], steps[place + 1 : place + 1 + _AROUND]])
        found += int(len(around) > 0 and step > _LEAST_CUT and step > _STANDS_OUT * around.max())
    return found
