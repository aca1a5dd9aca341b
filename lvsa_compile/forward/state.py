"""What an attention op keeps from step to step: a tensor for each site, with an entry for each video in progress and guidance branch.

Which video a call belongs to and whether it begins is known on the device only, so entries are chosen and zeroed there: nothing is asked
of the host, and every tensor stays at its address.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import torch
from torch import Tensor

from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.policies.contract import State

BRANCHES = 4
"""Guidance branches of a denoising step that have state: three, and one for further calls, which is zero each time."""
VIDEOS = 2
"""Videos in progress that a model keeps state for; a third takes the entries of the one that was not called for longest."""
CALLERS = 256
"""Callers (threads, and sizes of video in each) that one model's clock tells apart before it begins anew."""

_everywhere: weakref.WeakSet[States] = weakref.WeakSet()


class States:
    """The state of one model: tensors ``[VIDEOS * BRANCHES, *shape]``."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[Hashable, State, torch.device], Tensor] = {}
        self._explicit: Tensor | None = None  # float32 [2 * CALLERS, 2]: by video, the last explicit step and the calls in it
        self._videos: Tensor | None = None  # int64 [VIDEOS]: whose entries these are, -1 for nobody's
        self._called: Tensor | None = None  # int64 [VIDEOS]: when they were used last
        self._calls = 0
        _everywhere.add(self)

    def of(self, site: Hashable, state: State, device: torch.device) -> Tensor:
        """The tensor of a site; zeros where it is new."""
        key = (site, state, device)
        if key not in self._tensors:
            with torch.inference_mode(False):
                self._tensors[key] = torch.zeros((VIDEOS * BRANCHES, *state.shape), dtype=state.dtype, device=device)
        return self._tensors[key]

    def enter(self, video: Tensor, begins: Tensor, calls: Tensor, explicit: int | None) -> Tensor:
        """The entry of a call, an int32 scalar; its video's entries are zero where the video ``begins``.

        Args:
            video: number of the video, int64 ``[1]``; the other tensors are scalars on its device.
            begins: whether the timestep begins a video.
            calls: which call of its step this is by the timestep, from 1.
            explicit: the step that ``lvsa_compile.step`` gives, else None: it tells video and branch instead.
        """
        if self._explicit is None or self._explicit.device != video.device:
            self._explicit = torch.full((2 * CALLERS, 2), float("nan"), device=video.device)
            self._videos = torch.full((VIDEOS,), -1, device=video.device)
            self._called = torch.zeros(VIDEOS, dtype=torch.int64, device=video.device)
        assert self._videos is not None
        assert self._called is not None
        last, before = self._explicit.index_select(0, video)[0].unbind()
        branch = calls.to(before.dtype) - 1
        if explicit is not None:
            branch = torch.where(last == explicit, before + 1, torch.zeros_like(before))
            begins = ~(last <= explicit)
        self._explicit.index_copy_(
            0, video, torch.stack([torch.full_like(last, float("nan") if explicit is None else explicit), branch])[None]
        )
        branch = branch.clamp(max=BRANCHES - 1).long()
        own = self._videos == video
        slot = torch.where(own.any(), own.long().argmax(), self._called.argmin())[None]
        begins = begins | ~own.any()
        self._calls += 1
        self._videos.index_copy_(0, slot, video)
        self._called.index_fill_(0, slot, self._calls)
        numbers = torch.arange(BRANCHES, device=video.device)
        self._zero(slot * BRANCHES + numbers, begins | ((numbers == branch) & (numbers == BRANCHES - 1)))
        return (slot[0] * BRANCHES + branch).to(torch.int32)

    def _zero(self, entries: Tensor, zero: Tensor) -> None:
        """Zeros some entries of every tensor, those for which ``zero`` is true."""
        for tensor in (tensor for (_, state, _), tensor in self._tensors.items() if state.zeroed):
            there = entries.to(tensor.device, non_blocking=True)
            mask = zero.to(tensor.device, non_blocking=True).reshape(-1, *[1] * (tensor.dim() - 1))
            tensor.index_copy_(0, there, tensor.index_select(0, there).masked_fill(mask, 0))

    def begin_anew(self) -> None:
        """Every video begins at its next call."""
        self._explicit = self._videos = self._called = None

    def clear(self) -> None:
        """Gives all tensors up."""
        self._tensors.clear()
        self.begin_anew()


@dropped_on_reset
def _clear_all() -> None:
    for states in list(_everywhere):
        states.clear()
