"""Dense attention with its log-sum-exp, by the kernel a device's vendor ships, and the merge of two such answers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.kernels.configurations import power_of_two
from lvsa_compile.selection.contract import AttentionCall

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FEWEST_FOR_CUDNN = 64  # rows and keys; with fewer it is slow, and with one it fails
_GPU_DTYPES = (torch.bfloat16, torch.float16)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, score_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of all queries ``[B, heads, Sq, head_dim]`` to all keys ``[B, key_heads, Sk, head_dim]``.

    Any strides; batches may overlap in memory.  ``score_mask`` is added to the scores; on the CPU only.

    Returns:
        Output ``[B, heads, Sq, head_dim]`` and natural log-sum-exp ``[B, heads, Sq]``, float32 or, for float64, float64.
    """
    if query.device.type == "cpu":
        return compat.cpu_flash_attention(query, key, value, scale, score_mask)
    assert score_mask is None
    fits = query.shape[-1] <= 128 and min(query.shape[2], key.shape[2]) >= _FEWEST_FOR_CUDNN and compat.cudnn_attention_enabled()
    return compat.cuda_dense_attention(query, key, value, scale, cudnn=fits and _prefers_cudnn(query.device))


@functools.cache
def _prefers_cudnn(device: torch.device) -> bool:
    """Parts (Hopper, data-centre Blackwell) for which cuDNN has kernels of their own; the flash attention in torch has none."""
    return not torch.version.hip and torch.cuda.get_device_properties(device).major in (9, 10)


def why_not_dense_kernel(call: AttentionCall) -> str | None:
    """Why the dense kernel of the call's device cannot serve it, or None."""
    on_cpu = call.device.type == "cpu"
    if call.dtype not in (_CPU_DTYPES if on_cpu else _GPU_DTYPES):
        return f"the dense kernel does not take {call.dtype}"
    if call.head_dim != call.value_dim:
        return f"the dense kernel wants equal head dims, not {call.head_dim} and {call.value_dim}"
    if not on_cpu and call.masked:
        return "the dense kernel of the GPU is slow under a mask"
    if not on_cpu and (call.head_dim > 256 or call.head_dim % 8):
        return f"the dense kernel takes head dims up to 256 that are multiples of 8, not {call.head_dim}"
    return None


def merge_into(output: Tensor, log_sum_exp: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merges attention over more keys into ``output`` ``[B, heads, rows, value_dim]`` and its ``log_sum_exp``, in place.

    The merge of FlashAttention (arXiv 2205.14135).
    """
    if output.device.type != "cpu":
        _merge_by_triton(output, log_sum_exp, part, part_lse)
        return
    weight = torch.sigmoid(part_lse - log_sum_exp).nan_to_num_(0.0).unsqueeze(-1)  # nan: no key counts on either side
    output.copy_(torch.lerp(output.to(weight.dtype), part.to(weight.dtype), weight))
    torch.logaddexp(log_sum_exp, part_lse, out=log_sum_exp)


def _merge_by_triton(output: Tensor, log_sum_exp: Tensor, part: Tensor, part_lse: Tensor) -> None:
    from lvsa_compile.kernels.triton_merge import ROWS, merge_kernel

    batch, heads, rows, width = output.shape
    merge_kernel[(-(-rows // ROWS.value), batch * heads)](
        output, log_sum_exp, part, part_lse, *output.stride(), *log_sum_exp.stride(), *part.stride(), *part_lse.stride(),
        heads, rows, WIDTH=width, COLUMNS=power_of_two(width), num_warps=4,
    )  # fmt: skip
