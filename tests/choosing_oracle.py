"""Models whose attention chooses blocks, by the definition: an eager model that keeps what its searches found in plain Python.

``Chooser.found`` holds, for each search, the blocks that were kept and by how much the least of a query block beats the best left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lvsa_compile.policies import adaspa, losa


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
