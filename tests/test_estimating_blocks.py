"""Policies that choose blocks in each call: the op by its definition, models against an eager one that follows the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VideoDiT, dit_inputs, randomise, wan, wan_inputs
from torch.overrides import TorchFunctionMode

import lvsa_compile
from lvsa_compile import Haste, LoSA, XAttention
from lvsa_compile.errors import OptionError
from lvsa_compile.lowering.cpu_dynamic import dynamic_attention_cpu
from lvsa_compile.lowering.triton_dynamic import dynamic_attention_triton
from lvsa_compile.ops.dynamic_attention import dynamic_attention
from lvsa_compile.policies import haste, losa, xattention
from lvsa_compile.policies.block_choice import unpacked
from lvsa_compile.policies.given import given_policy, policy_as_dict
from lvsa_compile.policies.xattention.choice import blocks_of

XATTENTION = XAttention(block=16, stride=4, threshold=0.7, min_tokens=0)
HASTE = Haste(XATTENTION, threshold=6.0, layer_gate=None)
LOSA = LoSA(query_block=32, key_block=16, threshold=0.6, dense_steps=0, min_tokens=0)
VIDEO = 9 * 3 * 4
BODIES = [dynamic_attention, dynamic_attention_cpu]


class Head:
    """What each head of one attention and guidance branch keeps, by the definition; float64 but for the choice."""

    def __init__(self, policy):
        self.policy = policy
        self.base = policy.base if policy.name == "haste" else policy
        self.sizes = (self.base.query_block, self.base.key_block) if self.base.name == "losa" else (self.base.block, self.base.block)
        self.anchors = self.kept = None
        self.refreshed = []

    def attend(self, query, key, value, scale, first, tokens, dense, key_mask=None):
        group = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(group, 1) for each in (key, value))
        scores = query.double() @ key.double().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        video = slice(first, first + tokens)
        self.counts = None
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask, -math.inf)
            self.counts = key_mask.expand(*query.shape[:2], 1, -1)[:, :, 0, video]
        if not dense:
            attended = self.choose(query[:, :, video], key[:, :, video], scale, scores.logsumexp(-1)[:, :, video])
            of_tokens = attended.repeat_interleave(self.sizes[0], 2)[:, :, :tokens].repeat_interleave(self.sizes[1], 3)[..., :tokens]
            scores[:, :, video, video] = scores[:, :, video, video].masked_fill(~of_tokens, -math.inf)
        return (scores.softmax(-1) @ value.double()).to(query.dtype)

    def found(self, query, key, scale, log_sum_exp):
        base = self.base
        if base.name == "losa":
            sizes = dict(block=base.query_block, key_block=base.key_block)
            key = key.double()
            if self.counts is not None:  # keys that a mask leaves out have no mass: one more feature makes their scores small
                query = torch.cat([query.double(), torch.ones_like(query[..., :1]).double()], -1)
                key = torch.cat([key, torch.where(self.counts, 0.0, -1e9)[..., None]], -1)
                scale = (key.shape[-1] - 1) ** -0.5 if scale is None else scale
            mass = losa.block_mass(query.double(), key, scale=scale, log_sum_exp=log_sum_exp, **sizes)
            rows = torch.tensor([min(base.query_block, query.shape[2] - at) for at in range(0, query.shape[2], base.query_block)])
            return losa.choose_blocks(mass, rows, base.threshold, beside=(rows - mass.sum(-1)).clamp(min=0.0))
        threshold = base.threshold if isinstance(base.threshold, float) else torch.tensor(base.threshold)
        if self.counts is None:
            return xattention.choose_blocks(query, key, block=base.block, stride=base.stride, threshold=threshold, scale=scale)
        mass = xattention.estimated_mass(query, key, block=base.block, stride=base.stride, scale=scale, counts=self.counts)
        return blocks_of(mass, torch.as_tensor(threshold, dtype=torch.float64))

    def choose(self, query, key, scale, log_sum_exp):
        """What is attended: where blocks are chosen by their mass, everything by heads that choose anew."""
        found = self.found(query, key, scale, log_sum_exp)
        if self.policy.name != "haste":
            return found
        if self.counts is None:
            means = query.float().mean(2), key.float().mean(2)
        else:
            left = self.counts.float()[..., None]
            means = tuple((each.float() * left).sum(2) / left.sum(2).clamp(min=1) for each in (query, key))
        if self.anchors is None:
            again = torch.ones(found.shape[:2], dtype=torch.bool)
            self.anchors, self.kept = means, found
        else:
            again = haste.refresh(haste.drift(*means, *self.anchors, self.policy.relative), self.policy.threshold, self.policy.layer_gate)
        self.refreshed.append(float(again.float().mean()))
        self.anchors = tuple(torch.where(again[..., None], mean, anchor) for mean, anchor in zip(means, self.anchors, strict=True))
        self.kept = torch.where(again[..., None, None], found, self.kept)
        return self.kept | again[..., None, None] if self.base.name == "losa" else self.kept


class Following(TorchFunctionMode):
    """Every attention of a forward over the video is computed by a ``Head`` of its own: the n-th call by the n-th of a branch."""

    def __init__(self, policy, tokens=VIDEO, first=0, dense_steps=0):
        super().__init__()
        self.policy, self.tokens, self.first, self.dense_steps, self.heads = policy, tokens, first, dense_steps, {}

    def begin(self, step, branch=0):
        self.step, self.branch, self.calls = step, branch, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        length = given["query"].shape[2]
        if length < self.first + self.tokens or given["key"].shape[2] != length:
            return func(*args, **kwargs)
        head = self.heads.setdefault((self.branch, self.calls), Head(self.policy))
        self.calls += 1
        dense = self.step < self.dense_steps
        return head.attend(given["query"], given["key"], given["value"], given.get("scale"), self.first, self.tokens, dense)


def at_step(step, branch=0, batch=1):
    """Inputs of a denoising step, other at each one and for each guidance branch."""
    inputs = wan_inputs(timestep=900.0 - 50 * step, batch=batch)
    noise = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(step))
    hidden, text = inputs["hidden_states"] + 0.1 * step * noise, inputs["encoder_hidden_states"] + branch
    return {**inputs, "hidden_states": hidden, "encoder_hidden_states": text}


# --- the op -------------------------------------------------------------------------------------------------------------------------


def check_calls(draw, bodies, most_tokens=200):
    """Calls in dense and sparse rows, of two entries in turn."""
    block, stride = draw(st.sampled_from([(16, 4), (16, 16), (24, 8), (32, 8), (64, 8)]))
    heads, group, batch = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    thresholds = tuple(draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])) for _ in range(heads * group))
    threshold = thresholds if draw(st.booleans()) else thresholds[0]
    policy = XAttention(block=block, stride=stride, threshold=threshold, min_tokens=0)
    gate = draw(st.sampled_from([None, (0.4, 0.8)]))
    kept_on = draw(st.booleans())
    if kept_on and draw(st.booleans()):
        policy = LoSA(block, draw(st.sampled_from([16, 24, 32])), threshold=draw(st.sampled_from([0.3, 0.7])), min_tokens=0)
    if kept_on:
        relative = draw(st.booleans())
        policy = Haste(policy, draw(st.sampled_from([0.0, 0.1, 3.9] if relative else [0.0, 0.6, 1e9])), gate, relative)
    prefix, tokens, suffix = draw(st.sampled_from([0, 5])), draw(st.integers(1, most_tokens)), draw(st.sampled_from([0, 3]))
    length = prefix + tokens + suffix
    torch.manual_seed(draw(st.integers(0, 9)))
    base = policy.base if kept_on else policy
    numbers, key_block = ([base.threshold], base.key_block) if base.name == "losa" else (list(base.numbers), block)
    all_heads, rows, columns = heads * group, -(-tokens // block), -(-tokens // key_block)
    state = [torch.zeros(3, batch, dtype=torch.int32)]
    if kept_on:
        state += [torch.randint(0, 255, (3, batch, all_heads, rows, -(-columns // 8)), dtype=torch.uint8)]
        state += [torch.randn(3, batch, 2, all_heads, 8)]
    states = [[each.clone() for each in state] for _ in bodies]
    bounds = torch.tensor(sorted({0, *range(prefix, prefix + tokens, block), prefix + tokens, length}), dtype=torch.int32)
    table = torch.tensor([[[[[0, length]]] * (len(bounds) - 1)]] * 2, dtype=torch.int32)
    given = dict(
        choice=base.name, numbers=numbers, query_block=block, key_block=key_block, video=[prefix, prefix, tokens],
        most_drift=policy.threshold if kept_on else -1.0, layer_gate=list(gate or ()) if kept_on else [],
        relative=policy.relative if kept_on else False,
    )  # fmt: skip
    key_mask = torch.rand(batch, 1, 1, length) < draw(st.sampled_from([0.5, 0.9])) if draw(st.booleans()) else None
    if key_mask is not None:
        key_mask[..., prefix : prefix + tokens // 3] = False
        key_mask[..., -1] = True
    by_definition = [Head(policy) for _ in range(2)]
    tensors = [torch.randn(batch, n, length, 8) for n in (all_heads, heads, heads)]
    for row, entry in draw(st.lists(st.tuples(st.sampled_from([0, 0, 0, 1]), st.sampled_from([0, 1])), min_size=1, max_size=4)):
        tensors = [each + 0.1 * torch.randn_like(each) for each in tensors]
        expected = by_definition[entry].attend(*tensors, None, prefix, tokens, row == 1, key_mask).nan_to_num(0.0)
        scalars = [torch.tensor(n, dtype=torch.int32) for n in (row, entry)]
        for body, kept in zip(bodies, states, strict=True):
            output, _ = body(*tensors, bounds, table, *scalars, kept, key_mask=key_mask, **given)
            assert (output - expected).abs().max() < 1e-5, body
            if kept_on and by_definition[entry].kept is not None:
                assert torch.equal(unpacked(kept[1][entry], columns), by_definition[entry].kept)


@pytest.mark.kernel
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_each_call_attends_the_blocks_of_the_definition(data):
    check_calls(data.draw, BODIES)


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_triton_attends_the_blocks_of_the_definition(data):
    pytest.importorskip("triton")
    check_calls(data.draw, [dynamic_attention_triton], most_tokens=40)


@pytest.mark.parametrize("name", ["dynamic_attention", "dynamic_attention_cpu"])
@pytest.mark.parametrize("keeps", [False, True])
def test_opcheck(name, keeps):
    tensors = [torch.randn(2, 2, 40, 16) for _ in range(3)]
    table = torch.tensor([0, 4, 20, 36, 40], dtype=torch.int32), torch.tensor([[[[[0, 40]]] * 4]], dtype=torch.int32)
    state = [torch.zeros(8, 2, dtype=torch.int32), torch.zeros(8, 2, 2, 2, 1, dtype=torch.uint8), torch.zeros(8, 2, 2, 2, 16)]
    scalars = [torch.tensor(n, dtype=torch.int32) for n in (0, 3)]
    given = dict(
        scale=0.2, choice="xattention", numbers=[4.0, 0.5], query_block=16, key_block=16, most_drift=0.5 if keeps else -1.0,
        layer_gate=[0.4, 0.8], relative=False, video=[4, 4, 32],
    )  # fmt: skip
    operator = getattr(torch.ops.lvsa, name).default
    torch.library.opcheck(operator, (*tensors, *table, *scalars, state if keeps else state[:1]), given)


# --- models -------------------------------------------------------------------------------------------------------------------------


def whole(model, policy, **more):
    return torch.compile(model, backend="lvsa", options={"policy": policy, "inner": "aot_eager", **more})


def by_blocks(model, policy, **more):
    for block in model.blocks:
        block.compile(backend="lvsa", options={"policy": policy, "inner": "aot_eager", **more})
    return model


def eager(model, policy, **more):
    return lvsa_compile.enable(model, policy=policy, **more)


@pytest.mark.parametrize("start", [whole, by_blocks, eager])
@pytest.mark.parametrize(
    "policy",
    [XATTENTION, HASTE, Haste(XATTENTION, 0.49, (0.4, 0.8), relative=True), Haste(LOSA, 6.0, None)],
    ids=["each", "kept", "gate", "mass"],
)
def test_a_model_is_that_of_the_reference(policy, start):
    """Two videos, guidance by two calls; the first forward may be one that is not followed yet."""
    alone, model = wan(), wan()
    run = start(model, policy)
    with torch.no_grad():
        if start is not whole:
            for _ in range(2):
                run(**at_step(0))
            lvsa_compile.reset()
        for _ in range(2):
            oracle, unlike = Following(policy), []
            for step, branch in itertools.product(range(6), range(2)):
                inputs = at_step(step, branch)
                oracle.begin(step, branch)
                with oracle:
                    expected = alone(**inputs)[0]
                assert (run(**inputs)[0] - expected).abs().max() < 2e-5, (step, branch)
                unlike.append(float((alone(**inputs)[0] - expected).abs().max()))
            assert max(unlike) > 1e-3, "it was sparse"
            if policy.name == "haste":
                refreshed = [share for head in oracle.heads.values() for share in head.refreshed[1:]]
                assert 0 < sum(refreshed) < len(refreshed), "some kept, some chose anew"


def test_dense_steps_choose_nothing_and_the_first_sparse_one_does():
    alone, run, oracle = wan(), whole(wan(), HASTE, dense_steps=2), Following(HASTE, dense_steps=2)
    with torch.no_grad():
        for step in range(5):
            inputs = at_step(step)
            oracle.begin(step)
            with oracle:
                expected = alone(**inputs)[0]
            assert (run(**inputs)[0] - expected).abs().max() < 2e-5, step
    assert {len(head.refreshed) for head in oracle.heads.values()} == {3}


def test_samples_of_a_batch_keep_blocks_of_their_own():
    alone, run, oracle = wan(), whole(wan(), HASTE), Following(HASTE)
    with torch.no_grad():
        for step in range(4):
            inputs = at_step(step, batch=2)
            inputs["encoder_hidden_states"][1] += 1.0
            oracle.begin(step)
            with oracle:
                expected = alone(**inputs)[0]
            assert (run(**inputs)[0] - expected).abs().max() < 2e-5, step


def test_text_in_the_sequence_is_attended_by_all():
    def block(model, tokens, grid, text):
        joint = torch.cat([text, tokens], 1)
        return tokens + model.attention(joint)[:, text.shape[1] :]

    model = randomise(VideoDiT(block))
    run, oracle = whole(model, XATTENTION, strict=True), Following(XATTENTION, first=7)
    with torch.no_grad():
        for step in range(3):
            inputs = dit_inputs(timestep=900.0 - step)
            oracle.begin(step)
            with oracle:
                expected = model(*inputs)
            assert (run(*inputs) - expected).abs().max() < 1e-5
    assert oracle.calls == 1


def test_nothing_compiles_again_and_what_is_kept_is_told():
    run = whole(wan(), {"name": "haste", "base": {"name": "xattention", "block": 16, "stride": 4, "min_tokens": 0}, "threshold": 1.0})
    with torch.no_grad():
        for _, step in itertools.product(range(2), range(4)):
            run(**at_step(step))
            run(**at_step(step, 1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert "MiB kept from step to step" in str(lvsa_compile.reports()[0])


def test_a_policy_in_a_policy_is_spelled_as_json_has_it():
    spelled = {"name": "haste", "base": {"name": "xattention", "block": 64, "threshold": [0.5, 0.9]}, "layer_gate": [0.2, 0.9]}
    policy = given_policy("policy", spelled)
    assert policy == Haste(XAttention(block=64, threshold=(0.5, 0.9)), layer_gate=(0.2, 0.9))
    assert policy_as_dict(policy) == spelled
    assert policy_as_dict(Haste(LOSA))["base"]["name"] == "losa"
    assert policy_as_dict(Haste()) == {"name": "haste"}


# --- what is said -------------------------------------------------------------------------------------------------------------------


def test_any_batch_runs_where_nothing_is_kept_for_each_sample():
    inputs = wan_inputs(batch=2)
    for name in ("hidden_states", "timestep", "encoder_hidden_states"):
        torch._dynamo.mark_dynamic(inputs[name], 0)
    with torch.no_grad():
        torch.compile(wan(), backend="lvsa", options={"policy": XATTENTION, "inner": "eager"})(**inputs)
    assert len(lvsa_compile.reports()[0].sparse_sites) == 2


def test_thresholds_are_of_the_models_heads():
    with pytest.raises(Exception, match=r"option threshold=\(0.5, 0.6, 0.7\): the model has 2 heads"), torch.no_grad():
        whole(wan(), XAttention(block=16, stride=4, threshold=(0.5, 0.6, 0.7), min_tokens=0))(**at_step(0))
    policy = XAttention(block=16, stride=4, threshold=(0.3, 0.9), min_tokens=0)
    alone, run, oracle = wan(), whole(wan(), policy), Following(policy)
    oracle.begin(0)
    with torch.no_grad(), oracle:
        expected = alone(**at_step(0))[0]
    with torch.no_grad():
        assert (run(**at_step(0))[0] - expected).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: XAttention(block=8), "option block=8: a block has 16 to 128 tokens"),
        (lambda: XAttention(block=64, stride=48), "option stride=48: it does not divide a block of 64 tokens"),
        (lambda: XAttention(threshold=1.5), "option threshold=1.5: not shares of the mass"),
        (lambda: XAttention(text="compete"), "option text='compete': text that competes with the video is not there. Give 'keep'"),
        (lambda: XAttention(min_tokens=-1), "option min_tokens=-1: not a number of tokens of the video"),
        (lambda: Haste("adaspa"), r"option base=AdaSpa\(.*: its blocks cannot be kept by heads. Give 'xattention' or 'losa'"),
        (lambda: Haste("xattn"), "option base='xattn': no policy has this name. Did you mean 'xattention'?"),
        (lambda: Haste(threshold=-1), "option threshold=-1: it is a distance"),
        (lambda: Haste(layer_gate=(0.9, 0.1)), r"option layer_gate=\(0.9, 0.1\): not two rising shares"),
        (lambda: Haste(relative=1), "option relative=1: not True or False"),
        (lambda: Haste(relative=True), "option threshold=30.0: relative drifts hardly reach it. Give a number such as 0.5"),
    ],
)
def test_fields_that_cannot_be(make, message):
    with pytest.raises(OptionError, match=message):
        make()
