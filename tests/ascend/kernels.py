"""What two ops of torch_npu mean by its documentation (2.13), in plain PyTorch on the CPU: to run lowerings for NPUs without one.

Where torch_npu is installed its own schemas and meta kernels stay; where it is not, the schemas are those written here, which a test
in the environment of torch_npu holds against the real ones.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

SCHEMAS = {
    "npu_fused_infer_attention_score": "(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, Tensor? atten_mask=None,"
    " SymInt[]? actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None, Tensor? block_table=None, int num_heads=1, float scale=1.,"
    ' str input_layout="BSH", int num_key_value_heads=0, int block_size=0, bool softmax_lse_flag=False) -> (Tensor, Tensor)',
    "npu_block_sparse_attention": "(Tensor query, Tensor key, Tensor value, Tensor block_sparse_mask, int[] block_shape, *,"
    ' str q_input_layout="TND", str kv_input_layout="TND", int num_key_value_heads=1, float scale_value=0., int inner_precise=1,'
    " int[]? actual_seq_lengths=None, int[]? actual_seq_lengths_kv=None, int? softmax_lse_flag=0) -> (Tensor, Tensor)",
    "npu_fusion_attention": "(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None,"
    " Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., int pre_tockens=2147483647,"
    " int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None,"
    ' int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False, str softmax_layout="", Tensor? sink=None,'
    " Tensor? dropout_mask=None, int seed=0, int offset=0) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
}
"""The parts of the schemas that calls here use, in the order of the real ones."""
DTYPES = {torch.bfloat16, torch.float16}
PAGE_SIZES = (128, 256, 384, 512)
calls: list[str] = []


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``[B, heads, S, D]``; result and log-sum-exp, in float32 as the op computes."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.float().repeat_interleave(group, 1) for tensor in (key, value))
    scores = query.float() @ key.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).to(query.dtype), scores.logsumexp(-1, keepdim=True)


def fused_infer_attention_score(
    query, key, value, *, actual_seq_lengths_kv=None, block_table=None, num_heads=1, scale=1.0, input_layout="BSH", num_key_value_heads=0,
    block_size=0, softmax_lse_flag=False, **left_out,
):  # fmt: skip
    """``query [B, S, N, D]``; keys the same, or pages ``[pages, block_size, N * D]`` chosen by ``block_table``."""
    calls.append("npu_fused_infer_attention_score")
    assert not any(value is not None for name, value in left_out.items() if name in ("atten_mask", "pse_shift", "actual_seq_lengths"))
    assert input_layout == "BSND"
    assert query.dtype in DTYPES
    assert all(tensor.is_contiguous() for tensor in (query, key, value))
    batch, _, heads, width = query.shape
    assert heads == num_heads <= 256
    assert width % 16 == 0
    assert width <= 512
    assert heads * width < 65535
    assert batch <= 65536
    if block_table is not None:
        assert block_size in PAGE_SIZES
        assert block_table.dtype == torch.int32
        assert key.shape[1] == block_size
        assert key.shape == value.shape
        (keys,) = actual_seq_lengths_kv
        pages = -(-keys // block_size)
        assert block_table.shape[0] == batch
        assert block_table.shape[1] >= pages
        key, value = (
            pool[block_table[:, :pages].long()].flatten(1, 2)[:, :keys].unflatten(-1, (num_key_value_heads, -1)) for pool in (key, value)
        )
    assert key.shape == value.shape
    assert key.shape[2] == num_key_value_heads
    output, log_sum_exp = _attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)), scale)
    return output.transpose(1, 2).contiguous(), log_sum_exp if softmax_lse_flag else log_sum_exp.new_zeros(1)


def block_sparse_attention(
    query, key, value, block_sparse_mask, block_shape, *, q_input_layout="TND", kv_input_layout="TND", num_key_value_heads=1,
    scale_value=0.0, inner_precise=1, actual_seq_lengths=None, actual_seq_lengths_kv=None, softmax_lse_flag=0,
):  # fmt: skip
    """``[B, N, S, D]`` under a mask of blocks ``[B, N, query blocks, key blocks]``."""
    calls.append("npu_block_sparse_attention")
    assert q_input_layout == kv_input_layout == "BNSD"
    assert query.shape[3] in (64, 128)
    assert block_shape[1] % 128 == 0
    assert inner_precise == 0 or query.dtype != torch.bfloat16
    rows, columns = (math.ceil(tensor.shape[2] / size) for tensor, size in zip((query, key), block_shape, strict=True))
    assert block_sparse_mask.shape == (*query.shape[:2], rows, columns)
    assert block_sparse_mask.dtype == torch.int8
    assert key.shape[1] == num_key_value_heads
    mask = block_sparse_mask.bool().repeat_interleave(block_shape[0], 2).repeat_interleave(block_shape[1], 3)
    return _attention(query, key, value, scale_value, mask[:, :, : query.shape[2], : key.shape[2]])


def rms_norm(x, gamma, epsilon=1e-6):
    """What diffusers calls where torch_npu is: the normed tensor, and one over the root."""
    root = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    return (x.float() * root).to(x.dtype) * gamma, root


def fusion_attention(query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, *others):
    """Attention as models call it that know of NPUs; a mask is True where a key is left out."""
    turned = [tensor.transpose(1, 2) if input_layout == "BSND" else tensor for tensor in (query, key, value)]
    output, _ = _attention(*turned, scale, None if atten_mask is None else ~atten_mask)
    nothing = query.new_empty(0)
    return output.transpose(1, 2) if input_layout == "BSND" else output, nothing, nothing, nothing, 0, 0, 0


def _fusion_fake(query, *others, **more):
    nothing = query.new_empty(0)
    return torch.empty_like(query), nothing, nothing, nothing, 0, 0, 0


def _fused_fake(query, key, value, *, num_heads=1, softmax_lse_flag=False, **others):
    batch, length, heads, _ = query.shape
    sums = (batch, heads, length, 1) if softmax_lse_flag else (1,)
    return torch.empty_like(query), query.new_empty(sums, dtype=torch.float32)


def _block_sparse_fake(query, key, value, block_sparse_mask, block_shape, **others):
    return torch.empty_like(query), query.new_empty((*query.shape[:3], 1), dtype=torch.float32)


@functools.cache
def install() -> torch.library.Library:
    """Gives the ops kernels for the CPU; defines them where torch_npu has not."""
    library = torch.library.Library("npu", "FRAGMENT")
    for name, kernel, fake in (
        ("npu_fused_infer_attention_score", fused_infer_attention_score, _fused_fake),
        ("npu_block_sparse_attention", block_sparse_attention, _block_sparse_fake),
        ("npu_fusion_attention", fusion_attention, _fusion_fake),
    ):
        if not hasattr(torch.ops.npu, name):
            library.define(name + SCHEMAS[name])
            torch.library.register_fake(f"npu::{name}", fake, lib=library)
        library.impl(name, kernel, "CPU")
    if hasattr(torch.ops.npu, "npu_rms_norm"):
        library.impl("npu_rms_norm", rms_norm, "CPU")
    return library
