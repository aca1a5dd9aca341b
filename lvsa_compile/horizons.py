"""How many latent frames known models were trained on: the only table of this package that knows model classes.

A row is a class name, a question about the model's settings and the horizon in latent frames as the transformer sees them (after
temporal patchify).  The first row whose question is answered with yes wins; where a question cannot be answered the horizon is unknown,
never that of the next row.  The option ``reference_frames`` beats the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class Unreadable(Exception):
    """A setting of a model that cannot be read; its text names the setting."""


Read = Callable[[Sequence[str]], Any]
"""Gives the value of a setting that goes by any of some names.

Raises:
    Unreadable: no config and no attribute of the model has it, or two say different things.
"""


def _always(read: Read) -> bool:
    return True


def _is(number: int, *names: str) -> Callable[[Read], bool]:
    def asks(read: Read) -> bool:
        value = read(names)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Unreadable(" or ".join(names))
        return value == number

    return asks


def _has(name: str) -> Callable[[Read], bool]:
    def asks(read: Read) -> bool:
        try:
            read((name,))
        except Unreadable:
            return False
        return True

    return asks


def _in_pairs(read: Read) -> bool:
    return bool(read(("patch_size_t",)) == 2)  # None: each frame by itself


def _has_learnable_positions(read: Read) -> bool:
    return bool(read(("extra_pos_embed_type",)) == "learnable")


@dataclass(frozen=True)
class HorizonRow:
    """One row; ``seed`` says where the number comes from, ``applies`` asks the settings of a model."""

    class_name: str
    frames: int
    seed: str
    applies: Callable[[Read], bool] = _always


_LVSA = "arXiv 2605.31057"
_DEFAULT = "default length of the diffusers pipeline"
_RELEASED = "the length of its release"
_CHANNELS = ("in_channels", "in_dim")


def _is_wan_5b(read: Read) -> bool:
    """By the channels that come in, or that come out where conditions are concatenated to what comes in."""
    if _is(48, *_CHANNELS)(read):
        return True
    try:
        return _is(48, "out_channels", "out_dim")(read)
    except Unreadable:
        return False


HORIZONS = (
    HorizonRow("WanTransformer3DModel", 31, f"Wan 2.2 TI2V 5B, 121 video frames: {_LVSA}", _is_wan_5b),
    HorizonRow("WanTransformer3DModel", 21, f"Wan 2.1 and 2.2 A14B, 81 video frames: {_LVSA}"),
    HorizonRow("WanVACETransformer3DModel", 21, "Wan 2.1 VACE, 81 video frames, as Wan 2.1"),
    HorizonRow("WanAnimateTransformer3DModel", 20, f"Wan 2.2 Animate, 77 video frames: {_DEFAULT}"),
    HorizonRow("WanModel", 25, f"SkyReels-V2, 97 video frames: {_RELEASED}", _has("inject_sample_info")),
    HorizonRow("WanModel", 31, f"Wan 2.2 TI2V 5B, 121 video frames: {_LVSA}", _is_wan_5b),
    HorizonRow("WanModel", 21, f"Wan 2.1 and 2.2 A14B, 81 video frames: {_LVSA}"),
    HorizonRow("VaceWanModel", 21, "Wan 2.1 VACE, 81 video frames, as Wan 2.1"),
    HorizonRow("CausalWanModel", 21, "Self-Forcing, 21 latent frames as Wan 2.1"),
    HorizonRow("WanAnimateModel", 20, "Wan 2.2 Animate, 77 video frames, as in diffusers"),
    HorizonRow("AnimateWanModel", 20, "Wan 2.2 Animate, 77 video frames, as in diffusers"),
    HorizonRow("AnyFlowTransformer3DModel", 21, f"81 video frames: {_DEFAULT}"),
    HorizonRow("ChronoEditTransformer3DModel", 21, f"81 video frames: {_DEFAULT}"),
    HorizonRow("SkyReelsV2Transformer3DModel", 25, f"97 video frames: {_DEFAULT}"),
    HorizonRow("HunyuanVideoTransformer3DModel", 33, f"129 video frames: {_LVSA}"),
    HorizonRow("HunyuanVideo15Transformer3DModel", 33, f"129 video frames: {_LVSA}"),
    HorizonRow("HYVideoDiffusionTransformer", 33, f"HunyuanVideo, 129 video frames: {_LVSA}"),
    HorizonRow("HunyuanVideo_1_5_DiffusionTransformer", 33, f"129 video frames: {_LVSA}"),
    HorizonRow("HunyuanVideo", 33, f"129 video frames: {_LVSA}"),
    HorizonRow("HunyuanVideoFramepackTransformer3DModel", 9, f"chunks of 9 latent frames: {_DEFAULT}"),
    HorizonRow("HunyuanVideoTransformer3DModelPacked", 9, "FramePack, chunks of 9 latent frames, as in diffusers"),
    HorizonRow("CogVideoXTransformer3DModel", 11, "CogVideoX 1.5, 81 frames in pairs", _in_pairs),
    HorizonRow("CogVideoXTransformer3DModel", 13, f"CogVideoX, 49 video frames: {_LVSA}"),
    HorizonRow("ConsisIDTransformer3DModel", 13, f"49 video frames: {_DEFAULT}"),
    HorizonRow("CosmosTransformer3DModel", 16, f"Cosmos 1, 121 video frames: {_DEFAULT}", _has_learnable_positions),
    HorizonRow("CosmosTransformer3DModel", 24, f"Cosmos 2 and 2.5, 93 video frames: {_DEFAULT}"),
    HorizonRow("GeneralDIT", 16, "Cosmos 1, 121 video frames, as in diffusers"),
    HorizonRow("MiniTrainDIT", 24, "Cosmos-Predict 2, 93 video frames, as in diffusers"),
    HorizonRow("Cosmos3OmniTransformer", 48, f"189 video frames: {_LVSA}"),
    HorizonRow("LTXVideoTransformer3DModel", 21, f"161 video frames: {_DEFAULT}"),
    HorizonRow("LTXVModel", 21, "LTX-Video, 161 video frames, as in diffusers", _is(128, *_CHANNELS)),
    HorizonRow("Transformer3DModel", 21, "LTX-Video, 161 video frames, as in diffusers", _is(128, *_CHANNELS)),
    HorizonRow("LTX2VideoTransformer3DModel", 16, f"121 video frames: {_DEFAULT}"),
    HorizonRow("LTXAVModel", 16, "LTX-2, 121 video frames, as in diffusers"),
    HorizonRow("LTXModel", 16, "LTX-2, 121 video frames, as in diffusers"),
    HorizonRow("MochiTransformer3DModel", 28, "163 video frames, the length Mochi 1 was released with"),
    HorizonRow("AsymmDiTJoint", 28, "163 video frames, the length Mochi 1 was released with"),
    HorizonRow("AllegroTransformer3DModel", 22, f"88 video frames: {_DEFAULT}"),
    HorizonRow("EasyAnimateTransformer3DModel", 13, f"49 video frames: {_DEFAULT}"),
    HorizonRow("Kandinsky5Transformer3DModel", 31, f"121 video frames: {_DEFAULT}"),
    HorizonRow("MotifVideoTransformer3DModel", 31, f"121 video frames: {_DEFAULT}"),
    HorizonRow("HeliosTransformer3DModel", 9, f"chunks of 33 video frames: {_DEFAULT}"),
    HorizonRow("MMDiTModel", 33, f"Open-Sora 2, 129 video frames: {_RELEASED}"),
    HorizonRow("OpenSoraT2V_v1_3", 24, f"Open-Sora-Plan 1.3, 93 video frames: {_RELEASED}"),
    HorizonRow("OpenSoraT2V_v1_5", 16, f"Open-Sora-Plan 1.5, 121 video frames, eight to a latent frame: {_RELEASED}"),
    HorizonRow("StepVideoModel", 36, f"Step-Video-T2V, 204 video frames, 17 to 3 latent frames: {_RELEASED}"),
    HorizonRow("LongCatVideoTransformer3DModel", 24, f"93 video frames: {_RELEASED}"),
    HorizonRow("LongCatTransformer3DModel", 24, f"LongCat-Video, 93 video frames: {_RELEASED}"),
    HorizonRow("MiniMaxH3Transformer3DModel", 107, "MiniMax-H3, 15 seconds in 362 video frames, 17 to 5 latent frames: sglang#37480"),
)


_BY_CLASS = {name: tuple(row for row in HORIZONS if row.class_name == name) for name in {row.class_name for row in HORIZONS}}


def rows_of(class_name: str) -> tuple[HorizonRow, ...]:
    """The rows for a class, in order."""
    return _BY_CLASS.get(class_name, ())


def rows_of_class(kind: type) -> tuple[HorizonRow, ...]:
    """The rows for a class, or for the nearest class that it derives from."""
    return next((rows for base in kind.__mro__ if (rows := rows_of(base.__name__))), ())


def horizon_of(rows: Sequence[HorizonRow], read: Read) -> HorizonRow | None:
    """The first of ``rows`` whose question the settings answer with yes.

    Raises:
        Unreadable: a question comes first that cannot be answered.
    """
    return next((row for row in rows if row.applies(read)), None)
