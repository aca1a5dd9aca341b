"""Ops of torch: their schemas, tags and autocast rules, dense kernels, memory order, modes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from lvsa_compile.compat.calls import tree_leaves
from lvsa_compile.compat.sizes import size_hint

OPAQUE_OP_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
"""Inductor must hand such an op its inputs in the strides that were traced, since its output strides follow the query's."""

HOST_OP_TAGS = (*OPAQUE_OP_TAGS, torch.Tag.cudagraph_unsafe)
"""An op that reads tensors on the host: a CUDA graph would keep what they held when it was recorded."""

_OF_TORCH = frozenset("aten prim prims higher_order c10d _c10d_functional _c10d_functional_autograd quantized inductor lvsa".split())

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


def schema_of(operator: Any) -> Any:
    """The schema of an op, of a packet of overloads that of the default one; None of what is no op."""
    return getattr(getattr(operator, "default", operator), "_schema", None)


def name_of_op(operator: Any) -> str:
    """An op of torch or of this package by its name, one of another library by that and its name: ``"permute"``, ``"npu.npu_rms_norm"``."""
    name = str(schema_of(operator).name.split("::")[1])
    return f"{library}.{name}" if (library := library_of(operator)) else name


def library_of(operator: Any) -> str:
    """The library that an op is of; "" where that is torch or this package, and of what is no op."""
    namespace = getattr(operator, "namespace", None) or str(getattr(operator, "_qualified_op_name", "")).partition("::")[0]
    return "" if namespace in _OF_TORCH else str(namespace)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; -1 where torch does not count, as of tensors of inference mode."""
    return -1 if tensor.is_inference() else tensor._version


def assert_on_device(condition: Tensor, message: str) -> None:
    """Has the device stop with ``message`` where a bool scalar tensor is false, without waiting for it."""
    torch._assert_async(condition, message)


def returns_views(operator: OpOverload) -> bool:
    """Whether an op's results share memory with an argument that it does not write to."""
    returned = operator._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write


def arguments_by_name(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of an op by name, as far as they are given."""
    return {**dict(zip((argument.name for argument in schema_of(operator).arguments), args, strict=False)), **kwargs}


def written_by(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a call that the op writes to."""
    given = arguments_by_name(operator, args, kwargs)
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


def cpu_features() -> tuple[bool, bool, bool]:
    """Whether this CPU has AVX2, AVX-512, and AMX tiles, on which dense attention in bfloat16 runs."""
    return torch.cpu._is_avx2_supported(), torch.cpu._is_avx512_supported(), torch.cpu._is_amx_tile_supported()


def cudnn_attention_enabled() -> bool:
    """Whether the user left cuDNN's attention switched on."""
    return bool(torch.backends.cuda.cudnn_sdp_enabled())


def local_part(tensor: Tensor) -> tuple[Tensor, frozenset[int]] | None:
    """This process's part of a distributed tensor, and the axes that are cut; None for any other tensor."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None or not isinstance(tensor, distributed.DTensor):
        return None
    return tensor._local_tensor, frozenset(placement.dim for placement in tensor.placements if placement.is_shard())


def group_of(name: str) -> tuple[int, int]:
    """Size of a process group, and this process's rank in it."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    group = _resolve_process_group(name)  # type: ignore[arg-type]
    return group.size(), group.rank()


NO_BLOCKS = 1 << 30
"""``flex_attention``'s size of a block where it has no block mask (``_LARGE_SPARSE_BLOCK_SIZE``)."""


@contextlib.contextmanager
def no_modes() -> Iterator[None]:
    """Surroundings in which ops compute real values, whatever is traced outside."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch._C._DisablePythonDispatcher():
        yield
