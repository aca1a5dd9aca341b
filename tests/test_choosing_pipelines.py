"""Policies in a real pipeline of small parts: two videos of 50 steps, guided, against an eager model that follows the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from choosing_oracle import Choosing
from oracle import MaskedAttention
from test_choosing_blocks import VIDEO, at_step, by_blocks, eager, regional, whole
from test_estimating_blocks import Following
from test_static_policies import radial_mask
from tiny_models import wan
from tiny_pipelines import SIZE, wan_pipeline

import lvsa_compile
from lvsa_compile import AdaSpa, Haste, LoSA, Radial, XAttention
from lvsa_compile.policies.block_choice import CHOICES


class Teacher:
    """In the place of the forward of a pipeline's transformer: answers as the oracle does, and looks what ``run`` makes of the same."""

    def __init__(self, model, run, make_oracle, batched):
        self.right, self.run, self.make_oracle, self.batched = model.forward, run, make_oracle, batched
        self.last, self.step, self.branch, self.waiting, self.oracles, self.errors = None, -1, 0, [], [], []

    def __call__(self, hidden_states, timestep, encoder_hidden_states, attention_kwargs=None, return_dict=False):
        if self.last is None or float(timestep[0]) > self.last:
            self.oracles.append(self.make_oracle())
            self.step = -1
        self.step, self.branch = (self.step, 1) if float(timestep[0]) == self.last else (self.step + 1, 0)
        self.last = float(timestep[0])
        inputs = dict(hidden_states=hidden_states, timestep=timestep, encoder_hidden_states=encoder_hidden_states)
        self.oracles[-1].begin(self.step, self.branch)
        with self.oracles[-1]:
            answer = self.right(**inputs, return_dict=False)[0]
        self.waiting.append((inputs, answer))
        if len(self.waiting) == 1 + self.batched:
            joined = {name: torch.cat([given[name] for given, _ in self.waiting]) for name in inputs}
            found = self.run(**joined, return_dict=False)[0]
            self.errors.append(float((found - torch.cat([answer for _, answer in self.waiting])).abs().max()))
            self.waiting.clear()
        return (answer,)


OF_50_STEPS = AdaSpa(block=16, sparsity=0.6, min_tokens=0), LoSA(32, 16, threshold=0.7, min_tokens=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "start", "batched"),
    [
        *((OF_50_STEPS[0], start, False) for start in (whole, regional, by_blocks, eager)),
        *((OF_50_STEPS[0], start, True) for start in (whole, eager)),
        (OF_50_STEPS[1], whole, False),
        (OF_50_STEPS[1], by_blocks, True),
    ],
)
def test_a_pipeline_is_that_of_the_reference(policy, start, batched, monkeypatch):
    """Two videos of 50 steps, guided, each step from the latents of the eager model; one compile."""
    made, right = [], CHOICES[policy.name]

    def noting(mass, rows, share):
        found = right(mass, rows, share)
        made.extend(found[:, None].unbind())  # of each sample
        return found

    monkeypatch.setitem(CHOICES, policy.name, noting)
    run = start(wan(), policy)
    with torch.no_grad():
        if start in (by_blocks, eager):  # where a forward is followed from the second on
            for _ in range(2):
                run(**at_step(0, batch=1 + batched))
            lvsa_compile.reset()
    pipe = wan_pipeline()
    scheduled = {"adaspa": dict(dense=10, last=99, searches=(10, 30)), "losa": dict(dense=3, last=99, searches=(3,))}
    teacher = Teacher(pipe.transformer, run, lambda: Choosing(policy, scheduled[policy.name], VIDEO), batched)
    pipe.transformer.forward = teacher
    for video in range(2):
        generator = torch.Generator().manual_seed(video)
        pipe("a dog runs", negative_prompt="ugly", num_inference_steps=50, generator=generator, output_type="latent", **SIZE)
    wanted = [chooser.found for oracle in teacher.oracles for chooser in oracle.choosers.values()]
    assert len(teacher.oracles) == 2
    assert sum(map(len, wanted)) == len(made) == 2 * 2 * 2 * (2 if policy.name == "adaspa" else 1)
    # Made: by video, search, then branch and layer, a batch's samples one after the other; wanted: by video, branch and layer, then search.
    searches, per_video = len(wanted[0]), len(made) // 2
    order = [(v, s, b, n) for v in range(2) for s in range(searches) for b, n in itertools.product(range(2), range(2))]
    if batched:
        order = [(v, s, b, n) for v in range(2) for s in range(searches) for n, b in itertools.product(range(2), range(2))]
    assert per_video == searches * 4
    differ = blocks = 0
    for found, (video, search, branch, layer) in zip(made, order, strict=True):
        kept, margin = list(teacher.oracles[video].choosers.values())[2 * branch + layer].found[search]
        unlike = found != kept
        assert not unlike[margin > 1e-4].any()
        differ, blocks = differ + int(unlike.sum()), blocks + unlike.numel()
    assert differ <= 0.01 * blocks
    assert differ or max(teacher.errors) < 1e-5
    assert start is not whole or torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Fixed(MaskedAttention):
    """A mask that no step changes."""

    def begin(self, step, branch):
        pass


ESTIMATING = XAttention(block=16, stride=4, threshold=0.7, min_tokens=0)
KEEPING = Haste(ESTIMATING, threshold=6.0, layer_gate=(0.4, 0.8))
BY_MASS = Haste(LoSA(32, 16, threshold=0.7, dense_steps=0, min_tokens=0), threshold=6.0, layer_gate=None)
BANDED = Radial(decay=0.2, block=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "start", "batched"),
    [
        *((KEEPING, start, False) for start in (whole, regional, by_blocks, eager)),
        *((KEEPING, start, True) for start in (whole, eager)),
        (ESTIMATING, whole, False),
        (ESTIMATING, by_blocks, True),
        (BY_MASS, whole, False),
        (BY_MASS, by_blocks, True),
        (BANDED, whole, False),
        (BANDED, eager, True),
    ],
)
def test_a_pipeline_is_that_of_the_reference_where_calls_choose(policy, start, batched):
    """As above: where a choice is as good as even, by 1e-5, a step may differ; such are few."""
    run = start(wan(), policy)
    with torch.no_grad():
        if start in (by_blocks, eager):
            for _ in range(2):
                run(**at_step(0, batch=1 + batched))
            lvsa_compile.reset()
    pipe = wan_pipeline()
    mask = radial_mask(BANDED, 9, 12, 0, 0)
    teacher = Teacher(pipe.transformer, run, lambda: Fixed(mask) if policy is BANDED else Following(policy), batched)
    pipe.transformer.forward = teacher
    for video in range(2):
        generator = torch.Generator().manual_seed(video)
        pipe("a dog runs", negative_prompt="ugly", num_inference_steps=50, generator=generator, output_type="latent", **SIZE)
    assert len(teacher.oracles) == 2
    assert len(teacher.errors) == 2 * 50 * (1 if batched else 2)
    assert sum(error > 1e-5 for error in teacher.errors) <= 0.01 * len(teacher.errors)
    assert start is not whole or torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if policy in (KEEPING, BY_MASS):
        refreshed = [share for oracle in teacher.oracles for head in oracle.heads.values() for share in head.refreshed[1:]]
        assert 0 < sum(refreshed) < len(refreshed)
