"""Every private torch API this package touches, in one place; made for torch 2.11 to 2.13.

Each function says what it stands for, so that a change in torch is mended here and nowhere else.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import copy
import ctypes
import dataclasses
import dis
import functools
import inspect
import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# --- ops -----------------------------------------------------------------------------------------------------------------------

OPAQUE_OP_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
"""Inductor must hand such an op its inputs in the strides that were traced, since its output strides follow the query's."""
HOST_OP_TAGS = (*OPAQUE_OP_TAGS, torch.Tag.cudagraph_unsafe)
"""An op that reads tensors on the host: a CUDA graph would keep what they held when it was recorded."""


AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}
"""Dispatch key of autocast by device type."""


def register_autocast(library: torch.library.Library, name: str, device: str, operator: OpOverload) -> None:
    """Gives an attention op SDPA's autocast rule on ``device``: query, key and value go to the autocast dtype, float64 stays."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, AUTOCAST_KEYS[device]))

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == device
        return tensor.to(torch.get_autocast_dtype(device)) if eligible else tensor

    def autocast(query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return operator(cast(query), cast(key), cast(value), *others, **named)

    library.impl(name, autocast, AUTOCAST_KEYS[device])


def returns_views(operator: OpOverload) -> bool:
    """Whether an op's results share memory with an argument that it does not write to."""
    returned = operator._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write


def written_by(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a call that the op writes to."""
    given = {**dict(zip((a.name for a in operator._schema.arguments), args, strict=False)), **kwargs}
    targets = [given.get(a.name) for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [tensor for tensor in tree_leaves(targets) if isinstance(tensor, Tensor)]


def memory_of(tensor: Tensor) -> int:
    """Identity of the memory that a tensor shares with its views, as long as one of them lives; inside vmap of the tensor alone."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return id(tensor)


@contextlib.contextmanager
def transforms_kept() -> Iterator[None]:
    """Surroundings that leave vmap and its kin as they were, also where a graph that has entered one fails before its end."""
    depth = len(torch._C._functorch.get_interpreter_stack() or ())
    try:
        yield
    finally:
        while len(torch._C._functorch.get_interpreter_stack() or ()) > depth:
            torch._C._functorch.pop_dynamic_layer_stack()


def cpu_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, score_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The CPU kernel behind ``scaled_dot_product_attention``, with its log-sum-exp ``[B, heads, Sq]``; ``score_mask`` is added.

    Called directly it reads garbage where head_dim is not the fastest axis, so such tensors are copied first.
    """
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=score_mask, scale=scale)
    if score_mask is not None:  # the kernel says 0 where no key counts
        log_sum_exp = log_sum_exp.masked_fill((score_mask == float("-inf")).all(-1), float("-inf"))
    return output, log_sum_exp


def cuda_dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None, cudnn: bool) -> tuple[Tensor, Tensor]:
    """Dense attention of cuDNN, or of flash attention as torch ships it, with log-sum-exp ``[B, heads, Sq]``."""
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    if cudnn and query.shape[1] == key.shape[1]:
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    return found[0], found[1].reshape(query.shape[:3])


def axes_in_memory_order(tensor: Tensor) -> list[int]:
    """Axes from the slowest to the fastest in memory; symbolic strides are compared by their hints, which adds no guard."""
    strides = [size_hint(stride) for stride in tensor.stride()]
    return sorted(range(tensor.dim()), key=lambda axis: -strides[axis])


def size_hint(size: Any) -> int:
    """An int as it is, a symbolic size as the value it has in this compile; adds no guard."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1 << 40


# --- Inductor ------------------------------------------------------------------------------------------------------------------


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


def cpu_features() -> tuple[bool, bool, bool]:
    """Whether this CPU has AVX2, AVX-512, and AMX tiles, on which dense attention in bfloat16 runs."""
    return torch.cpu._is_avx2_supported(), torch.cpu._is_avx512_supported(), torch.cpu._is_amx_tile_supported()


def trace_artifact(name: str, content: Callable[[], str]) -> None:
    """Adds a JSON artifact to torch's structured trace of this compile (``TORCH_TRACE``, tlparse); costs nothing where none is taken."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=content)


def cudnn_attention_enabled() -> bool:
    """Whether the user left cuDNN's attention switched on."""
    return bool(torch.backends.cuda.cudnn_sdp_enabled())


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


def capture_failures() -> tuple[type[Exception], ...]:
    """What Dynamo raises under ``fullgraph=True`` where it would otherwise break the graph."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, UncapturedHigherOrderOpError, Unsupported, UserError

    return Unsupported, UserError, UncapturedHigherOrderOpError, FailOnRecompileLimitHit


def is_dynamos(error: Exception) -> bool:
    """Whether an error is Dynamo's own: how it starts an analysis anew, breaks a graph, or tells a user."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def takes_recompile_limit() -> bool:
    """Whether ``torch.compile`` takes a limit of recompiles for one call."""
    return "recompile_limit" in inspect.signature(torch.compile).parameters


def reset_cuda_graphs() -> None:
    """What Inductor's own backend does on ``torch._dynamo.reset()``, where CUDA graphs were used."""
    if trees := sys.modules.get("torch._inductor.cudagraph_trees"):
        trees.reset_cudagraph_trees()


def lookup_backend(name: str) -> Callable[..., Any]:
    """A Dynamo backend by name."""
    from torch._dynamo.backends.registry import lookup_backend as lookup

    found: Callable[..., Any] = lookup(name)
    return found


def compiled_apart(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    """``torch.compile(function)`` under a code object of its own, so that its compiles are counted by themselves."""
    scope: dict[str, Any] = {"function": function}
    exec(compile("def call(*args, **kwargs):\n    return function(*args, **kwargs)\n", f"<lvsa {next(_apart)}>", "exec"), scope)
    compiled: Callable[..., Any] = torch.compile(scope["call"], dynamic=False, **more)
    return compiled


def trace_apart(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile(function, backend)`` that leaves no trace on what ``function`` calls.

    The outermost code object is new at every call, and where torch can keep a call's compiles in a cache of their own, it does, so
    that graph breaks inside a model take nothing from the model's own compile budget.
    """
    isolated = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    compiled = compiled_apart(function, backend=backend, **isolated)

    def run(*args: Any, **kwargs: Any) -> Any:
        import torch._dynamo.pgo as pgo

        remembered = dict(pgo.get_code_state())  # sizes seen, by which later compiles choose what is dynamic
        try:
            return compiled(*args, **kwargs)
        finally:
            state = pgo.get_code_state()
            for code in [code for code in state if code not in remembered]:
                del state[code]

    return run


_apart = itertools.count()


# --- the compile in progress ---------------------------------------------------------------------------------------------------


def compile_id() -> str:
    """The compile in progress as torch's logs name it ("0/1"), or "-" outside one."""
    from torch._guards import CompileContext

    return str(CompileContext.current_compile_id() or "-")


def compiles_of_this_code() -> int:
    """How often the code object being compiled has been compiled before."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return current.frame_compile_id or 0 if current is not None else 0


def recompile_limit() -> int:
    """Compiles of one code object after which Dynamo runs new sizes in eager mode."""
    import torch._dynamo.config as config

    limit: int = config.recompile_limit
    return limit


def counters() -> collections.Counter[str]:
    """``torch._dynamo.utils.counters["lvsa"]``, the usual place for counts of a backend."""
    from torch._dynamo.utils import counters as all_counters

    return all_counters["lvsa"]


def compiling_ahead() -> bool:
    """Whether ``torch.compile(...).forward.aot_compile(...)`` is at work, which saves what a backend returns."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "aot_compile_fullgraph":
        frame = frame.f_back
    return frame is not None


def root_scope() -> dict[str, Any]:
    """Names in the function being compiled, locals over globals (``self`` is the model where its forward is compiled)."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # no compile in progress: current_tx is unset, or None
        return {}
    return {**output.global_scope, **output.local_scope}


def argument_scope() -> dict[str, Any]:
    """Names in the function being compiled that are its own: arguments and other locals."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return dict(InstructionTranslator.current_tx().output.local_scope)
    except AttributeError:
        return {}


# --- graphs --------------------------------------------------------------------------------------------------------------------


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be changed; attributes, node meta and what Dynamo keeps beside the graph are shared."""
    graph = copy.deepcopy(graph_module.graph)
    for old, new in zip(graph_module.graph.nodes, graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copied = fx.GraphModule(graph_module, graph)
    copied.meta = dict(graph_module.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(graph_module, name):
            object.__setattr__(copied, name, getattr(graph_module, name))
    return copied


def example_value(node: fx.Node) -> Any:
    """The fake value Dynamo recorded for a node; None where it recorded none."""
    return node.meta.get("example_value")


def source_line(node: fx.Node) -> str:
    """File, line and function a node was traced from; the node's name where Dynamo gave none.

    Of the calls that lead to it the innermost in the file of the module it belongs to, so that a model's line is named and not one of a
    library that the model calls.
    """
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")]
    home = next((file for _, kind in reversed((node.meta.get("nn_module_stack") or {}).values()) if (file := _file_of(kind))), None)
    return next((line for line in reversed(lines) if line.startswith(f'File "{home}"')), lines[-1] if lines else f"node {node.name}")


@functools.cache
def _file_of(module_class: Any) -> str | None:
    """The source file of a module's class where that is not torch's own."""
    try:
        file = inspect.getsourcefile(module_class)
    except TypeError:
        return None
    return file if file is None or not file.startswith(str(Path(torch.__file__).parent)) else None


def placeholder_source(node: fx.Node) -> str | None:
    """The Python expression a placeholder's value came from, such as ``L['timestep']``; None where Dynamo gave none."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return None
    return source_name(source)


def source_name(source: Any) -> str:
    """The Python expression of a Dynamo source."""
    name = source.name  # a property from torch 2.10 on, a method before
    return str(name() if callable(name) else name)


def add_tensor_input(graph_module: fx.GraphModule, after: fx.Node, name: str, like: Tensor, fake_mode: Any) -> fx.Node:
    """Adds a graph input with no Dynamo source, whose value the caller of the compiled function appends."""
    with graph_module.graph.inserting_after(after):
        node = graph_module.graph.placeholder(name)
    node._dynamo_source = None
    node.meta["example_value"] = fake_like(like, fake_mode)
    return node


def fake_like(tensor: Tensor, fake_mode: Any) -> Tensor:
    """A fake tensor with the metadata of ``tensor`` and static sizes."""
    with fake_mode:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@contextlib.contextmanager
def no_fast_paths() -> Iterator[None]:
    """Surroundings in which ``nn.MultiheadAttention`` runs op by op, as Dynamo traces it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def local_part(tensor: Tensor) -> tuple[Tensor, frozenset[int]] | None:
    """This process's part of a distributed tensor, and the axes that are cut; None for any other tensor."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None or not isinstance(tensor, distributed.DTensor):
        return None
    return tensor._local_tensor, frozenset(place.dim for place in tensor.placements if place.is_shard())


def group_of(name: str) -> tuple[int, int]:
    """Size of a process group, and this process's rank in it."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    group = _resolve_process_group(name)  # type: ignore[arg-type]
    return group.size(), group.rank()


def new_fake_mode() -> Any:
    """A fake mode of its own, without symbols: ops that need values raise one of ``NEEDS_VALUES``."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What fake tensors raise where the values of real ones decide."""

INDEXING_OPS = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


def tracing_fake_mode() -> Any:
    """The fake mode of the compile in progress, in which the inner compiler traces; None outside a compile."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    return context.fake_mode if context is not None else None


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


@contextlib.contextmanager
def trial_run(fake_mode: Any) -> Iterator[None]:
    """``tracing_on_fakes`` that leaves nothing behind: guards, replacements, symbols and caches are afterwards what they were.

    That counts for caches too: an answer that Dynamo got ("it cannot be told whether u0 <= 64"), when it is pushed out of a cache and
    asked for again later, may be another one, at which AOTAutograd fails ("possible memo disaster").
    """
    environment = fake_mode.shape_env
    if environment is None:
        with tracing_on_fakes(fake_mode):
            yield
        return
    before = {name: _contents(value) for name, value in vars(environment).items()}
    cached = {name: method for name, method in vars(type(environment)).items() if isinstance(method, functools._lru_cache_wrapper)}
    for name, method in cached.items():
        setattr(environment, name, functools.cache(functools.partial(method.__wrapped__, environment)))
    try:
        with tracing_on_fakes(fake_mode):
            yield
    finally:
        for name in cached:
            delattr(environment, name)
        for name, kept in before.items():
            _restore(environment, name, kept)
        environment._update_version_counter()  # for the caches that go by it


_ONLY_GROW = ("_version_counter", "_prev_cache_key", "unbacked_symint_counter", "unbacked_symfloat_counter")
_CONTAINERS = (dict, list, set)


def _contents(value: Any) -> Any:
    """A container with the containers in it, copied; anything else as it is."""
    if isinstance(value, dict):
        inside = {key: copy.copy(each) if isinstance(each, _CONTAINERS) else each for key, each in value.items()}
        return value, inside
    return (value, copy.copy(value)) if isinstance(value, (list, set)) else (value, None)


def _restore(environment: Any, name: str, kept: tuple[Any, Any]) -> None:
    value, contents = kept
    if name in _ONLY_GROW:
        return
    if contents is not None and value != contents:
        value.clear()
        (value.extend if isinstance(value, list) else value.update)(contents)
    if getattr(environment, name) is not value:
        setattr(environment, name, value)


@contextlib.contextmanager
def no_modes() -> Iterator[None]:
    """Surroundings in which ops compute real values, whatever is traced outside."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch._C._DisablePythonDispatcher():
        yield


def constant_of(tensor: Tensor) -> Tensor | None:
    """The real tensor that a tensor is, or that is behind a fake one made from numbers in the code; None where there is none."""
    constant = tensor if fake_mode_of(tensor) is None else getattr(tensor, "constant", None)
    return constant if isinstance(constant, Tensor) and constant.device.type != "meta" else None


def guard_input(node: fx.Node, holds: Callable[[Tensor], bool], text: str) -> None:
    """Has Dynamo compile anew when ``holds`` is no longer true of the input behind a placeholder."""
    from torch._guards import Guard, TracingContext

    context, source = TracingContext.try_get(), getattr(node, "_dynamo_source", None)
    if context is None or source is None:
        return

    def create(builder: Any, guard: Any) -> None:
        builder.get_guard_manager(guard).add_lambda_guard(holds, [f"lvsa: {guard.name} {text}"], guard.user_stack)

    context.guards_context.dynamo_guards.add(Guard(source, create))


def statically_true(condition: Any) -> bool:
    """Whether a condition on symbolic sizes holds for all values; never adds a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def size_expression(size: Any) -> Any:
    """An int or an expression as it is, a symbolic size as its sympy expression (hashable, and combinable without guards)."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else expression


def symbol_positions(graph_module: fx.GraphModule) -> dict[Any, int]:
    """Symbols of sizes that are inputs of a graph by themselves, and their positions."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    sizes = ((position, example_value(node)) for position, node in enumerate(placeholders))
    return {size_expression(size): position for position, size in sizes if isinstance(size, torch.SymInt)}


def number_of(size: Any, symbols: Mapping[Any, int]) -> int:
    """A size as an int, given what its symbols stand for; -1 where that is not known."""
    value = size if isinstance(size, int) else size.subs(symbols)
    return int(value) if getattr(value, "is_number", True) else -1


def settle_slice(output: Tensor, dim: int, low: Any, high: Any, size: Any) -> None:
    """Says that ``x[low:high]`` of an axis of ``size`` has ``high - low`` elements, where its bounds are sure to lie within the axis.

    torch gives a slice by sizes that only run time knows a new symbol each time it is traced, so that equal lengths look different.
    Only for tensors of a trace of our own: the symbol is forgotten with it.
    """
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    mode, symbol = fake_mode_of(output), size_expression(output.shape[dim])
    if mode is None or isinstance(symbol, int) or not symbol.is_Symbol or not free_unbacked_symbols(output.shape[dim]):
        return
    environment, length = mode.shape_env, high - low
    known = set().union(*(getattr(bound, "free_symbols", ()) for bound in (low, high, size)))
    if symbol not in known and all(isinstance(n, int) or environment.bound_sympy(n).lower >= 0 for n in (low, length, size - high)):
        environment._set_replacement(symbol, sympy.sympify(length), "lvsa: a slice within its axis")


def specialise(size: Any, tensor: Tensor) -> int | None:
    """A symbolic size as the int it has now, with the guard that says so.

    None where the size is known only at run time, and where the user marked an axis dynamic that the guard would fix.
    """
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    expression = size_expression(size)
    if isinstance(expression, int):
        return expression
    mode = fake_mode_of(tensor)
    if mode is None or mode.shape_env is None or free_unbacked_symbols(expression) or marked_dynamic(size, tensor):
        return None
    return int(mode.shape_env.evaluate_expr(expression))


def size_now(size: Any, tensor: Tensor) -> int:
    """A size as it is, an expression as the value it has in this compile, or -1 where only run time knows it; adds no guard."""
    expression, mode = size_expression(size), fake_mode_of(tensor)
    environment = None if mode is None else mode.shape_env
    if isinstance(expression, int) or environment is None:
        return expression if isinstance(expression, int) else -1
    value = expression.subs(getattr(environment, "backed_var_to_val", None) or environment.var_to_val)  # the newer name first
    return int(value) if value.is_number else -1


def marked_dynamic(size: Any, tensor: Tensor) -> str:
    """The input and axis with ``torch._dynamo.mark_dynamic`` that a guard on a size would fix, as Dynamo would refuse; "" for none."""
    from torch.utils._sympy.solve import try_solve

    expression, mode = size_expression(size), fake_mode_of(tensor)
    environment = None if mode is None else mode.shape_env
    if environment is None or isinstance(expression, int):
        return ""
    now = sympy.Eq(expression, size_now(expression, tensor), evaluate=False)
    for tracked in environment.tracked_fakes or ():
        for axis, mark in enumerate(getattr(tracked.symbolic_context, "constraint_sizes", None) or ()):
            symbol = size_expression(tracked.fake.shape[axis]) if mark is not None and not mark.warn_only else None
            if symbol in expression.free_symbols and try_solve(now, symbol, floordiv_inequality=False):
                return f"axis {axis} of {source_name(tracked.source)}"
    return ""


class EagerAttention:
    """Lines of Python, other than torch's own and graphs, that call ``scaled_dot_product_attention`` while it is active.

    It does not look while Dynamo compiles, which is slow under a profile and calls no attention.
    """

    def __init__(self) -> None:
        self.lines: collections.Counter[str] = collections.Counter()
        self._inside = 0

    def __enter__(self) -> EagerAttention:
        from torch._dynamo.callback import callback_handler

        self._before, self._thread = sys.getprofile(), threading.get_ident()
        callback_handler.register_start_callback(self._rest)
        callback_handler.register_end_callback(self._look)
        self._look()
        return self

    def __exit__(self, *error: Any) -> None:
        from torch._dynamo.callback import callback_handler

        callback_handler.remove_start_callback(self._rest)
        callback_handler.remove_end_callback(self._look)
        self._rest()

    def _look(self, *_: Any) -> None:
        if threading.get_ident() == self._thread:
            sys.setprofile(self._note)

    def _rest(self, *_: Any) -> None:
        if threading.get_ident() == self._thread:
            sys.setprofile(self._before)

    def _note(self, frame: types.FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called is torch.nn.functional.scaled_dot_product_attention and not self._inside:
            code = frame.f_code
            if not code.co_filename.startswith((_TORCH, "<")):
                self.lines[f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}'] += 1

    def in_graph(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A graph, whose calls are not counted."""

        def inside(*args: Any) -> Any:
            self._inside += 1
            try:
                return run(*args)
            finally:
                self._inside -= 1

        return inside


_TORCH = f"{next(iter(torch.__path__))}/"


def uncompiled(function: Any) -> Any:
    """What ``torch.compile`` was given, where a function is what it returned."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def only_looks(function: Any) -> bool:
    """Whether a Python function can be seen to return None always, to assign nothing and to call nothing that writes in place."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None or code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE):
        return False
    steps = list(dis.get_instructions(code))
    returned = [
        before.argval if before.opname == "LOAD_CONST" else code
        for before, step in itertools.pairwise(steps)
        if step.opname == "RETURN_VALUE"
    ]
    returned += [step.argval for step in steps if step.opname == "RETURN_CONST"]
    writes = any(step.opname in ("STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_DEREF", "STORE_SLICE") for step in steps)
    named = any(name.endswith("_") or name in ("data", "setattr", "out") for name in code.co_names)
    return all(value is None for value in returned) and not writes and not named


def hooks_of_all_modules() -> list[Any]:
    """Forward hooks that were put on every module of the process."""
    from torch.nn.modules import module

    return [*module._global_forward_pre_hooks.values(), *module._global_forward_hooks.values()]


# --- arguments of a call -------------------------------------------------------------------------------------------------------


def named_leaves(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Names of the leaves among a method's arguments, the leaves, and their structure; see ``tree_unflatten``."""
    import torch.utils._pytree as pytree

    parameters = list(inspect.signature(function).parameters.values())[1:]
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    found, structure = pytree.tree_flatten_with_path((args, dict(kwargs)))
    names = []
    for (side, place, *inside), _ in found:
        position = place.idx if side.idx == 0 else None  # type: ignore[attr-defined]
        name = place.key if position is None else plain[position] if position < len(plain) else f"args[{position}]"  # type: ignore[attr-defined]
        names.append(f"{name}{pytree.keystr(tuple(inside))}")
    return tuple(names), tuple(leaf for _, leaf in found), structure


def tree_leaves(value: Any) -> list[Any]:
    """All leaves of nested lists, tuples, dicts and the output classes of known libraries."""
    import torch.utils._pytree as pytree

    return pytree.tree_leaves(value)


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure with ``function`` of every leaf."""
    import torch.utils._pytree as pytree

    return pytree.tree_map(function, value)


def tree_unflatten(leaves: list[Any], structure: Any) -> Any:
    """The structure with other leaves."""
    import torch.utils._pytree as pytree

    return pytree.tree_unflatten(leaves, structure)


# --- modules of the model being compiled ---------------------------------------------------------------------------------------


def module_path(node: fx.Node) -> str:
    """Dotted path of the module a node was traced in, from the root of the compile; "" if unknown.

    The place of a block that is compiled for all of its kind is ``*``: ``blocks.*.attn1``.
    """
    stack, around = node.meta.get("nn_module_stack"), parent.get()
    inside = _path_parts(list(stack.values())[-1][0])[1:] if stack else []
    block = ["*" if part.isdigit() else part for part in around.block.split(".")] if around is not None else []
    return ".".join([*block, *inside])


def compiled_entry() -> Any:
    """The function the user called, compiled, to which the graph being compiled belongs; None if unknown.

    After a graph break the pieces of a model are compiled one by one, all below the same entry.
    """
    frame: types.FrameType | None = sys._getframe()
    entry = None
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.endswith("eval_frame.py"):
            entry = frame.f_locals.get("fn", entry)
        frame = frame.f_back
    return entry


@dataclasses.dataclass
class Parent:
    """The model around a block that is compiled by itself.

    ``block`` is the path of the block that is called, ``problem`` says why nothing is known of what it gets, ``hooks`` are its
    own (Dynamo does not look whether another block of its class has others), and ``token`` is one object per forward.
    """

    model: Any
    block: str = ""
    hooks: tuple[int, ...] = ()
    token: object = dataclasses.field(default_factory=object)
    problem: str = ""


parent: contextvars.ContextVar[Parent | None] = contextvars.ContextVar("lvsa_parent", default=None)
"""The model whose blocks are compiled one by one, while its forward runs."""


def hooks_around() -> tuple[int, ...]:
    """The hooks of the block that is called by itself."""
    around = parent.get()
    return around.hooks if around is not None else ()


def root_module() -> Any:
    """The module the user compiled, else the one whose forward is being compiled, or None."""
    if (around := parent.get()) is not None:
        return around.model
    scope, entry = root_scope(), compiled_entry()
    function = scope.get("function")  # what ``trace_apart`` calls
    found = (entry, getattr(entry, "__self__", None), function, getattr(function, "__self__", None), scope.get("self"))
    return next((module for module in found if isinstance(module, torch.nn.Module)), None)


def is_whole_of_compiled() -> bool:
    """Whether the graph begins where the compiled module begins, rather than after a graph break."""
    scope = root_scope()
    return scope.get("self") is not None and scope.get("self") is root_module() and not _resumes()


def place_in_forward(graph_module: fx.GraphModule) -> tuple[bool, bool, bool]:
    """Whether the graph being compiled continues an earlier one of the same forward, another one may follow it, and it ends in a break."""
    scope, entry = root_scope(), compiled_entry()
    root = root_module()
    at_root = scope.get("self") is root if root is not None and "function" not in scope else True
    continues = _resumes() or (bool(scope) and entry is not None and not at_root)
    breaks = getattr(getattr(graph_module, "compile_subgraph_reason", None), "graph_break", False)
    return continues, continues or bool(breaks), bool(breaks)


def _resumes() -> bool:
    """Whether the code being compiled is what Dynamo made of a function after a graph break."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().f_code.co_name.startswith("torch_dynamo_resume_in")
    except AttributeError:
        return False


def modules_around(node: fx.Node) -> list[tuple[type, Any]]:
    """Classes of the modules that a node was traced in, outermost first, each with the module where it can be reached, else None."""
    scope, root = root_scope(), root_module()
    found: list[tuple[type, Any]] = [] if root is None else [(type(root), root)]
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        along = _along(scope, path)
        found.extend((type(module), module) for module in along)
        if isinstance(kind, type) and not (along and type(along[-1]) is kind):
            found.append((kind, None))
    return found


def required_parameters(module_class: type) -> tuple[str, ...]:
    """Names of the parameters that a module's forward cannot do without."""
    try:
        parameters = inspect.signature(module_class.forward).parameters  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return ()
    return tuple(name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty)


def modules_among_arguments() -> list[torch.nn.Module]:
    """Modules that the arguments of the function being compiled are or hold, for a function that is called with a model."""
    values = list(argument_scope().values())
    return [each for value in values for each in (value, *_held_by(value)) if isinstance(each, torch.nn.Module)]


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    return list((value if isinstance(value, Mapping) else getattr(value, "__dict__", {})).values())


def _path_parts(path: str) -> list[str]:
    """``L['self'].__dict__['_modules']['blocks'].0.attn1`` as ``["self", "blocks", "0", "attn1"]``."""
    import re

    parts = re.findall(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)", path)
    names = ["".join(part) for part in parts]
    return [name for name in names if name not in ("__dict__", "_modules", "__self__")]


def _along(scope: Mapping[str, Any], path: str) -> list[torch.nn.Module]:
    """The modules on the way along a path in the scope of the function being compiled."""
    current: Any = scope
    found: list[torch.nn.Module] = []
    for name in _path_parts(path):
        current = _inside(getattr(current, "__self__", current), name)
        if isinstance(current, torch.nn.Module):
            found.append(current)
    return found


def _inside(value: Any, name: str) -> Any:
    """What an object holds under a name or a place of a path; None where there is nothing."""
    if isinstance(value, torch.nn.Module) and name in value._modules:
        return value._modules[name]
    if isinstance(value, Mapping):
        return value.get(name)
    if isinstance(value, (list, tuple)) and name.isdigit():
        return value[int(name)] if int(name) < len(value) else None
    return getattr(value, name, None)
