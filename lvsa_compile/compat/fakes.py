"""Fake tensors and their modes; trial runs that leave nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode


def fake_like(tensor: Tensor, fake_mode: Any, device: torch.device | None = None) -> Tensor:
    """A fake tensor with the metadata of ``tensor`` and static sizes, on ``device`` or that of the tensor."""
    with fake_mode:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device or tensor.device)


def static_fake_mode() -> Any:
    """A new fake mode, in which all sizes are numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def tracing_fake_mode() -> Any:
    """The fake mode of the compile in progress, in which the inner compiler traces; None outside a compile."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    return context.fake_mode if context is not None else None


def is_fake(value: object) -> bool:
    """Whether a tensor has no memory and stands for one that has."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def fake_mode_of(tensor: Tensor) -> Any:
    """The fake mode a fake tensor belongs to, or None for a real one."""
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.fake_mode if isinstance(tensor, FakeTensor) else None


def fake_mode_of_graph(graph: fx.Graph) -> Any:
    """The fake mode of a Dynamo graph's inputs, or None where no input is a tensor."""
    values = (node.meta.get("example_value") for node in graph.nodes if node.op == "placeholder")
    return next((mode for value in values if isinstance(value, Tensor) and (mode := fake_mode_of(value)) is not None), None)


@contextlib.contextmanager
def tracing_on_fakes(fake_mode: Any) -> Iterator[None]:
    """Surroundings in which the nodes of a Dynamo graph can run on the fake tensors of their placeholders without new guards."""
    from torch._dispatch.python import enable_python_dispatcher

    shape_env = fake_mode.shape_env
    fresh = shape_env.ignore_fresh_unbacked_symbols() if shape_env is not None else contextlib.nullcontext()
    with fake_mode, enable_python_dispatcher(), fresh:
        yield


def constant_of(tensor: Tensor) -> Tensor | None:
    """The real tensor that a tensor is, or that is behind a fake one made from numbers in the code; None where there is none."""
    constant = tensor if fake_mode_of(tensor) is None else getattr(tensor, "constant", None)
    return constant if isinstance(constant, Tensor) and constant.device.type != "meta" else None
