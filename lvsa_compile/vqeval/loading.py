"""Pretrained networks for the metrics that need one, from folders on this machine: nothing is downloaded, and nothing is unpickled.

CLIP (Radford et al., arXiv 2103.00020) and DINOv2 (Oquab et al., arXiv 2304.07193) come through transformers from folders that hold
``config.json`` and ``model.safetensors``; BRISQUE and NIQE through pyiqa from the ``.mat`` files of parameters that it publishes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F

from lvsa_compile.errors import VideoQualityError, in_a_line
from lvsa_compile.vqeval.clip import Frames, Numbers
from lvsa_compile.vqeval.networks import Images, Networks

CLIP_FOLDER = "a folder with config.json, model.safetensors and the tokenizer of a CLIP model, such as openai/clip-vit-base-patch16"
DINO_FOLDER = "a folder with config.json and model.safetensors of a DINOv2 model, such as facebook/dinov2-base"
PYIQA_FILES = {"brisque": ("brisque_matlab", "brisque_matlab.mat"), "niqe": ("niqe", "niqe_modelparameters.mat")}
PYIQA_FOLDER = f"a folder with {' or '.join(file for _, file in PYIQA_FILES.values())}"
_MEAN_STD = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}  # by which the networks' own images were normalised
_SCALED = {"clip": 1.0, "dinov2": 256 / 224}  # the shorter side over that of what is cut out, as their own processors do it
_AT_ONCE = 16
PYIQA_LEAST_SIDE = 96  # NIQE rates blocks of that size


def load_networks(
    *, clip: str | PathLike[str] | None = None, dinov2: str | PathLike[str] | None = None, pyiqa: str | PathLike[str] | None = None
) -> Networks:
    """Loads networks once, for ``evaluate(..., networks=...)``.

    Args:
        clip: a folder of a CLIP model with its tokenizer.
        dinov2: a folder of a DINOv2 model.
        pyiqa: a folder with pyiqa's ``brisque_matlab.mat`` or ``niqe_modelparameters.mat``, or both.

    Raises:
        VideoQualityError: a folder does not hold what it should, or a package is not installed.
    """
    found: dict[str, Any] = {}
    if clip is not None:
        found |= _clip(_folder("clip", clip, CLIP_FOLDER))
    if dinov2 is not None:
        found |= _dinov2(_folder("dinov2", dinov2, DINO_FOLDER))
    if pyiqa is not None:
        found |= _quality(_folder("pyiqa", pyiqa, PYIQA_FOLDER))
    return Networks(**found)


def _folder(name: str, given: str | PathLike[str], wanted: str) -> Path:
    path = Path(given)
    if not path.is_dir():
        raise VideoQualityError(name, str(given), "there is no such folder", f"Give {wanted}; nothing is downloaded.")
    return path


def _from_folder(name: str, folder: Path, loader: str, wanted: str, **how: Any) -> Any:
    if not (folder / "config.json").is_file():
        raise VideoQualityError(name, str(folder), "has no config.json", f"Give {wanted}.")
    try:
        import transformers

        return getattr(transformers, loader).from_pretrained(folder, local_files_only=True, trust_remote_code=False, **how)
    except ImportError as error:
        raise VideoQualityError(name, str(folder), f"needs {error.name or 'transformers'}", "pip install transformers") from None
    except Exception as error:  # of many kinds, for a folder that holds something else
        raise VideoQualityError(name, str(folder), f"cannot be loaded: {in_a_line(error)}", f"Give {wanted}.") from None


def _dinov2(folder: Path) -> dict[str, Images]:
    model = _from_folder("dinov2", folder, "AutoModel", DINO_FOLDER, use_safetensors=True)
    if not str(model.config.model_type).startswith("dinov2"):
        raise VideoQualityError("dinov2", str(folder), f"a {type(model).__name__} is no DINOv2", f"Give {DINO_FOLDER}.")

    def images(pixels: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = model(pixel_values=pixels).last_hidden_state[:, 0]
        return vectors

    return {"dino_images": functools.partial(_embedded, images, "dinov2", 224)}


def _clip(folder: Path) -> dict[str, Any]:
    model = _from_folder("clip", folder, "AutoModel", CLIP_FOLDER, use_safetensors=True)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features") and hasattr(model, "logit_scale")):
        raise VideoQualityError("clip", str(folder), f"a {type(model).__name__} does not compare images with text", f"Give {CLIP_FOLDER}.")
    tokenizer = _from_folder("clip", folder, "AutoTokenizer", CLIP_FOLDER)
    longest = int(model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def text(prompts: list[str]) -> Numbers:
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return _unit(_pooled(model.get_text_features(**{name: tokens[name] for name in ("input_ids", "attention_mask")})))

    def images(pixels: torch.Tensor) -> torch.Tensor:
        return _pooled(model.get_image_features(pixel_values=pixels))

    size = int(model.config.vision_config.image_size)
    return {
        "clip_images": functools.partial(_embedded, images, "clip", size),
        "clip_text": text,
        "contrast": float(model.logit_scale.detach().exp()),
    }


def _pooled(found: Any) -> torch.Tensor:
    """transformers returns the vectors themselves, or from version 5 on an output that holds them."""
    vectors: torch.Tensor = found if isinstance(found, torch.Tensor) else found.pooler_output
    return vectors


@torch.no_grad()
def _embedded(network: Callable[[torch.Tensor], torch.Tensor], kind: str, size: int, frames: Frames) -> Numbers:
    """Frames as the networks are given images: the shorter side scaled, the middle ``size`` × ``size`` cut out, normalised."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in _MEAN_STD[kind])
    rows, columns = frames.shape[1:3]
    shorter = round(size * _SCALED[kind])
    scaled = [max(shorter, round(side * shorter / min(rows, columns))) for side in (rows, columns)]
    top, left = ((side - size) // 2 for side in scaled)
    found = []
    for begin in range(0, len(frames), _AT_ONCE):
        pixels = torch.from_numpy(frames[begin : begin + _AT_ONCE]).permute(0, 3, 1, 2).float() / 255
        pixels = F.interpolate(pixels, scaled, mode="bicubic", antialias=True).clamp(0, 1)[..., top : top + size, left : left + size]
        found.append(_unit(network((pixels - mean) / std)))
    return numpy.concatenate(found)


def _unit(vectors: torch.Tensor) -> Numbers:
    return numpy.asarray(F.normalize(vectors.float(), dim=-1).numpy(), numpy.float32)


def _quality(folder: Path) -> dict[str, Images]:
    if importlib.util.find_spec("pyiqa") is None:
        raise VideoQualityError("pyiqa", str(folder), "pyiqa is not installed", "pip install pyiqa")
    present = {name: metric for name, (metric, file) in PYIQA_FILES.items() if (folder / file).is_file()}
    if not present:
        raise VideoQualityError("pyiqa", str(folder), "holds none of pyiqa's files", f"Give {PYIQA_FOLDER}; nothing is downloaded.")
    try:
        import pyiqa
        from pyiqa.utils import download_util

        with _reading_from(download_util, folder):
            made = {name: pyiqa.create_metric(metric, device="cpu") for name, metric in present.items()}
    except Exception as error:  # an import of one of its many requirements, or a file that is none
        raise VideoQualityError("pyiqa", str(folder), f"cannot be used: {in_a_line(error)}", f"Give {PYIQA_FOLDER}.") from None
    return {name: functools.partial(_rated, metric) for name, metric in made.items()}


@contextlib.contextmanager
def _reading_from(download_util: Any, folder: Path) -> Iterator[None]:
    """pyiqa looks for the ``.mat`` of BRISQUE in its cache alone; a path that it is given it would unpickle."""
    cache, download_util.DEFAULT_CACHE_DIR = download_util.DEFAULT_CACHE_DIR, str(folder)
    try:
        yield
    finally:
        download_util.DEFAULT_CACHE_DIR = cache


@torch.no_grad()
def _rated(metric: Callable[[torch.Tensor], torch.Tensor], frames: Frames) -> Numbers:
    if min(frames.shape[1:3]) < PYIQA_LEAST_SIDE:
        return numpy.full(len(frames), numpy.nan, numpy.float32)
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return numpy.array([float(metric(picture[None])) for picture in pictures], numpy.float32)
