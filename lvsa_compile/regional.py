"""``compile_repeated_blocks``: one graph for all blocks of a class, with the layout and the clock of the model around them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from lvsa_compile import compat
from lvsa_compile.backend import attention_in_eager_code
from lvsa_compile.errors import RegionError
from lvsa_compile.options import make_options, parse_options
from lvsa_compile.watching.find_model import belongs_to, denoisers_in, is_timed
from lvsa_compile.watching.watch import leave_alone, watch, watch_of

log = logging.getLogger(__name__)
Model = TypeVar("Model")

_RECOMPILES = 64
"""Graphs per class of block, where the user sets no limit: one for each size of video, which Dynamo's own limit of 8 would end."""


def compile_repeated_blocks(model: nn.Module, *, options: Mapping[str, Any] | None = None, **compile_kwargs: Any) -> nn.Module:
    """Compiles the repeated blocks of a model with the ``lvsa`` backend, in place: one compile serves all blocks of a class.

    The blocks are those that diffusers lists (``_repeated_blocks``), and children of one class in a list of modules.  Each forward of the
    model is followed while it runs, which says what each block gets; the class of the model and its state dict stay as they are.
    ``undo(model)`` takes all of it off again.

    Args:
        model: the model, or a wrapper of it; its blocks must not be compiled already.
        options: as for ``torch.compile(backend="lvsa", options=...)``.
        **compile_kwargs: further arguments of ``torch.compile``, such as ``dynamic`` or ``fullgraph``.

    Returns:
        The model.

    Raises:
        RegionError: ``model`` is no module, has no repeated blocks, or ``backend`` was given.
        OptionError: an option has a value it cannot have.

    Example:
        >>> pipe = DiffusionPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        >>> lvsa_compile.compile_repeated_blocks(pipe.transformer, options={"window": 2})
    """
    if not isinstance(model, nn.Module):
        raise RegionError("model", type(model).__name__, "not a module", "Give the transformer, such as pipe.transformer.")
    if compile_kwargs.get("backend", "lvsa") != "lvsa":
        raise RegionError("backend", compile_kwargs["backend"], "this function compiles for 'lvsa'", "Leave backend out.")
    given = make_options(**{**({"mode": compile_kwargs["mode"]} if compile_kwargs.get("mode") else {}), **(options or {})})
    blocks = repeated_blocks(model)
    if not blocks:
        raise RegionError(
            "model", type(model).__name__, "no list of modules holds two blocks of a class", 'Use torch.compile(model, backend="lvsa").'
        )
    settings = {name: value for name, value in compile_kwargs.items() if name not in ("backend", "mode")}
    if compat.takes_recompile_limit():
        settings.setdefault("recompile_limit", _RECOMPILES)

    in_pieces: set[type] = set()
    for block in blocks.values():
        compat.set_compiled_call(block, _CompiledBlock(block, given, settings, in_pieces))
        belongs_to(block, model)
    watch(_denoiser(model, list(blocks)), ticks=True, attend=attention_in_eager_code(parse_options(given)))
    return model


def _denoiser(model: nn.Module, blocks: list[str]) -> nn.Module:
    """The outermost module around all blocks whose forward names a timestep, past wrappers; the model itself where none does."""
    around, paths = [model], [path.split(".") for path in blocks]
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        around.append(around[-1].get_submodule(names[0]))
    return next((module for module in around if is_timed(module)), model)


def undo(model: Model) -> Model:
    """Takes off what this package put on a model: its forwards are followed no more; ``compile_repeated_blocks`` and ``enable`` are undone.

    Blocks that were compiled in another way stay compiled, and become dense.

    Args:
        model: a module, or an object that holds denoisers, such as a pipeline of diffusers.

    Raises:
        RegionError: ``model`` is neither.

    Example:
        >>> lvsa_compile.undo(pipe.transformer)
    """
    for whole in [model] if isinstance(model, nn.Module) else denoisers_in(model, "undo"):
        for module in whole.modules():
            present = watch_of(module)
            if present is not None:
                present.undo()
            if isinstance(compat.compiled_call(module), _CompiledBlock):
                compat.set_compiled_call(module, None)
        leave_alone(whole)
    return model


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by path: no block lies in another."""
    listed = {name for module in model.modules() for name in getattr(module, "_repeated_blocks", None) or ()}
    candidates = {path: module for path, module in model.named_modules() if path and type(module).__name__ in listed}
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            children = [(name, child) for name, child in module.named_children() if any(True for _ in child.children())]
            classes = [type(child) for _, child in children]
            candidates |= {f"{path}.{name}" if path else name: child for name, child in children if classes.count(type(child)) > 1}
    outermost: dict[str, nn.Module] = {}
    for path in sorted(candidates, key=lambda p: p.count(".")):
        if not any(path.startswith(f"{other}.") for other in outermost):
            outermost[path] = candidates[path]
    return {path: module for path, module in model.named_modules() if path in outermost}


class _CompiledBlock:
    """A block compiled as one graph; in pieces where Dynamo cannot.

    Under ``fullgraph=True`` Dynamo captures lengths that only run time knows, and attention over them, instead of breaking there.
    """

    def __init__(self, block: nn.Module, options: dict[str, Any], settings: Mapping[str, Any], in_pieces: set[type]) -> None:
        self._kind, self._in_pieces, self._failures = type(block), in_pieces, compat.capture_failures()
        call = compat.plain_call(block)
        self._whole = torch.compile(call, backend="lvsa", options=options, **{"fullgraph": True, **settings})
        self._pieces = torch.compile(call, backend="lvsa", options=options, **{"fullgraph": False, **settings})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the block."""
        if self._kind not in self._in_pieces:
            try:
                return self._whole(*args, **kwargs)
            except self._failures as error:
                self._in_pieces.add(self._kind)
                log.info("%s is no single graph and is compiled in pieces: %s", self._kind.__name__, str(error).splitlines()[0])
        return self._pieces(*args, **kwargs)
