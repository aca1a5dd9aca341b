"""Inductor: its options, its modes, its caches, its C++ compiler."""

from __future__ import annotations

import ctypes
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode


@functools.cache
def inductor_options() -> frozenset[str]:
    """Names of Inductor's own configuration."""
    import torch._inductor

    return frozenset(torch._inductor.list_options())


def inductor_has_option(name: str) -> bool:
    """Whether ``torch.compile(backend="inductor", options={name: ...})`` would know the name."""
    return name in inductor_options()


def inductor_option_problem(name: str, value: object) -> tuple[str, str] | None:
    """What is wrong with the type of a value for Inductor's option ``name``, by the rule ``torch.compile`` uses."""
    from typing import get_origin

    import torch._inductor.config as config

    wanted = config.get_type(name)  # type: ignore[attr-defined]
    if get_origin(wanted) is None and not isinstance(value, wanted):
        return f"Inductor wants {getattr(wanted, '__name__', wanted)}, not {type(value).__name__}", "Give a value of that type."
    return None


def inductor_modes() -> tuple[str, ...]:
    """Names that ``torch.compile(mode=...)`` takes."""
    import torch._inductor

    return tuple(mode for mode in torch._inductor.list_mode_options() if mode != "default")


def compile_with_inductor(
    graph_module: fx.GraphModule, inputs: Sequence[Any], mode: str | None, options: Mapping[str, Any]
) -> Callable[..., Any]:
    """What ``torch.compile(backend="inductor", mode=mode, options=options)`` does with a graph."""
    wrapper = torch._TorchCompileInductorWrapper(mode, dict(options), None)
    compiled: Callable[..., Any] = wrapper(graph_module, inputs)
    return compiled


def load_cpp(source: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compiles C++ with Inductor's compiler, flags and cache, and loads it; raises what the compiler or the loader raises.

    ``flags`` come after Inductor's own, so that they win.
    """
    from torch._inductor.codecache import CppCodeCache

    known = inspect.signature(CppCodeCache.load_async).parameters
    isa = {"needs_vec_isa": False} if "needs_vec_isa" in known else {}  # -march=native does; asking for Inductor's choice takes 10 s
    library: ctypes.CDLL = CppCodeCache.load(source, extra_flags=("-ffp-contract=fast", *flags), **isa)
    return library


def cuda_graphs_by_default() -> bool:
    """Whether Inductor is configured to use CUDA graphs where nobody says anything."""
    import torch._inductor.config as config

    return bool(config.triton.cudagraphs)


def cache_folder(name: str) -> Path | None:
    """A folder beside Inductor's caches, None where caches are switched off."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return None if torch.compiler.config.force_disable_caches else Path(cache_dir()) / name


def with_cache_stamp(options: Mapping[str, Any], stamp: str) -> dict[str, Any]:
    """Inductor options with a do-nothing pass put first whose identity is ``stamp``, so that caches know this package's version."""
    import torch._inductor.config as config

    name = "post_grad_custom_pre_pass"
    existing = options.get(name, getattr(config, name))
    others = () if existing is None else tuple(existing) if isinstance(existing, (list, tuple)) else (existing,)
    return {**options, name: [_stamp_class()(stamp), *others]}


@functools.cache
def _stamp_class() -> Callable[[str], Any]:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class CacheStamp(CustomGraphPass):
        def __init__(self, stamp: str) -> None:
            self.stamp = stamp

        def __call__(self, graph: fx.Graph) -> None:
            pass

        def uuid(self) -> str:
            return self.stamp

    return CacheStamp


def reset_cuda_graphs() -> None:
    """What Inductor's own backend does on ``torch._dynamo.reset()``, where CUDA graphs were used."""
    if trees := sys.modules.get("torch._inductor.cudagraph_trees"):
        trees.reset_cudagraph_trees()
