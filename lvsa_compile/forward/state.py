"""What an attention op keeps from step to step: a tensor for each video in progress, site and guidance branch."""

from __future__ import annotations

import collections
from collections.abc import Hashable

import torch
from torch import Tensor

from lvsa_compile.policies.contract import State

BRANCHES = 5
"""Guidance branches of a denoising step that have state of their own: four, and one for further calls, which is zeros each time."""
_VIDEOS = 2
"""Videos in progress that a model keeps state for; of a third the oldest is given up."""

Caller = Hashable
"""A thread and a size of video."""


class States:
    """The state of one model: tensors ``[BRANCHES, *shape]`` that stay at their addresses as long as their video is kept."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[Caller, dict[Hashable, Tensor]] = collections.OrderedDict()

    def of(self, caller: Caller, site: Hashable, state: State, device: torch.device) -> Tensor:
        """The tensor of a site in the video of a caller; zeros where it is new."""
        tensors = self._kept.setdefault(caller, {})
        self._kept.move_to_end(caller)
        while len(self._kept) > _VIDEOS:
            self._kept.popitem(last=False)
        key = (site, state, device)
        if key not in tensors:
            with torch.inference_mode(False):
                tensors[key] = torch.zeros((BRANCHES, *state.shape), dtype=state.dtype, device=device)
        return tensors[key]

    def begin(self, caller: Caller, begins: Tensor | bool, branch: Tensor | int) -> None:
        """Before a forward: everything is zero again where a video ``begins``, and the last entry where ``branch`` is it.

        Both may be scalar tensors: nothing is asked of the device.
        """
        for tensor in self._kept.get(caller, {}).values():
            if isinstance(begins, Tensor):
                tensor.masked_fill_(begins.to(tensor.device, non_blocking=True), 0)
                beyond = torch.as_tensor(branch == BRANCHES - 1).to(tensor.device, non_blocking=True)
                tensor[-1].masked_fill_(beyond, 0)
            elif begins:
                tensor.zero_()
            elif branch == BRANCHES - 1:
                tensor[-1].zero_()

    def adopt(self, caller: Caller, other: Caller, goes_on: Tensor) -> None:
        """The video of ``other`` is that of ``caller`` from now on, where the scalar ``goes_on`` is true."""
        for key, tensor in self._kept.get(other, {}).items():
            own = self._kept.setdefault(caller, {})
            own[key] = torch.where(goes_on.to(tensor.device), tensor, torch.zeros_like(tensor))

    def clear(self) -> None:
        """Gives all of it up."""
        self._kept.clear()
