"""Masks at video sites: kept exactly, by parts; what cannot be told apart stays dense."""

from __future__ import annotations

import os

import oracle
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from plans import key_range_table
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise
from torch import nn
from torch.overrides import TorchFunctionMode

import lvsa_compile
from lvsa_compile.policies.lvsa.frame_pattern import FramePattern
from lvsa_compile.policies.tables import VideoSpan, intersection, query_blocks

OPTIONS = {**EXACT, "inner": "eager"}
VIDEO, TEXT = 108, 7
VALID = torch.arange(VIDEO + TEXT) < VIDEO + 5


class Padded(nn.Module):
    """[video | text], the text padded; ``spell(valid)`` makes the mask of ``valid`` ``[B, S]``, an input."""

    def __init__(self, spell):
        super().__init__()
        self.inner = VideoDiT(lambda model, tokens, grid, text: self.block(tokens, text))
        self.spell, self.valid = spell, None

    def block(self, tokens, text):
        joint = torch.cat([tokens, text], 1)
        return self.inner.attention(joint, attn_mask=self.spell(self.valid))[:, : tokens.shape[1]]

    def forward(self, latents, timestep, text, valid):
        self.valid = valid
        out = self.inner(latents, timestep, text)
        self.valid = None
        return out


def outer(m):
    return (m[:, None, None, :] & m[:, None, :, None]).bool()


def repeated(m):
    rows = m.view(m.shape[0], 1, 1, -1).repeat(1, 1, m.shape[1], 1)
    return (rows & rows.transpose(2, 3)).bool()


def three_axes(m):
    return torch.logical_and(m[:, None, :], m[:, :, None])[:, None]


def product(m):
    return (m.float().unsqueeze(1) * m.float().unsqueeze(2)).unsqueeze(1).bool()


def by_int(m):
    return torch.mul(m.int()[:, None, None], m.int()[:, None, :, None]).to(torch.bool)


SPELLINGS = [outer, repeated, three_axes, product, by_int]


def inputs_of(batch=2):
    valid = VALID.expand(batch, -1).clone()
    valid[0, VIDEO + 2 :] = False
    return (*dit_inputs(batch=batch), valid)


def with_masks(model, inputs, masks):
    """The model's answer with ``masks`` bool ``[B, 1, S, S]`` at its attention, and zero for rows without keys."""

    class Anywhere(oracle.MaskedAttention):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                self.calls += 1
                return func(*args, **{**kwargs, "attn_mask": self.mask})
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Anywhere(masks) as mode:
        answer = model(*inputs)
    assert mode.calls
    return answer


@pytest.mark.parametrize("spell", SPELLINGS, ids=lambda f: f.__name__)
def test_padding_of_queries_and_keys_at_a_sparse_site(spell):
    model, inputs = randomise(Padded(spell)), inputs_of()
    with torch.no_grad():
        output = torch.compile(model, backend="lvsa", options=OPTIONS)(*inputs)
    (site,) = lvsa_compile.reports()[0].sites
    assert site.decision == "sparse", site
    sparse = oracle.token_mask(9, 12, 0, suffix=TEXT, reference=4, window=1)
    answer = with_masks(model, inputs, sparse & outer(inputs[3]))
    assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.parametrize("spell", SPELLINGS, ids=lambda f: f.__name__)
def test_padding_of_queries_and_keys_at_a_dense_site(spell, inner):
    if inner == "inductor" and spell is not repeated:
        pytest.skip("code generation is checked on one spelling")
    model, inputs = randomise(Padded(spell)), inputs_of()
    with torch.no_grad():
        compiled = torch.compile(model, backend="lvsa", options={"reference_frames": 21, "inner": inner})
        output, answer = compiled(*inputs), model(*inputs)
    (site,) = lvsa_compile.reports()[0].sites
    assert (site.decision, site.reason) == ("masked", "pattern_full")
    assert "masked, pattern_full: 9 latent frames" in str(site)
    assert torch.equal(output, answer) if inner == "eager" else torch.allclose(output, answer, atol=1e-5)


def test_no_mask_of_queries_by_keys_is_made_at_a_masked_site(monkeypatch):
    from lvsa_compile import backend

    graphs = []
    compile_inner = backend.compile_inner
    monkeypatch.setattr(backend, "compile_inner", lambda graph, *rest, **k: graphs.append(graph) or compile_inner(graph, *rest, **k))
    with torch.no_grad():
        torch.compile(randomise(Padded(repeated)), backend="lvsa", options={"reference_frames": 21, "inner": "eager"})(*inputs_of())
    sizes = [node.meta["example_value"].shape for node in graphs[0].graph.nodes if isinstance(node.meta.get("example_value"), torch.Tensor)]
    made = [n for n in graphs[0].graph.nodes if n.op == "call_method" and n.target == "repeat"]
    assert sizes
    assert len(made) <= 1, "one row-repeated mask may be looked at through a slice, the conjunction is gone"
    assert not [n for n in graphs[0].graph.nodes if getattr(n.target, "__name__", "") == "and_"]


def test_a_part_of_a_conjunction_that_is_used_again_is_still_itself():
    def spell(m):
        rows, columns = m[:, None, None, :], m[:, None, :, None]
        both = rows & columns
        return torch.where(both.any(-1, keepdim=True), rows, rows & columns)

    model, inputs = randomise(Padded(spell)), inputs_of()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="lvsa", options=OPTIONS)(*inputs), model(*inputs))


S = VIDEO + TEXT
ROWWISE = (torch.arange(S)[:, None] * 3 + torch.arange(4)) % S
LOWER = torch.ones(S, S, dtype=torch.bool).tril()


def base(kind, valid):
    """A first mask bool ``[B, 1, S, S]``."""
    rows, columns = valid[:, None, None, :], valid[:, None, :, None]
    if kind == "bits":
        bits = torch.where(valid, 1, 2)
        return (bits[:, None, :, None] & bits[:, None, None, :]).bool()
    if kind == "small ints":
        numbers = torch.where(valid, 16, 1).to(torch.uint8)
        return (numbers[:, None, :, None] * numbers[:, None, None, :]).bool()
    if kind == "outer":
        return rows & columns
    if kind == "and in place":
        mask = rows.expand(-1, -1, S, -1).clone()
        mask &= columns
        return mask
    if kind == "logical_and":
        return rows.repeat(1, 1, S, 1).logical_and_(columns)
    if kind == "keys":
        return rows.repeat(1, 1, S, 1)
    if kind == "queries":
        return columns.expand(-1, -1, -1, S).contiguous()
    if kind == "whole frames":
        frame = torch.arange(S) // 12
        return (frame[:, None] >= frame[None] - 1)[None, None].repeat(valid.shape[0], 1, 1, 1)
    if kind == "product":
        return (rows.float() * columns.float()).bool()
    if kind == "cloned":
        return (rows & columns).clone()
    return torch.logical_and(rows, columns, out=torch.zeros(valid.shape[0], 1, S, S, dtype=torch.bool))


BASES = ["bits", "small ints", "outer", "and in place", "logical_and", "keys", "queries", "whole frames", "product", "cloned", "out"]


def scattered(mask, value, index):
    return mask.scatter_(3, index, torch.tensor(value).expand(index.shape))


WRITES = {
    "setitem": lambda m, v, q, k, valid: m.__setitem__((slice(None), slice(None), q, k), v),
    "rows": lambda m, v, q, k, valid: m.__setitem__((slice(None), slice(None), q), v),
    "columns": lambda m, v, q, k, valid: m.__setitem__((..., k), v),
    "tensor": lambda m, v, q, k, valid: m.__setitem__((..., q, slice(None)), torch.arange(S) % 5 > 0),
    "fill_": lambda m, v, q, k, valid: m[:, 0, :, k].fill_(v),
    "index_put": lambda m, v, q, k, valid: m.view(-1, S).__setitem__(torch.arange(3, 9), v),
    "index_put_": lambda m, v, q, k, valid: m.index_put_((torch.tensor([0]), torch.tensor([0]), torch.tensor([4])), torch.tensor(v)),
    "copy_": lambda m, v, q, k, valid: m[..., k].copy_(torch.ones(S, S, dtype=torch.bool).tril()[..., k]),
    "logical_and_": lambda m, v, q, k, valid: m.logical_and_(torch.ones(S, S, dtype=torch.bool).triu(-40)),
    "masked_fill_": lambda m, v, q, k, valid: m.masked_fill_(torch.eye(S, dtype=torch.bool), v),
    "masked_fill_ of keys": lambda m, v, q, k, valid: m.masked_fill_(valid[:, None, None], v),
    "diagonal": lambda m, v, q, k, valid: m.diagonal(dim1=-2, dim2=-1).fill_(v),
    "select": lambda m, v, q, k, valid: m.select(2, 7)[..., k].fill_(v),
    "index_fill_": lambda m, v, q, k, valid: m.index_fill_(2 if v else 3, torch.tensor([0, 5]), v),
    "index_copy_": lambda m, v, q, k, valid: m.index_copy_(3, torch.tensor([5, 2]), LOWER[:, :2].expand_as(m[..., :2])),
    "shifted": lambda m, v, q, k, valid: m.__setitem__((slice(None), slice(None), slice(1, None)), m[:, :, :-1].clone()),
    "unsqueezed": lambda m, v, q, k, valid: m.squeeze(1).unsqueeze(0)[0, :, q].fill_(v),
    "transposed": lambda m, v, q, k, valid: m.transpose(-1, -2).__setitem__((..., k, slice(None)), v),
    "by a mask": lambda m, v, q, k, valid: m.__setitem__(torch.ones(S, S, dtype=torch.bool).triu(60).expand_as(m), v),
    "flat": lambda m, v, q, k, valid: m.view(-1)[::37].fill_(v),
    "or": lambda m, v, q, k, valid: m.__ior__(valid[:, None, None]),
    "out=": lambda m, v, q, k, valid: torch.logical_or(m, torch.eye(S, dtype=torch.bool), out=m),
    "scatter_": lambda m, v, q, k, valid: m.scatter_(3, torch.arange(S)[None, None, :, None].expand(len(m), 1, S, 1), v),
    "scatter_ of a tensor": lambda m, v, q, k, valid: scattered(m, v, ROWWISE.expand(len(m), 1, S, 4)),
    "scatter_ to some rows": lambda m, v, q, k, valid: scattered(m, v, torch.arange(S).expand(len(m), 1, 30, S)),
    "a value of each query": lambda m, v, q, k, valid: m.__setitem__((..., torch.tensor([0, 1, 2, 50])), LOWER[:, 36:37]),
    "a value of each key": lambda m, v, q, k, valid: m.__setitem__((slice(None), slice(None), torch.tensor([0, 1, 2, 50])), LOWER[36:37]),
    "what it was made of": lambda m, v, q, k, valid: valid[:, 100:].fill_(False),
}
MAKES = {
    "gather": lambda m, v: m.gather(3, ((torch.arange(S)[:, None] + torch.arange(S)) % S).expand_as(m)),
    "roll": lambda m, v: m.roll(7),
    "clone": lambda m, v: m.clone(),
    "where": lambda m, v: torch.where(torch.eye(S, dtype=torch.bool), v, m),
    "tril": lambda m, v: m.tril(40),
    "cumsum": lambda m, v: m.cumsum(-1 if v else -2) > 2,
    "cat": lambda m, v: torch.cat([m[:, :, :50], m[:, :, :1].expand(-1, -1, S - 50, -1)], 2),
    "view": lambda m, v: m.view(len(m), 1, S, S),
    "flip": lambda m, v: m.flip(2),
}
runs = st.builds(lambda start, tokens: slice(start, start + tokens), st.integers(0, S - 14), st.integers(1, 13))
every = st.builds(lambda start, step: slice(start, None, step), st.integers(0, 20), st.integers(2, 40))
places = st.one_of(st.integers(0, S - 1), st.just(slice(None)), st.just(-1), runs, every)
steps = st.lists(st.tuples(st.sampled_from([*WRITES, *MAKES]), st.booleans(), places, places), max_size=2)


class Drawn(nn.Module):
    """Two attentions over [video | text] under masks made by drawn ops, which are written to between the two and after them."""

    def __init__(self, kind, steps):
        super().__init__()
        self.inner = VideoDiT(lambda model, tokens, grid, text: self.block(tokens, text))
        self.kind, self.steps, self.valid, self.masks = kind, steps, None, []

    def block(self, tokens, text):
        valid = self.valid.clone()
        mask, self.masks = base(self.kind, valid), []
        joint = torch.cat([tokens, text], 1)
        for some in self.steps:
            for name, value, q, k in some:
                if name in MAKES:
                    mask = MAKES[name](mask, value)
                else:
                    WRITES[name](mask, value, q, k, valid)
            self.masks.append(mask.clone())
            joint = joint + self.inner.attention(joint, attn_mask=mask).nan_to_num()
        mask[..., 0:1, 1:2] = True
        return joint[:, : tokens.shape[1]]

    forward = Padded.forward


@settings(max_examples=int(os.environ.get("FUZZ", "40")), derandomize="FUZZ" not in os.environ, deadline=None)
@given(st.sampled_from(BASES), st.tuples(steps, steps), st.sampled_from([4, 21]))
def test_masks_that_are_written_to_after_they_were_made(kind, drawn, horizon):
    torch._dynamo.reset()
    model, inputs = randomise(Drawn(kind, drawn)), inputs_of()
    options = {**OPTIONS, "reference_frames": horizon}
    with torch.no_grad():
        model(*inputs)
        masks = model.masks
        output = torch.compile(model, backend="lvsa", options=options)(*inputs)
        sites = lvsa_compile.reports()[0].sites
        pattern = oracle.token_mask(9, 12, 0, suffix=TEXT, reference=4, window=1)
        keep = [mask & pattern if site.decision == "sparse" else mask for mask, site in zip(masks, sites, strict=True)]
        with InTurn(keep):
            answer = model(*inputs)
    event(" ".join(site.decision for site in sites))
    assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max()), [str(site) for site in sites]


class InTurn(TorchFunctionMode):
    """Each attention under the next of ``masks``."""

    def __init__(self, masks):
        super().__init__()
        self.masks = list(masks)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return func(*args[:3], attn_mask=self.masks.pop(0))
        return func(*args, **(kwargs or {}))


def frame_of(frames, places):
    return torch.arange(frames).repeat_interleave(places)


def causal_by_frames(frames, places):
    f = torch.arange(frames)
    mask = (f.unsqueeze(0) <= f.unsqueeze(1)).view(frames, 1, 1, frames, 1, 1).repeat(1, 3, 4, 1, 3, 4)
    return mask.reshape(frames * places, frames * places)[None, None]


def causal_float(frames, places):
    keep = frame_of(frames, places)[:, None] >= frame_of(frames, places)[None, :]
    return torch.zeros(frames * places, frames * places).masked_fill(~keep, float("-inf"))


def in_blocks_of_three(frames, places):
    block = frame_of(frames, places) // 3
    return block[:, None] >= block[None]


def written_by_frames(frames, places):
    mask = torch.zeros(frames * places, frames * places, dtype=torch.bool)
    for f in range(frames):
        mask[f * places : (f + 1) * places, : (f + 1) * places] = True
    return mask


def all_true(frames, places):
    return torch.ones(frames * places, frames * places, dtype=torch.bool)


@pytest.mark.parametrize(
    "make", [causal_by_frames, causal_float, in_blocks_of_three, written_by_frames, all_true], ids=lambda f: f.__name__
)
def test_masks_of_whole_frames_are_intersected_with_the_pattern(make):
    def block(model, tokens, grid, text):
        return tokens + model.attention(tokens, attn_mask=make(grid[0], grid[1] * grid[2]))

    model, inputs = randomise(VideoDiT(block)), dit_inputs(batch=2)
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    mask = make(9, 12)
    keep = (mask if mask.dtype == torch.bool else mask == 0).reshape(108, 108)
    with torch.no_grad():
        for step in range(4):
            latents, _, text = inputs
            output = compiled(latents, torch.full((2,), 900.0 - step), text)
            masked = oracle.MaskedAttention(oracle.token_mask(9, 12, step, reference=4, window=1) & keep)
            masked.replaces_masks = True
            with masked:
                answer = model(latents, torch.full((2,), 900.0 - step), text)
            assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())
    (site,) = lvsa_compile.reports()[0].sites
    assert site.decision == "sparse", site


def token_causal(frames, places):
    return torch.ones(frames * places, frames * places, dtype=torch.bool).tril()


def biased(frames, places):
    return causal_float(frames, places).masked_fill(frame_of(frames, places)[None] == 2, 0.5)


@pytest.mark.parametrize(
    ("make", "detail"),
    [(token_causal, "the rows of a latent frame do not share one mask"), (biased, "attn_mask is torch.float32 [108, 108]")],
)
def test_masks_inside_frames_stay_dense(make, detail):
    model, inputs = randomise(VideoDiT(lambda m, x, grid, text: m.attention(x, attn_mask=make(grid[0], 12)))), dit_inputs()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="lvsa", options=OPTIONS)(*inputs), model(*inputs))
    (site,) = lvsa_compile.reports()[0].sites
    assert (site.decision, site.reason, site.detail) == ("dense", "mask_not_expressible", detail)


@pytest.mark.parametrize("fill", [float("-inf"), -1e4, torch.finfo(torch.float32).min])
def test_a_mask_that_leaves_queries_without_keys_stays_dense(fill):
    def block(model, tokens, grid, text):
        last = torch.arange(108) >= 96
        return model.attention(tokens, attn_mask=torch.zeros(108, 108).masked_fill(last[:, None] | last[None], fill))

    model, inputs = randomise(VideoDiT(block)), dit_inputs()
    with torch.no_grad():
        output = torch.compile(model, backend="lvsa", options=OPTIONS)(*inputs)
        assert torch.equal(output.nan_to_num(), model(*inputs).nan_to_num())
    (site,) = lvsa_compile.reports()[0].sites
    assert site.detail == "pattern and mask together leave a query without keys"


def test_a_mask_of_symbolic_size_is_no_crash():
    model = randomise(Padded(outer))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    with torch.no_grad():
        for text in (7, 9, 12):
            inputs = (*dit_inputs(batch=2, text=text), (torch.arange(108 + text) < 108 + 5).expand(2, -1))
            output = compiled(*inputs)
            sparse = lvsa_compile.reports()[-1].sites[0].decision == "sparse"
            keep = oracle.token_mask(9, 12, 0, suffix=text, reference=4, window=1) if sparse else torch.ones(108 + text, 108 + text).bool()
            answer = with_masks(model, inputs, keep & outer(inputs[3]))
            assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())
            lvsa_compile.reset()


def test_a_mask_that_the_latents_decide_stays_dense():
    def block(model, tokens, grid, text):
        energy = tokens.square().mean(-1)
        return model.attention(tokens, attn_mask=(energy[:, None, :, None] + energy[:, None, None, :]) > 0.2)

    model, inputs = randomise(VideoDiT(block)), dit_inputs()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="lvsa", options=OPTIONS)(*inputs), model(*inputs))
    assert lvsa_compile.reports()[0].sites[0].reason == "mask_not_expressible"


ranges = st.lists(st.integers(0, 60), max_size=6, unique=True).map(
    lambda edges: [tuple(sorted(edges)[i : i + 2]) for i in range(0, len(edges) // 2 * 2, 2)]
)


@given(ranges, ranges)
def test_the_intersection_of_ranges_is_that_of_their_tokens(a, b):
    tokens = [{t for start, end in some for t in range(start, end)} for some in (a, b, intersection(a, b))]
    assert tokens[2] == tokens[0] & tokens[1]


@settings(max_examples=50)
@given(st.integers(0, 3), st.integers(6, 12), st.integers(1, 4), st.integers(0, 3), st.data())
def test_a_table_within_allowed_ranges_attends_what_both_allow(prefix, frames, places, suffix, data):
    span = VideoSpan(prefix, frames, places, suffix)
    pattern = FramePattern(frames, window=1, reference_frames=4)
    blocks = query_blocks(span)
    allowed = tuple(tuple(sorted(data.draw(ranges))) for _ in blocks)
    free, bound = key_range_table(pattern, span, span), key_range_table(pattern, span, span, allowed=allowed)
    assert free.query_bounds == bound.query_bounds == (0, *(end for _, end in blocks))
    for phase in range(pattern.phases):
        for block, left in enumerate(allowed):
            tokens = [
                {t for start, end in table for t in range(start, end)}
                for table in (free.key_ranges[phase][0][block], left, bound.key_ranges[phase][0][block])
            ]
            assert tokens[2] == tokens[0] & tokens[1]
