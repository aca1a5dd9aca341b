"""What an accelerator is, and whether there is one."""

from __future__ import annotations

import contextlib

import torch


def device_target(device: torch.device) -> str:
    """ "cuda:90", "hip:gfx942": what kernels are compiled for on a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return f"hip:{properties.gcnArchName.split(':')[0]}" if torch.version.hip else f"cuda:{properties.major * 10 + properties.minor}"


def random_state_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Surroundings that leave the random states of the CPU and of a device as they were."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def why_no_gpu(device: torch.device) -> str | None:
    """Why a device is no GPU that kernels of ours or of torch's flash attention run on, or None.  ROCm calls itself cuda, too."""
    if device.type != "cuda":
        return f"it runs on cuda, not on {device.type}"
    if not torch.cuda.is_available():
        return "no device of this kind is here"
    if not torch.version.hip and torch.cuda.get_device_properties(device).major < 8:
        return f"it needs compute capability 8.0, {torch.cuda.get_device_properties(device).name} has less"
    return None
