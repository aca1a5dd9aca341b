"""FlashInfer's block-sparse wrapper as its documentation describes it, on the CPU."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import oracle
import torch
from torch import Tensor

from lvsa_compile.lowering import flashinfer as lowering


class Wrapper:
    """What FlashInfer's documentation says of ``BlockSparseAttentionWrapper``, in float64; rounds nothing but the output."""

    made = 0

    def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        Wrapper.made += 1

    def plan(self, indptr, indices, M, N, R, C, num_qo_heads, num_kv_heads, head_dim, *, sm_scale, q_data_type, kv_data_type, o_data_type):
        assert indptr.dtype == indices.dtype == torch.int32
        assert len(indptr) == M // R + 1
        assert N % C == 0
        assert indices.max() < N // C
        self.mask = torch.zeros(M, N, dtype=torch.bool)
        for row in range(M // R):
            for column in indices[indptr[row] : indptr[row + 1]].tolist():
                assert not self.mask[row * R, column * C], "a block twice"
                self.mask[row * R : (row + 1) * R, column * C : (column + 1) * C] = True
        self.shapes = ((M, num_qo_heads, head_dim), (N, num_kv_heads, head_dim))
        self.scale, self.dtypes, self.out = sm_scale, (q_data_type, kv_data_type, kv_data_type), o_data_type

    def run(self, q, k, v, return_lse=False):
        assert return_lse
        assert (tuple(q.shape), tuple(k.shape)) == self.shapes
        assert q.is_contiguous(), "fa2 writes its output as if it were"
        assert k.stride() == v.stride(), "fa3 checks"
        assert v.shape == k.shape
        assert tuple(t.dtype for t in (q, k, v)) == self.dtypes
        out, lse = oracle.dense(*(t.transpose(0, 1)[None] for t in (q, k, v)), self.mask, self.scale)
        return out[0].transpose(0, 1).to(self.out), (lse[0].T / math.log(2.0)).float()


@contextlib.contextmanager
def instead_of_flashinfer():
    """The lowering plans and runs by the emulation."""
    lowering._planned.cache_clear()
    with mock.patch.object(lowering, "_wrapper_class", return_value=Wrapper), mock.patch.object(lowering, "_WORKSPACE_BYTES", 64):
        yield
    lowering._planned.cache_clear()
