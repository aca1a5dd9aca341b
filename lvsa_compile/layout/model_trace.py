"""What the blocks of a model get, found by one forward of the whole model on fake tensors.

A block that is compiled by itself sees tokens and no latents.  So the model runs once without memory or arithmetic while an
``AxisTracker`` follows the axes: a copy of it that has no hooks, whose weights and inputs are fakes on one device, so that neither
offloading nor casting nor parallelism matters.  Where it asks for a value, that is computed from the real inputs, if they decide it, and
those inputs are remembered.
"""

from __future__ import annotations

import contextlib
import copy
import random
import types
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from lvsa_compile import compat
from lvsa_compile.axes.algebra import INPUT, Axis, Source, axis_of
from lvsa_compile.axes.call import Axes, tensors_in
from lvsa_compile.axes.carried import shows_generated
from lvsa_compile.axes.opaque import expanded
from lvsa_compile.axes.tracker import AxisTracker
from lvsa_compile.axes.values import Later
from lvsa_compile.forward.timestep_names import timestep_among
from lvsa_compile.layout.carry import outgoing_annotation
from lvsa_compile.layout.denoiser import why_no_denoiser
from lvsa_compile.layout.evidence import collect_evidence
from lvsa_compile.layout.guarded_values import Reader

_LARGEST_REAL = 1 << 25
"""Elements of the largest tensor that is made for real."""

_AROUND = frozenset(("_hf_hook", "_diffusers_hook"))
"""Attributes that accelerate and diffusers leave where they put themselves around a module's ``forward``."""
NOT_COPIED = _AROUND | {"_old_forward", "_compiled_call_impl"}
"""Attributes that a run of the model by itself has no use for."""
_HARMLESS = ("torch.", "diffusers.", "accelerate.", "lvsa_compile.")
"""Packages whose forward hooks move, cast and cut tensors, which a run on whole fakes need not repeat."""


@dataclass(frozen=True)
class ForwardInputs:
    """The arguments of a call as leaves with names, such as ``hidden_states`` and ``latents[0]``."""

    names: tuple[str, ...]
    leaves: tuple[Any, ...]
    structure: Any

    @staticmethod
    def of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ForwardInputs:
        """The inputs of ``model(*args, **kwargs)``."""
        return ForwardInputs(*compat.named_leaves(type(model).forward, args, kwargs))

    def rebuild(self, leaves: Collection[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the same structure made of other leaves."""
        args, kwargs = compat.tree_unflatten(list(leaves), self.structure)
        return args, kwargs


@dataclass(frozen=True)
class BlockCall:
    """What one call of a block gets: for each tensor among its arguments its shape, and its axes, None where nothing is known."""

    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[Axes | None, ...]


@dataclass(frozen=True)
class ParentTrace:
    """Calls of blocks by path and number within one forward.

    ``relied_on`` are the inputs whose values had a part in it, and ``failure`` says why there are no calls.
    """

    calls: Mapping[tuple[str, int], BlockCall] = field(default_factory=dict)
    relied_on: Mapping[str, Tensor] = field(default_factory=dict)
    failure: str = ""


def trace_parent(model: nn.Module, blocks: Collection[str], inputs: ForwardInputs) -> ParentTrace:
    """What each call of the ``blocks``, given by path, gets in ``model(inputs)``."""
    reader = Reader(dict(zip(inputs.names, inputs.leaves, strict=True)))
    fake_mode = compat.new_fake_mode()
    tracker = _ParentTracker(fake_mode)
    seen: list[tuple[str, list[tuple[Tensor, Axes]]]] = []
    floats = [leaf.dtype for leaf in inputs.leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    computed_in = max(floats, key=lambda dtype: dtype.itemsize, default=torch.float32)
    with _plain_surroundings():
        bare = _bare_copy(model, lambda tensor: _fake(tensor, fake_mode, computed_in))
        for path in blocks:
            bare.get_submodule(path).register_forward_pre_hook(_noting(path, tracker, seen), with_kwargs=True)
        fakes = [_fake(leaf, fake_mode, computed_in) for leaf in inputs.leaves]
        for name, fake in zip(inputs.names, fakes, strict=True):
            if isinstance(fake, Tensor):
                tracker.set_axes(fake, tuple(axis_of(Source(INPUT, name, i, n, name, fake.dim())) for i, n in enumerate(fake.shape)))
                tracker.values.set(fake, reader.later(name))
        args, kwargs = inputs.rebuild(fakes)
        with tracker:
            output = bare(*args, **kwargs)
    leaves = compat.tree_leaves(output)
    outputs = {i: tracker.axes_of(leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    tokens = [*tracker.attended, *(axes[-2] for _, call in seen for _, axes in call if len(axes) >= 3)]
    known = collect_evidence(tokens, outputs, reader)
    returned = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    timed = timestep_among(inputs.names) is not None
    not_denoiser = why_no_denoiser(known.targets, [*map(expanded, tokens)], returned, timed, tracker.convolved)
    if not_denoiser:
        return ParentTrace(relied_on=dict(reader.relied_on), failure=f"{type(model).__name__} is no denoiser: {not_denoiser}")
    calls: dict[tuple[str, int], BlockCall] = {}
    for path, call in seen:
        number = sum(other == path for other, _ in calls)
        shapes = tuple(tuple(tensor.shape) for tensor, _ in call)
        annotations = (outgoing_annotation(known.refine(axes), known.targets) for _, axes in call)
        calls[path, number] = BlockCall(shapes, tuple(axes if axes is not None and shows_generated(axes) else None for axes in annotations))
    return ParentTrace(calls, dict(reader.relied_on))


@contextlib.contextmanager
def _plain_surroundings() -> Iterator[None]:
    """No compiling, no fused layers; chance is put back as it was."""
    chance = random.getstate(), numpy.random.get_state()
    with torch.compiler.set_stance("force_eager"), torch.inference_mode(False), torch.random.fork_rng(devices=[]), compat.no_fast_paths():
        try:
            yield
        finally:
            random.setstate(chance[0])
            numpy.random.set_state(chance[1])


def _noting(path: str, tracker: AxisTracker, seen: list[tuple[str, list[tuple[Tensor, Axes]]]]) -> Any:
    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((path, [(leaf, tracker.axes_of(leaf)) for leaf in compat.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]))

    return note


class _ParentTracker(AxisTracker):
    """Follows a forward that is no graph: it knows where attention was, and answers the model's questions about values."""

    def __init__(self, fake_mode: Any) -> None:
        super().__init__()
        self._fake_mode = fake_mode
        self.attended: list[Axis] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs the op; one that fakes cannot run is computed from the values of its arguments."""
        if "scaled_dot_product" in str(func):
            self.attended.extend(self.axes_of(tensor)[-2] for tensor in tensors_in(args)[:2])
        try:
            if not any(compat.fake_mode_of(tensor) for tensor in tensors_in(args, (kwargs or {}).values())):
                return self._made_from_nothing(func, args, kwargs or {})
            return super().__torch_dispatch__(func, types, args, kwargs)
        except compat.NEEDS_VALUES:
            return self._computed(func, args, kwargs or {})

    def _made_from_nothing(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What no input has a part in is real, since the model may keep it for later; what is too large for that is a fake."""
        with self._fake_mode:
            fake = func(*args, **kwargs)
        large = any(isinstance(leaf, Tensor) and leaf.numel() > _LARGEST_REAL for leaf in compat.tree_leaves(fake))
        result = fake if large else func(*args, **kwargs)
        if isinstance(func, compat.OpOverload):
            self.note(func, args, kwargs, result)
        return result

    def _computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in compat.INDEXING_OPS:  # by masks: what they choose is known even where what is chosen is not
            indices = [entry for index in args[1] for entry in (self._node_names(index) if _is_mask(index) else [index])]
            return func(args[0], indices, *args[2:], **kwargs)
        real = self.values.real((args, kwargs))
        if real is None:
            raise ValueError(f"the model asks for a value that its inputs do not decide, at {func}")
        with compat.no_modes():
            result = func(*real[0], **real[1])
        return compat.tree_map(lambda leaf: self._known(leaf) if isinstance(leaf, Tensor) else leaf, result)

    def _node_names(self, mask: Tensor) -> list[Tensor]:
        """What ``mask.nonzero()`` gives for each axis."""
        real = self.values.real(mask)
        if real is None:
            raise ValueError("the model takes elements by a mask that its inputs do not decide")
        with compat.no_modes():
            positions = real.nonzero(as_tuple=True)
        return [self._known(axis) for axis in positions]

    def _known(self, real: Tensor) -> Tensor:
        """A fake of a tensor whose value is known."""
        with self._fake_mode:
            fake = torch.empty(real.shape, dtype=real.dtype)
        self.values.set(fake, Later(lambda: real, constant=False))
        return fake


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _fake(value: Any, fake_mode: Any, computed_in: torch.dtype) -> Any:
    """A tensor as a fake on the CPU, in ``computed_in`` where it only stores numbers (fp8); everything else as it is."""
    if not isinstance(value, Tensor):
        return value
    stored = value.is_floating_point() and value.dtype.itemsize == 1
    strides = value.stride() if compat.local_part(value) is None and type(value) in (Tensor, nn.Parameter) else None
    with fake_mode:
        fake = torch.empty(tuple(value.shape), dtype=computed_in if stored else value.dtype)
        return fake if strides is None else torch.empty_strided(tuple(value.shape), strides, dtype=fake.dtype)


def _bare_copy(model: nn.Module, fake_of: Callable[[Any], Any]) -> nn.Module:
    """A model with fakes for weights and without what others put around its modules; nothing it does reaches the original."""
    modules = dict(model.named_modules())
    copies: dict[int, nn.Module] = {id(module): object.__new__(type(module)) for module in modules.values()}
    memo: dict[int, Any] = dict(copies)
    weights: dict[int, Any] = {}

    def weight(tensor: Tensor | None) -> Any:
        if tensor is not None and id(tensor) not in weights:
            fake = fake_of(tensor)
            weights[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
        return None if tensor is None else weights[id(tensor)]

    for module in modules.values():
        if not all(map(compat.only_looks, hooks_of_users(module))):  # for hooks are left out of the run
            raise ValueError(
                f"{type(module).__name__} has a forward hook that may change what it passes on; "
                "a hook that only looks must be a function that returns and assigns nothing"
            )
        state = copies[id(module)].__dict__
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                state[name] = {key: weight(tensor) for key, tensor in value.items()}
            elif name == "_modules":
                state[name] = {key: None if child is None else copies[id(child)] for key, child in value.items()}
            elif name == "forward":
                inner = vars(module).get("_old_forward") if _AROUND & vars(module).keys() else value
                if inner is not None:
                    state[name] = _rebound(module, inner, copies)
            elif name.startswith("_") and "_hooks" in name:
                state[name] = OrderedDict()
            elif name not in NOT_COPIED:
                state[name] = _copied(value, memo, fake_of)
    return copies[id(model)]


def _rebound(module: nn.Module, forward: Any, copies: Mapping[int, nn.Module]) -> Any:
    """A ``forward`` that was put on one module, as a method of its copy."""
    forward = compat.uncompiled(forward)
    if isinstance(forward, types.MethodType) and id(forward.__self__) in copies:
        return types.MethodType(forward.__func__, copies[id(forward.__self__)])
    raise ValueError(f"the forward of {type(module).__name__} was replaced by something that cannot be run apart from it")


def hooks_of_users(module: nn.Module) -> list[Any]:
    """Forward hooks of a module that do not come from the packages whose hooks are known to be harmless."""
    wrapped = [vars(module).get("_hf_hook"), *getattr(vars(module).get("_diffusers_hook"), "hooks", {}).values()]
    others = [hook for hook in wrapped if hook is not None and not _is_harmless(type(hook))]
    return [hook for hook in (*compat.forward_hooks(module), *compat.hooks_of_all_modules()) if not _is_harmless(hook)] + others


def _is_harmless(hook: Any) -> bool:
    return f"{getattr(hook, '__module__', '')}.".startswith(_HARMLESS)


def _copied(value: Any, memo: dict[int, Any], fake_of: Callable[[Any], Any]) -> Any:
    """A deep copy in which tensors are fakes and modules their copies; what cannot be copied is shared."""
    memo.update((id(tensor), fake_of(tensor)) for tensor in compat.tree_leaves(value) if isinstance(tensor, Tensor))
    try:
        done = copy.deepcopy(value, memo)
    except Exception:  # locks, streams and process groups of other libraries
        return value
    if hasattr(done, "_parallel_config"):  # diffusers' attention processors: here a model runs by itself
        done._parallel_config = None
    return done
