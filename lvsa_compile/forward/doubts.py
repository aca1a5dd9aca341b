"""The warning where timesteps do not tell the denoising step."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lvsa_compile.errors import LvsaWarning


class Doubts:
    """Warns once where timesteps did not tell the step; on an accelerator as soon as a copy has arrived, so that nothing waits."""

    def __init__(self) -> None:
        self.warned = False
        self._on_its_way: tuple[Tensor, torch.Event] | None = None

    def note(self, doubtful: Tensor) -> None:
        """Takes notice of a call."""
        if self.warned:
            return
        if doubtful.device.type == "cpu":
            self._tell(bool(doubtful))
        elif self._on_its_way is None:
            copy, arrived = doubtful.to("cpu", non_blocking=True), torch.Event(doubtful.device)
            arrived.record()
            self._on_its_way = copy, arrived
        elif self._on_its_way[1].query():
            self._tell(bool(self._on_its_way[0]))
            self._on_its_way = None

    def _tell(self, doubtful: bool) -> None:
        if doubtful:
            self.warned = True
            warnings.warn(DOUBT, LvsaWarning, stacklevel=5)


DOUBT = (
    "lvsa cannot tell the denoising step by the timesteps: they rise inside a video or stay where they are, as where requests take turns, "
    "a sampler adds noise, or frames are denoised one after the other. Wrap each step in `with lvsa_compile.step(i):`, or in diffusers "
    "call lvsa_compile.integrations.diffusers.attach(pipe)."
)
