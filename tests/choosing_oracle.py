"""Models whose attention chooses blocks, by the definition: an eager model that keeps what its searches found in plain Python.

``Chooser.found`` holds, for each search, the blocks that were kept and by how much the least of a query block beats the best left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lvsa_compile.policies import adaspa, losa
from lvsa_compile.policies.block_choice import CHOICES, unpacked


@dataclass
class Chooser:
    """What one policy does at its steps, for one attention and guidance branch; float64 throughout."""

    policy: object
    scheduled: dict  # dense steps at the start, the first step of the dense end, steps of searches
    kept: Tensor | None = None
    stored: Tensor | None = None
    searched: int = -1
    margin: float = math.inf
    found: list = field(default_factory=list)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, step: int, scale: float | None, first: int, tokens: int) -> Tensor:
        query, key, value = (t.double() for t in (query, key, value))
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        due = [at for at in self.scheduled["searches"] if at <= step]
        dense = step < self.scheduled["dense"] or step >= self.scheduled["last"] or not due
        if not dense and self.searched < due[-1]:
            self.search(query, key, scores, scale, first, tokens)
            self.searched = due[-1]
            dense = True
        if dense:
            self.stored = scores.logsumexp(-1)[:, :, first : first + tokens]
        else:
            scores[:, :, first : first + tokens, first : first + tokens].masked_fill_(~self.kept, -math.inf)
        return scores.softmax(-1) @ value

    def search(self, query: Tensor, key: Tensor, scores: Tensor, scale: float | None, first: int, tokens: int) -> None:
        video, own = slice(first, first + tokens), scores.logsumexp(-1)[:, :, first : first + tokens]
        policy, (query, key) = self.policy, (query[:, :, video], key[:, :, video])
        if policy.name == "adaspa":
            sizes, weighed_by = (policy.block, policy.block), own if self.stored is None else self.stored
        else:
            sizes, weighed_by = (policy.query_block, policy.key_block), own
        mass = adaspa.block_mass(query, key, block=sizes[0], key_block=sizes[1], scale=scale, log_sum_exp=weighed_by)
        if policy.name == "adaspa":
            sparsity = adaspa.head_sparsity(adaspa.recall(mass, policy.sparsity, mass.shape[-1]), policy.sparsity)
            kept = adaspa.choose_blocks(mass, sparsity, mass.shape[-1])
        else:
            rows = [min(sizes[0], tokens - at) for at in range(0, tokens, sizes[0])]
            beside = torch.tensor(rows, dtype=torch.float64) - mass.sum(-1)
            kept = losa.choose_blocks(mass, rows, policy.threshold, beside=beside)
        least, most = mass.masked_fill(~kept, math.inf).amin(-1), mass.masked_fill(kept, 0.0).amax(-1)
        self.margin = min(self.margin, float(((least - most) / least).min()))
        self.found.append((kept, (least - most) / least))
        self.kept = kept.repeat_interleave(sizes[0], 2)[:, :, :tokens].repeat_interleave(sizes[1], 3)[..., :tokens]


@dataclass
class Choosing(TorchFunctionMode):
    """Every attention of a forward over as many tokens is computed by a ``Chooser`` of its own: the n-th call by the n-th of a branch."""

    policy: object
    scheduled: dict
    tokens: int
    first: int = 0
    step: int = 0
    branch: int = 0
    choosers: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.calls = 0

    def begin(self, step: int, branch: int) -> None:
        self.step, self.branch, self.calls = step, branch, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        query, key, value = (given[name] for name in ("query", "key", "value"))
        if query.shape[2] < self.first + self.tokens or key.shape[2] != query.shape[2]:
            return func(*args, **kwargs)
        chooser = self.choosers.setdefault((self.branch, self.calls), Chooser(self.policy, self.scheduled))
        self.calls += 1
        output = chooser.attend(query, key, value, self.step, given.get("scale"), self.first, self.tokens)
        return output.to(query.dtype)

    @property
    def margin(self) -> float:
        return min(chooser.margin for chooser in self.choosers.values())


def check_steps(draw, bodies, most_tokens=300, blocks=(1, 3, 16, 24, 64, 128)):
    """Dense, searching and sparse calls in any order: outputs and what is kept, against float64 by the definition."""
    query_block, key_block = (draw(st.sampled_from(blocks)) for _ in range(2))
    prefix, tokens, suffix = draw(st.sampled_from([0, 1, 7, 16])), draw(st.integers(1, most_tokens)), draw(st.sampled_from([0, 5]))
    length, heads, group, batch = prefix + tokens + suffix, draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    rows, columns = -(-tokens // query_block), -(-tokens // key_block)
    keeps = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 9)))
    sizes = [(3, batch, 2), (3, batch, heads * group, rows, -(-columns // 8)), (3, batch, heads * group, tokens)]
    junk = [torch.zeros(sizes[0], dtype=torch.int32), torch.randint(0, 255, sizes[1], dtype=torch.uint8), torch.randn(sizes[2])]
    states = [[each.clone() for each in junk[: 2 + keeps]] for _ in bodies]
    bounds = sorted({0, *range(prefix, prefix + tokens, query_block), prefix + tokens, length})
    table = torch.tensor([[[[[0, length]]] * (len(bounds) - 1)]] * 3, dtype=torch.int32)
    counts = draw(st.integers(1, columns))
    CHOICES["of most mass"] = lambda mass, rows, share: mass >= mass.topk(counts, -1).values[..., -1:]
    key_mask = torch.rand(batch, 1, 1, length) < 0.9 if draw(st.booleans()) else None
    if key_mask is not None:
        key_mask[..., 0] = True
    given = dict(choice="of most mass", share=0.5, query_block=query_block, key_block=key_block, searches=2, video=[prefix, prefix, tokens])
    kept = stored = None
    done = 0
    for row in draw(st.lists(st.sampled_from([0, 1, 2]), min_size=2, max_size=4)):
        query, key, value = (torch.randn(batch, n, length, 8) for n in (heads * group, heads, heads))
        scores = query.double() @ key.double().repeat_interleave(group, 1).mT * 8**-0.5
        scores = scores if key_mask is None else scores.masked_fill(~key_mask, -math.inf)
        own = scores.logsumexp(-1)
        if row < 2 and done > row:
            of_tokens = kept.repeat_interleave(query_block, 2)[:, :, :tokens].repeat_interleave(key_block, 3)[..., :tokens]
            scores[:, :, prefix : prefix + tokens, prefix : prefix + tokens].masked_fill_(~of_tokens, -math.inf)
        elif row < 2:
            weighed_by = stored if stored is not None and keeps else own[:, :, prefix : prefix + tokens]
            weights = (scores[:, :, prefix : prefix + tokens, prefix : prefix + tokens] - weighed_by[..., None]).exp()
            weights = torch.nn.functional.pad(weights, (0, columns * key_block - tokens, 0, rows * query_block - tokens))
            mass = weights.unflatten(-1, (columns, key_block)).sum(-1).unflatten(2, (rows, query_block)).sum(3)
            ordered = mass.sort(-1, descending=True).values
            gaps = ordered[..., counts - 1] - ordered[..., counts] if counts < columns else torch.ones(1)
            if float(gaps.min()) < 1e-4 * float(mass.max()):
                return  # a choice that rounding makes
            kept, done = mass >= ordered[..., counts - 1 : counts], row + 1
        if row == 2 or (done == row + 1 and scores.logsumexp(-1).equal(own)):
            stored = own[:, :, prefix : prefix + tokens]
        expected = scores.softmax(-1).nan_to_num(0.0) @ value.double().repeat_interleave(group, 1)
        of_rows = torch.tensor(bounds, dtype=torch.int32), table, torch.tensor(row, dtype=torch.int32), torch.tensor(1, dtype=torch.int32)
        for body, state in zip(bodies, states, strict=True):
            before = [each.clone() for each in state]
            output, log_sum_exp = body(query, key, value, *of_rows, state, key_mask=key_mask, **given)
            assert (output - expected).abs().max() < 1e-5, body
            assert torch.equal(log_sum_exp.isinf(), scores.logsumexp(-1).isinf())
            assert (log_sum_exp - scores.logsumexp(-1)).nan_to_num(0.0, 0.0, 0.0).abs().max() < 1e-5
            assert state[0][1, :, 0].tolist() == [done] * batch
            if kept is not None:
                assert torch.equal(unpacked(state[1][1], columns), kept), body
            for one, other in zip(before, state, strict=True):
                assert torch.equal(one[[0, 2]], other[[0, 2]]), "an entry of another call"
