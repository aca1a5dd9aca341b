"""Lowering ``cpu``: one C++ kernel that walks each query tile's key ranges.

The kernel (``kernels/cpu/``) is compiled when first needed, by the compiler that Inductor uses and into its cache.
"""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.errors import in_a_line
from lvsa_compile.ops.attention import accumulation_dtype, broadcast_strides, default_scale, define_attention_op, output_like, score_mask
from lvsa_compile.selection.contract import AttentionCall, Failure, Lowering
from lvsa_compile.selection.cpu_kind import compiler_flags, cpu_kind
from lvsa_compile.selection.rates import CpuRates, on_cpu

CPU_RATES = {
    ("plain", "float32"): CpuRates(0.75, 98e-6),
    ("plain", "bfloat16"): CpuRates(0.83, 100e-6),
    ("avx2", "float32"): CpuRates(1.06, 77e-6),
    ("avx2", "bfloat16"): CpuRates(1.10, 110e-6),
    ("avx512", "float32"): CpuRates(1.09, 110e-6),
    ("avx512", "bfloat16"): CpuRates(1.75, 100e-6),
    ("amx", "float32"): CpuRates(0.95, 85e-6),
    ("amx", "bfloat16"): CpuRates(0.83, 85e-6),
}
"""Measured by ``python benchmarks/cpu_rates.py``; see ``selection/rates.py``."""
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LARGEST_HEAD_DIM = 256

_Pointer, _Integer, _Strides = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64 * 4


class _Call(ctypes.Structure):
    """``LvsaAttention`` of the kernel, field by field."""

    _fields_ = (
        *((name, _Pointer) for name in ("query", "key", "value", "mask", "output", "log_sum_exp", "query_bounds", "key_ranges")),
        *((name, _Integer) for name in ("batch", "heads", "key_heads", "query_length", "key_length", "head_dim", "value_dim")),
        *((name, _Integer) for name in ("blocks", "ranges")),
        *((f"{name}_strides", _Strides) for name in ("query", "key", "value", "output", "mask")),
        ("scale", ctypes.c_double),
        ("dtype", _Integer),
        ("threads", _Integer),
        *((name, _Pointer) for name in ("kept", "known_log_sum_exp", "mass")),
        *((name, _Integer) for name in ("query_block", "key_block", "query_first", "key_first", "tokens")),
    )


def _kernel() -> ctypes.CDLL:
    """The compiled kernel; seconds at its first use on a machine.

    Raises:
        Exception: whatever the compiler or the loader has to say.
    """
    return _built(cpu_kind())


@functools.cache
def _built(kind: str) -> ctypes.CDLL:
    return compat.load_cpp(_source("attention.cpp"), compiler_flags(kind))


def _source(name: str) -> str:
    """A file of the kernel with those it includes put in their places."""
    text = resources.files("lvsa_compile.kernels").joinpath("cpu", name).read_text()
    return re.sub(r'^#include "(.+)"$', lambda found: _source(found[1]), text, flags=re.MULTILINE)


def _has_tiles() -> bool:
    """Whether the kernel multiplies bfloat16 on matrix units (AMX)."""
    return bool(_kernel().lvsa_has_tiles())


def _why_not_built() -> str | None:
    return _why_not(cpu_kind())


@functools.cache
def _why_not(kind: str) -> str | None:
    try:
        _built(kind)
    except Exception as error:  # no compiler, one that knows no vector extensions, a cache that cannot be written: all end the same
        return Failure(f"its kernel could not be compiled ({in_a_line(error)})")
    return None


def attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_ranges: Tensor,
    phase: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes ``lvsa::attention`` (see ``ops.attention.attention`` for shapes and meaning) on the CPU.

    Raises:
        MemoryError: there is no room for the packed keys and values of a few heads, at most as large as ``key`` and ``value``.
    """
    return run_kernel(query, key, value, query_bounds, key_ranges[int(phase)], scale, key_mask)


@dataclass(frozen=True)
class Blocks:
    """Blocks of the video for the kernel: their tokens, the video's first token in query and key sequence, and how many it has.

    ``kept`` has a bit for each key block, uint8 ``[B, heads, query blocks, bytes]``; all are attended where it is None.  ``mass``, where it
    is given, zeros ``[B, heads, query blocks, key blocks]``, gets the softmax probabilities in each block, weighed by the log-sum-exp of
    this call or by ``known``, ``[B, heads, tokens]``.
    """

    query_block: int
    key_block: int
    query_first: int
    key_first: int
    tokens: int
    kept: Tensor | None = None
    known: Tensor | None = None
    mass: Tensor | None = None


def run_kernel(
    query: Tensor, key: Tensor, value: Tensor, query_bounds: Tensor, ranges: Tensor, scale: float | None, key_mask: Tensor | None,
    blocks: Blocks = Blocks(0, 0, 0, 0, 0),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of query blocks over ``ranges`` ``[query_blocks, ranges, 2]``, and over blocks of the video that are kept.

    Raises:
        MemoryError: there is no room for packed keys and values.
    """
    output = output_like(query, value)
    log_sum_exp = torch.empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))
    ranges, bounds = ranges.contiguous(), query_bounds.contiguous()
    mask = None if key_mask is None else score_mask(key_mask, key.shape[2])
    batch, heads, query_length, head_dim = query.shape
    call = _Call(
        _address(query), _address(key), _address(value), _address(mask),
        _address(output), _address(log_sum_exp), _address(bounds), _address(ranges),
        batch, heads, key.shape[1], query_length, key.shape[2], head_dim, value.shape[3], ranges.shape[0], ranges.shape[1],
        query.stride(), key.stride(), value.stride(), output.stride(), broadcast_strides(mask),
        default_scale(head_dim, scale), _DTYPES[query.dtype], torch.get_num_threads(),
        _address(blocks.kept), _address(blocks.known), _address(blocks.mass),
        blocks.query_block, blocks.key_block, blocks.query_first, blocks.key_first, blocks.tokens,
    )  # fmt: skip
    if _kernel().lvsa_attention(ctypes.byref(call)):
        raise MemoryError(f"attention over {key.shape[2]} keys found no memory to pack keys and values in")
    return output, log_sum_exp


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    return _why_not_built()


def _refuses(call: AttentionCall) -> str | None:
    if call.dtype not in _DTYPES:
        return f"its kernel computes in float32, not in {call.dtype}"
    if call.dtype == torch.float16 and not _kernel().lvsa_knows_float16():
        return "the compiler of this machine knows no float16"
    if call.dtype == torch.bfloat16 and cpu_kind() == "amx" and not _has_tiles():
        return "dense attention in bfloat16 uses the matrix units of this CPU, and its own kernel was not let use them"
    if max(call.head_dim, call.value_dim) > _LARGEST_HEAD_DIM:
        return f"its kernel takes head dims up to {_LARGEST_HEAD_DIM}, not {max(call.head_dim, call.value_dim)}"
    return None


def _speedup(call: AttentionCall) -> float:
    return on_cpu(CPU_RATES, call.dtype, call.flops, call.density) if call.device.type == "cpu" else 0.0


LOWERING = Lowering(
    "cpu",
    "one C++ kernel that walks each tile's key ranges",
    priority=10,
    body=attention_cpu,
    operator=define_attention_op("attention_cpu", attention_cpu),
    unavailable=_unavailable,
    refuses=_refuses,
    speedup=_speedup,
)
