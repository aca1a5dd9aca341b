"""Artefacts of single frames: banding, tiles, halos and noise."""

from __future__ import annotations

import cv2
import numpy

from lvsa_compile.vqeval.clip import Clip, Frames, Numbers
from lvsa_compile.vqeval.scores import Dimension, Metric, ramp

_BLOCK = 16
_LOOKED_AT = 9
_EDGES = 400


def artefacts(clip: Clip) -> Dimension:
    """VQeval's parts and weights; anatomy needs a network and is missing, never "no errors"."""
    chosen = clip.large_grey[:: max(1, len(clip.large_grey) // _LOOKED_AT), 0]
    measured = {name: float(numpy.median([measure(frame) for frame in chosen])) for name, measure in _MEASURES.items()}
    return Dimension(
        "artefacts",
        (
            Metric("banding", 0.25, ramp(measured["banding"], 0.7, 0.1), measured["banding"], "share of levels left out in smooth parts"),
            Metric("anatomy", 0.25, None, why="needs MediaPipe, which is not used here"),
            Metric("tiling", 0.15, ramp(measured["tiling"], 0.8, 0.1), measured["tiling"], "autocorrelation of detail elsewhere"),
            Metric("halo", 0.15, ramp(measured["halo"], 0.35, 0.05), measured["halo"], "overshoot beside edges, share of the edge"),
            Metric("noise", 0.20, ramp(measured["noise"], 20.0, 2.0), measured["noise"], "standard deviation, of 255"),
        ),
    )


def banding(frame: Frames) -> float:
    """Share of the grey levels between the darkest and the brightest that blocks with a gentle slope leave out."""
    blocks = _blocks(frame)
    low, high = blocks.min(1).astype(int), blocks.max(1).astype(int)
    smooth = (high - low >= 4) & (high - low <= 40)
    rough = numpy.abs(numpy.diff(blocks.reshape(-1, _BLOCK, _BLOCK).astype(int), axis=2)).mean((1, 2))
    smooth &= rough < 3
    if smooth.sum() < 8:
        return 0.0
    left_out = [1 - (len(numpy.unique(block)) - 1) / (block.max() - block.min()) for block in blocks[smooth].astype(int)]
    return float(numpy.mean(left_out))


def tiling(frame: Frames) -> float:
    """The highest peak of the autocorrelation of a frame's detail away from its centre."""
    small = cv2.resize(frame, (256, 256), interpolation=cv2.INTER_AREA).astype(numpy.float32)
    detail = small - cv2.GaussianBlur(small, (0, 0), 6)
    if float(detail.std()) < 1.5:
        return 0.0
    window = numpy.hanning(256)[:, None] * numpy.hanning(256)[None]
    power = numpy.abs(numpy.fft.rfft2(detail * window, (512, 512))) ** 2
    expected = numpy.fft.irfft2(numpy.abs(numpy.fft.rfft2(window, (512, 512))) ** 2)
    found = numpy.fft.irfft2(power) / numpy.maximum(expected, 0.05 * expected.max())
    found = numpy.fft.fftshift(found / found[0, 0])[256 - 120 : 256 + 121, 256 - 120 : 256 + 121]
    rows, columns = numpy.mgrid[-120:121, -120:121]
    found[numpy.hypot(rows, columns) < 16] = -1
    found = found.astype(numpy.float32)
    around = cv2.dilate(found, (numpy.abs(numpy.hypot(*numpy.mgrid[-11:12, -11:12]) - 9.5) < 1.5).astype(numpy.uint8))
    return float((found - numpy.maximum(around, 0)).max())  # what a pattern gives is a peak by itself, what a slope gives is broad


def halo(frame: Frames) -> float:
    """How far brightness shoots over beside the strongest edges, over the height of the edge, the median."""
    grey = cv2.GaussianBlur(frame, (0, 0), 1.0).astype(numpy.float32)
    across, down = (cv2.Sobel(grey, cv2.CV_32F, *order, ksize=3) / 8 for order in ((1, 0), (0, 1)))
    strength = numpy.hypot(across, down)
    strength[:12], strength[-12:], strength[:, :12], strength[:, -12:] = 0, 0, 0, 0
    places = numpy.argsort(strength, axis=None)[::-1][: 20 * _EDGES : 20]
    rows, columns = numpy.unravel_index(places, strength.shape)
    strong = strength[rows, columns] > 4
    if strong.sum() < 20:
        return 0.0
    rows, columns = rows[strong], columns[strong]
    norm = strength[rows, columns]
    normal = numpy.stack([down[rows, columns] / norm, across[rows, columns] / norm])

    def profile(near: int, far: int) -> Numbers:
        """Brightness along the normal, from ``near`` to ``far`` pixels on."""
        along = numpy.arange(near, far + 1)[:, None]
        places = [(at + along * part).astype(numpy.float32) for at, part in zip((rows, columns), normal, strict=True)]
        return numpy.asarray(cv2.remap(grey, places[1], places[0], cv2.INTER_LINEAR), numpy.float32)

    bright_far, dark_far = numpy.median(profile(7, 11), 0), numpy.median(profile(-11, -7), 0)
    height = numpy.maximum(bright_far - dark_far, 1.0)
    over = numpy.maximum(profile(1, 6).max(0) - bright_far, 0) + numpy.maximum(dark_far - profile(-6, -1).min(0), 0)
    clear = height > 15
    return float(numpy.median((over / height)[clear])) / 2 if clear.sum() >= 20 else 0.0


def noise(frame: Frames) -> float:
    """Standard deviation of noise by Immerkær's mask (CVIU 1996), in the smoother half of the blocks."""
    mask = numpy.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], numpy.float32)
    response = numpy.abs(cv2.filter2D(frame.astype(numpy.float32), cv2.CV_32F, mask))
    blocks = _blocks(response).mean(1)
    return float(numpy.sort(blocks)[: max(1, len(blocks) // 2)].mean() * numpy.sqrt(numpy.pi / 2) / 6)


_MEASURES = {"banding": banding, "tiling": tiling, "halo": halo, "noise": noise}


def _blocks(frame: Frames | Numbers) -> Frames | Numbers:
    """``[blocks, pixels of a block]``."""
    rows, columns = (size // _BLOCK * _BLOCK for size in frame.shape)
    cut = frame[:rows, :columns].reshape(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)
    return cut.transpose(0, 2, 1, 3).reshape(-1, _BLOCK * _BLOCK)
