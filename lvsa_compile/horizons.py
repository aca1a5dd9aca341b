"""How many latent frames known models were trained on: the only table of this package that knows model classes.

A row is a class name, a predicate on the model's config and the horizon in latent frames as the transformer sees them (after
temporal patchify).  The first row that fits wins; the option ``reference_frames`` beats the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


def _any(config: Config) -> bool:
    return True


@dataclass(frozen=True)
class HorizonRow:
    """One row; ``seed`` says where the number comes from."""

    class_name: str
    frames: int
    seed: str
    applies: Callable[[Config], bool] = _any


_LVSA = "arXiv 2605.31057"
_DEFAULT = "default length of the diffusers pipeline"

HORIZONS = (
    HorizonRow("WanTransformer3DModel", 31, f"Wan 2.2 TI2V 5B, 121 video frames: {_LVSA}", lambda config: config.get("in_channels") == 48),
    HorizonRow("WanTransformer3DModel", 21, f"Wan 2.1 and 2.2 A14B, 81 video frames: {_LVSA}"),
    HorizonRow("WanVACETransformer3DModel", 21, "Wan 2.1 VACE, 81 video frames, as Wan 2.1"),
    HorizonRow("WanAnimateTransformer3DModel", 20, f"Wan 2.2 Animate, 77 video frames: {_DEFAULT}"),
    HorizonRow("ChronoEditTransformer3DModel", 21, f"81 video frames: {_DEFAULT}"),
    HorizonRow("SkyReelsV2Transformer3DModel", 25, f"97 video frames: {_DEFAULT}"),
    HorizonRow("HunyuanVideoTransformer3DModel", 33, f"129 video frames: {_LVSA}"),
    HorizonRow("HunyuanVideo15Transformer3DModel", 33, f"129 video frames: {_LVSA}"),
    HorizonRow("HunyuanVideoFramepackTransformer3DModel", 9, f"chunks of 9 latent frames: {_DEFAULT}"),
    HorizonRow("CogVideoXTransformer3DModel", 11, "CogVideoX 1.5, 81 frames in pairs", lambda config: config.get("patch_size_t") == 2),
    HorizonRow("CogVideoXTransformer3DModel", 13, f"CogVideoX, 49 video frames: {_LVSA}"),
    HorizonRow("ConsisIDTransformer3DModel", 13, f"49 video frames: {_DEFAULT}"),
    HorizonRow("Cosmos3OmniTransformer", 48, f"189 video frames: {_LVSA}"),
    HorizonRow("LTXVideoTransformer3DModel", 21, f"161 video frames: {_DEFAULT}"),
    HorizonRow("LTX2VideoTransformer3DModel", 16, f"121 video frames: {_DEFAULT}"),
    HorizonRow("MochiTransformer3DModel", 28, "163 video frames, the length Mochi 1 was released with"),
    HorizonRow("AllegroTransformer3DModel", 22, f"88 video frames: {_DEFAULT}"),
    HorizonRow("EasyAnimateTransformer3DModel", 13, f"49 video frames: {_DEFAULT}"),
    HorizonRow("Kandinsky5Transformer3DModel", 31, f"121 video frames: {_DEFAULT}"),
    HorizonRow("HeliosTransformer3DModel", 9, f"chunks of 33 video frames: {_DEFAULT}"),
)


def horizon_of(class_name: str, config: Config | None) -> HorizonRow | None:
    """The first row for a class that fits its config; a model with no config fits only a class with a single row."""
    rows = [row for row in HORIZONS if row.class_name == class_name]
    if config is None:
        return rows[0] if len(rows) == 1 else None
    return next((row for row in rows if row.applies(config)), None)
