"""``compile_repeated_blocks``: one graph for all blocks of a class, with the layout and the clock of the model around them."""

from __future__ import annotations

import contextvars
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lvsa_compile import compat
from lvsa_compile.errors import RegionError
from lvsa_compile.forward import clock, context
from lvsa_compile.forward.labels import annotate, begin_forward
from lvsa_compile.forward.timestep_names import timestep_among
from lvsa_compile.layout.guarded_values import SameValue
from lvsa_compile.layout.model_trace import NOT_COPIED, ForwardInputs, ParentTrace, hooks_of_users, trace_parent
from lvsa_compile.options import make_options

log = logging.getLogger(__name__)

_MOST_TRACES = 64
"""Kinds of forwards (sizes, and values that were read) that are remembered."""
_RECOMPILES = 64
"""Graphs per class of block, where the user sets no limit: one for each size of video, which Dynamo's own limit of 8 would end."""


def compile_repeated_blocks(model: nn.Module, *, options: Mapping[str, Any] | None = None, **compile_kwargs: Any) -> nn.Module:
    """Compiles the repeated blocks of a model with the ``lvsa`` backend, in place: one compile serves all blocks of a class.

    The blocks are those that diffusers lists (``_repeated_blocks``), and children of one class in a list of modules.  At the first
    forward of each kind the whole model runs once on fake tensors, which says what each block gets; the class of the model and its state
    dict stay as they are.

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

    def compiled(call: Callable[..., Any], whole: bool) -> Callable[..., Any]:
        return torch.compile(call, backend="lvsa", options=given, **{"fullgraph": whole, **settings})

    _Region(model, blocks).install(compiled)
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


_INTERNAL = NOT_COPIED | {*vars(nn.Module()), "forward"}
"""Attributes of modules that are looked at in another way, or belong to libraries."""


@dataclass
class _Running:
    """One forward in progress: what its blocks get, and how often each was called."""

    region: _Region
    trace: ParentTrace
    parent: context.Parent
    calls: dict[str, int] = field(default_factory=dict)


_running: contextvars.ContextVar[tuple[_Running, ...]] = contextvars.ContextVar("lvsa_running", default=())


class _Region:
    """The compiled blocks of one model, and what is known of its forwards."""

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        self._model = weakref.ref(model)
        self._blocks = dict(blocks)
        self._in_pieces: set[type] = set()
        self._traces: dict[Any, list[tuple[ParentTrace, dict[str, SameValue]]]] = {}

    def __deepcopy__(self, memo: Any) -> _Region:
        return self  # a copy of the model is another model, whose blocks are not compiled

    def __reduce__(self) -> Any:
        return _NoRegion, ()

    def install(self, compiled: Callable[[Callable[..., Any], bool], Callable[..., Any]]) -> None:
        """Puts the region around its model and blocks, in place of an earlier one."""
        model = self._model()
        assert model is not None
        compat.remove_forward_hooks(model, lambda hook: isinstance(getattr(hook, "__self__", None), _Region))
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        model.register_forward_hook(self.end, always_call=True)
        for path, block in self._blocks.items():
            compat.set_compiled_call(block, self._block(path, block, self._as_whole(block, compiled)))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: finds out what the blocks will get and moves the clock."""
        if model is not self._model():
            return
        begin_forward()
        inputs = ForwardInputs.of(model, args, kwargs)
        trace = self._trace(model, inputs)
        timestep = timestep_among(inputs.names)
        value = None if timestep is None else inputs.leaves[timestep]
        if timestep is not None:
            clock.set_clock_input(model, inputs.names[timestep], "")
        size = tuple(tuple(leaf.shape[-4:]) for leaf in inputs.leaves if isinstance(leaf, Tensor) and leaf.dim() == 5)
        clock.clock_of(model).tick(value if isinstance(value, Tensor | None) else torch.tensor(float(value)), size)
        running = _Running(self, trace, context.Parent(model))
        _running.set((*_running.get(), running))
        context.parent.set(running.parent)

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """After a forward, also one that failed."""
        before = tuple(running for running in _running.get() if running.region is not self)
        _running.set(before)
        context.parent.set(before[-1].parent if before else None)

    def _trace(self, model: nn.Module, inputs: ForwardInputs) -> ParentTrace:
        """What is known of forwards of this kind; a kind that was not seen is traced."""
        kind = (inputs.names, tuple(map(_kind_of, inputs.leaves)), self._state(model))
        by_name = dict(zip(inputs.names, inputs.leaves, strict=True))
        for trace, conditions in self._traces.get(kind, ()):
            if all(holds(by_name[name]) for name, holds in conditions.items()):
                return trace
        try:
            trace = trace_parent(model, self._blocks, inputs)
        except Exception as error:  # a model that cannot be traced is dense and says so; it must not fail to run
            log.debug("tracing %s failed", type(model).__name__, exc_info=True)
            trace = ParentTrace(failure=f"the model could not be traced: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            log.warning("lvsa could not trace %s, so its blocks stay dense: %s", type(model).__name__, error)
        if sum(map(len, self._traces.values())) >= _MOST_TRACES:
            self._traces.clear()
        self._traces.setdefault(kind, []).append((trace, {name: SameValue(value) for name, value in trace.relied_on.items()}))
        return trace

    def _state(self, model: nn.Module) -> tuple[Any, ...]:
        """What may decide which way a forward takes: modes of torch, what modules hold, and what is put around them."""
        blocks = {id(inner) for block in self._blocks.values() for inner in block.modules()} - set(map(id, self._blocks.values()))
        modules = list(model.modules())
        around = tuple(
            (type(m), id(type(m).forward), id(vars(m).get("forward")), *map(id, compat.forward_hooks(m)), m.training) for m in modules
        )
        outer = [vars(module) for module in modules if id(module) not in blocks]
        held = tuple(_fingerprint(value) for attributes in outer for name, value in attributes.items() if name not in _INTERNAL)
        return around, held, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")

    def _as_whole(self, block: nn.Module, compiled: Callable[[Callable[..., Any], bool], Callable[..., Any]]) -> Callable[..., Any]:
        """A block compiled as one graph; in pieces where Dynamo cannot.

        Under ``fullgraph=True`` Dynamo captures lengths that only run time knows, and attention over them, instead of breaking there.
        """
        whole, pieces = compiled(compat.plain_call(block), True), compiled(compat.plain_call(block), False)
        failures = compat.capture_failures()

        def call(*args: Any, **kwargs: Any) -> Any:
            if type(block) not in self._in_pieces:
                try:
                    return whole(*args, **kwargs)
                except failures as error:
                    self._in_pieces.add(type(block))
                    log.info("%s is no single graph and is compiled in pieces: %s", type(block).__name__, str(error).splitlines()[0])
            return pieces(*args, **kwargs)

        return call

    def _block(self, path: str, block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled block that first says of its arguments what the trace of the model knows of them."""

        inside = tuple(block.modules())

        def call(*args: Any, **kwargs: Any) -> Any:
            running = _running.get()
            if running and running[-1].region is self:
                running[-1].parent.hooks = tuple(id(hook) for module in inside for hook in hooks_of_users(module))
                running[-1].parent.problem = _annotate_arguments(running[-1], path, (args, kwargs))
                return compiled(*args, **kwargs)
            token = context.parent.set(context.Parent(self._model(), path, token=self, called_by_others=True))
            try:
                return compiled(*args, **kwargs)
            finally:
                context.parent.reset(token)

        return call


def _annotate_arguments(running: _Running, path: str, arguments: Any) -> str:
    """Says of the tensors a block is called with what the trace of the model knows of them; returns why it could not, or ""."""
    running.parent.block = path
    number = running.parent.call = running.calls[path] = running.calls.get(path, -1) + 1
    known = running.trace.calls.get((path, number))
    tensors = [leaf for leaf in compat.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    if known is None:
        return running.trace.failure or f"{path} was not called {number + 1} times where the model was traced"
    if len(shapes) != len(known.shapes):
        return f"{path} got {len(shapes)} tensors, and {len(known.shapes)} where the model was traced"
    for tensor, shape, axes in zip(tensors, known.shapes, known.axes, strict=True):
        if tuple(tensor.shape) == shape:
            annotate(tensor, axes, at_once=True)  # a tensor of another shape, such as one process's part, is what the block before it said
    return "" if shapes == known.shapes else f"{path} got tensors of {shapes}, and of {known.shapes} where the model was traced"


def _kind_of(leaf: Any) -> Any:
    """What distinguishes a leaf of the arguments from one of another kind of forward."""
    return (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else _fingerprint(leaf)


def _fingerprint(value: Any, depth: int = 2) -> Any:
    """What distinguishes a value from another that may lead a forward elsewhere; objects are looked into for some levels."""
    if isinstance(value, (int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)) and depth:
        return len(value), *(_fingerprint(item, depth - 1) for item in value[:64])
    if isinstance(value, dict) and depth:
        return len(value), *((str(name), _fingerprint(item, depth - 1)) for name, item in list(value.items())[:64])
    inside = () if isinstance(value, (Tensor, nn.Module, type)) or not depth else getattr(value, "__dict__", {})
    return id(value), *((name, _fingerprint(item, depth - 1)) for name, item in list(dict(inside).items())[:64])


class _NoRegion:
    """What a region is in a pickled model."""

    def begin(self, *_: Any) -> None:
        """Nothing."""

    def end(self, *_: Any) -> None:
        """Nothing."""
