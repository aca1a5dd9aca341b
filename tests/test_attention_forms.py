"""Attention written without ``scaled_dot_product_attention``: every form must be sparse and equal to the masked form in float64."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise
from torch import nn

import lvsa_compile

HEADS = 2


def heads_of(model, tokens):
    """Query, key and value ``[B, heads, N, d]``."""
    attention = model.attention
    return [f(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (attention.to_q, attention.to_k, attention.to_v)]


def matmul(q, k, v):
    return (torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def at_sign(q, k, v):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return F.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v


def scaled_before(q, k, v):
    attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    attn = attn + 1.0
    return F.dropout(attn.softmax(-1), 0.1, training=False) @ v


def bmm_on_merged_heads(q, k, v):
    shape = q.shape
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    weights = torch.bmm(q, k.transpose(1, 2)).mul_(shape[-1] ** -0.5).softmax(-1)
    return torch.bmm(weights, v).view(shape)


def baddbmm(q, k, v):
    shape = q.shape
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    weights = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=shape[-1] ** -0.5).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, shape[:2])


def einsum_letters(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).transpose(1, 2)


def einsum_heads_last(q, k, v):
    weights = torch.softmax(torch.einsum("bhid,bhjd->bijh", q, k) * q.shape[-1] ** -0.5, dim=2)
    return torch.einsum("bijh,bhjd->bhid", weights, v)


def keys_first(q, k, v):
    weights = ((k @ q.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(dim=-2)
    return (v.transpose(-1, -2) @ weights).transpose(-1, -2)


def split_then_merged(q, k, v):
    b, h, n, d = q.shape
    scores = torch.bmm(q.reshape(b * h, n, d), k.reshape(b * h, n, d).transpose(1, 2)).view(b, h, n, n)
    return torch.bmm((scores * d**-0.5).softmax(-1).view(b * h, n, n), v.reshape(b * h, n, d)).view(b, h, n, d)


def merged_then_split(q, k, v):
    b, h, n, d = q.shape
    scores = torch.bmm(q.reshape(b * h, n, d), k.reshape(b * h, n, d).transpose(1, 2))
    return (scores * d**-0.5).softmax(-1).unflatten(0, (b, h)) @ v


def upcast(q, k, v):
    q, k, v = (t.to(torch.bfloat16).float() for t in (q, k, v))
    return ((q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1).to(v) @ v


FORMS = [matmul, at_sign, scaled_before, bmm_on_merged_heads, baddbmm, einsum_letters, einsum_heads_last, keys_first,
         split_then_merged, merged_then_split, upcast]  # fmt: skip


def block_of(form):
    def block(model, tokens, grid, text):
        return tokens + model.attention.out(form(*heads_of(model, tokens)).transpose(1, 2).flatten(2))

    return block


def check(model, answer_model, inputs, *, layout=None):
    with torch.no_grad():
        output = torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"})(*inputs)
        answer, dense = answer_model(*inputs), model(*inputs)
    report = lvsa_compile.reports()[-1]
    assert len(report.sparse_sites) == 1, report
    assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max()), report
    assert float((dense - answer).abs().max()) > 1e-3 * float(answer.abs().max()), "the test could not tell sparse from dense"
    return report


def exactly(q, k, v, mask, added=None):
    """Masked attention by its definition."""
    return oracle.dense(q, k, v, mask, added=added)[0].to(q.dtype)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_written_out_attention_is_sparse(form, batch):
    mask = oracle.token_mask(9, 12, 0, reference=4, window=1)
    model, inputs = randomise(VideoDiT(block_of(form))), dit_inputs(batch=batch)

    def answer(q, k, v):
        return exactly(*(t.to(torch.bfloat16).float() if form is upcast else t for t in (q, k, v)), mask)

    check(model, randomise(VideoDiT(block_of(answer))), inputs)


# --- masks: three of the nine text tokens after the video do not count --------------------------------------------------------

KEPT = torch.arange(108 + 9) < 108 + 6


def masked_fill(scores):
    return scores.masked_fill(~KEPT, float("-inf"))


def masked_fill_in_place(scores):
    scores.masked_fill_(~KEPT[None, None, None], -1e9)
    return scores


def where(scores):
    return torch.where(KEPT[None, None, None], scores, torch.finfo(scores.dtype).min)


def where_dropped(scores):
    return torch.where(~KEPT, float("-inf"), scores)


def added(scores):
    return scores + torch.zeros(1, 1, 1, 117).masked_fill(~KEPT, float("-inf"))


def added_in_place(scores):
    scores += torch.zeros(1, 117).masked_fill(~KEPT, -10000.0)
    return scores


def joint(weigh):
    def block(model, tokens, grid, text):
        q, k, v = heads_of(model, torch.cat([tokens, text], 1))
        return model.attention.out(weigh(q, k, v).transpose(1, 2).flatten(2))[:, : tokens.shape[1]]

    return block


@pytest.mark.parametrize("where_masked", [masked_fill, masked_fill_in_place, where, where_dropped, added, added_in_place])
@pytest.mark.parametrize("merged", [False, True], ids=["four axes", "merged heads"])
def test_masks_of_written_out_attention_are_kept(where_masked, merged):
    def weigh(q, k, v):
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        if not merged:
            return where_masked(scores).softmax(-1) @ v
        weights = where_masked(scores).softmax(-1).flatten(0, 1)
        return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, q.shape[:2])

    inputs = dit_inputs(batch=2, text=9)
    mask = oracle.token_mask(9, 12, 0, suffix=9, reference=4, window=1) & KEPT
    check(randomise(VideoDiT(joint(weigh))), randomise(VideoDiT(joint(lambda q, k, v: exactly(q, k, v, mask)))), inputs)


def baddbmm_mask(q, k, v):
    added = torch.zeros(q.shape[0] * HEADS, 1, 117).masked_fill(~KEPT, float("-inf"))
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    weights = torch.baddbmm(added, q, k.transpose(1, 2), beta=1, alpha=q.shape[-1] ** -0.5).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (-1, HEADS))


def test_a_mask_given_to_baddbmm_is_kept():
    inputs = dit_inputs(batch=2, text=9)
    mask = oracle.token_mask(9, 12, 0, suffix=9, reference=4, window=1) & KEPT
    check(randomise(VideoDiT(joint(baddbmm_mask))), randomise(VideoDiT(joint(lambda q, k, v: exactly(q, k, v, mask)))), inputs)


# --- nn.MultiheadAttention -----------------------------------------------------------------------------------------------------


class MultiheadDiT(VideoDiT):
    """``answer``: the same attention by its definition, with the weights of the ``nn.MultiheadAttention``."""

    def __init__(self, answer_mask=None, batch_first=True, padded=False, text=False, **kwargs):
        super().__init__(self.multihead)
        self.mha = nn.MultiheadAttention(16, HEADS, batch_first=batch_first, **kwargs)
        self.answer_mask, self.padded, self.text, self.call = answer_mask, padded, text, {}

    @staticmethod
    def multihead(model, tokens, grid, text):
        x = torch.cat([tokens, text], 1) if model.text else tokens
        if model.answer_mask is not None:
            weights = model.mha.in_proj_weight.chunk(3) if model.mha.in_proj_weight is not None else [
                getattr(model.mha, f"{letter}_proj_weight") for letter in "qkv"]  # fmt: skip
            biases = model.mha.in_proj_bias.chunk(3) if model.mha.in_proj_bias is not None else [None] * 3
            q, k, v = (F.linear(x, w, b).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w, b in zip(weights, biases, strict=True))
            out = model.mha.out_proj(exactly(q, k, v, model.answer_mask).transpose(1, 2).flatten(2))
        else:
            call = {"key_padding_mask": ~KEPT[None].expand(x.shape[0], -1)} if model.padded else model.call
            y = x if model.mha.batch_first else x.transpose(0, 1)
            out = model.mha(y, y, y, **call)[0]
            out = out if model.mha.batch_first else out.transpose(0, 1)
        return tokens + out[:, : tokens.shape[1]]


@pytest.mark.parametrize("kwargs", [{}, {"batch_first": False}, {"bias": False}, {"kdim": 16, "vdim": 16}, {"padded": True, "text": True}])
@pytest.mark.parametrize("batch", [1, 2])
def test_multihead_attention_is_sparse(kwargs, batch):
    mask = oracle.token_mask(9, 12, 0, reference=4, window=1, suffix=9 if "text" in kwargs else 0)
    mask = mask & KEPT if "padded" in kwargs else mask
    inputs = dit_inputs(batch=batch, text=9)
    report = check(randomise(MultiheadDiT(**kwargs)), randomise(MultiheadDiT(mask, **kwargs)), inputs)
    assert report.sites[0].query_shape == f"[{batch}, 2, {mask.shape[0]}, 8]"


@pytest.mark.parametrize(
    ("kwargs", "detail"),
    [
        ({"add_bias_kv": True}, "nn.MultiheadAttention: bias_k is given"),
        ({"add_zero_attn": True}, "nn.MultiheadAttention: add_zero_attn is set"),
    ],
)  # fmt: skip
def test_multihead_attention_with_more_in_it_is_left_alone(kwargs, detail):
    model, inputs = randomise(MultiheadDiT(**kwargs)), dit_inputs()
    with torch.no_grad():
        output = torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"})(*inputs)
        assert torch.equal(output, model(*inputs))
    (site,) = lvsa_compile.reports()[-1].sites
    assert (site.reason, site.detail) == ("form_not_rewritten", detail)


# --- ops of other libraries ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flash_attn():
    """A stand-in for flash-attn's op, of its schema and with its meaning."""
    library = torch.library.Library("flash_attn", "DEF")
    library.define(
        "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, int window_size_left,"
        " int window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)"
    )

    def body(q, k, v, dropout_p, softmax_scale, causal, *others):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=causal).transpose(1, 2).contiguous()
        return out, q.new_zeros(q.shape[:3]), q.new_zeros(0), torch.zeros(2, dtype=torch.int64)

    library.impl("_flash_attn_forward", body, "CompositeExplicitAutograd")
    torch.library.register_fake("flash_attn::_flash_attn_forward", body, lib=library)
    yield torch.ops.flash_attn._flash_attn_forward.default
    library._destroy()


def through_flash(op, **changes):
    said = dict(dropout_p=0.0, scale=0.3, causal=False, left=-1, right=-1, softcap=0.0) | changes

    def weigh(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return op(q, k, v, said["dropout_p"], said["scale"], said["causal"], said["left"], said["right"], said["softcap"], None, False)[
            said.get("output", 0)
        ].transpose(1, 2)

    return weigh


def test_flash_attention_is_sparse(flash_attn):
    mask = oracle.token_mask(9, 12, 0, reference=4, window=1)
    answer = randomise(VideoDiT(block_of(lambda q, k, v: oracle.dense(q, k, v, mask, scale=0.3)[0].float())))
    check(randomise(VideoDiT(block_of(through_flash(flash_attn)))), answer, dit_inputs(batch=2))


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"left": 5}, "form_not_rewritten", "flash_attn._flash_attn_forward with window_size_left=5"),
        ({"softcap": 30.0}, "form_not_rewritten", "flash_attn._flash_attn_forward with softcap=30.0"),
        ({"dropout_p": 0.1}, "dropout", "dropout_p=0.1"),
        ({"causal": True}, "causal", "The site is causal token by token."),
    ],
)  # fmt: skip
def test_flash_attention_that_is_more_than_attention_is_left_alone(flash_attn, changes, reason, detail):
    left_alone(VideoDiT(block_of(through_flash(flash_attn, **changes))), reason, detail)


def test_flash_attention_with_a_scale_of_symbolic_sizes_is_sparse(flash_attn):
    def by_flash(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flash_attn(q, k, v, 0.0, q.shape[1] ** -0.5, False, -1, -1, 0.0, None, False)[0].transpose(1, 2)

    def by_sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=q.shape[2] ** -0.5)

    model, twin, inputs = randomise(VideoDiT(block_of(by_flash))), randomise(VideoDiT(block_of(by_sdpa))), dit_inputs()
    with torch.no_grad():
        output = torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"}, dynamic=True)(*inputs)
        with oracle.MaskedAttention(oracle.token_mask(9, 12, 0, reference=4, window=1)):
            answer = twin(*inputs)
    assert lvsa_compile.reports()[-1].sites[0].decision == "sparse"
    torch.testing.assert_close(output, answer)


# --- written-out softmax that must not be rewritten ---------------------------------------------------------------------------


def left_alone(model, reason, detail):
    model, inputs = randomise(model), dit_inputs()
    with torch.no_grad():
        output = torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"})(*inputs)
        assert torch.equal(output, model(*inputs))
    (site,) = lvsa_compile.reports()[-1].sites
    assert (site.decision, site.reason, site.detail) == ("dense", reason, detail)


def weights_used(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.mean()


def capped(q, k, v):
    return (torch.tanh(q @ k.mT / 30) * 30).softmax(-1) @ v


def scaled_by_a_tensor(q, k, v):
    return ((q @ k.mT) * q.mean()).softmax(-1) @ v


def mask_then_scale(q, k, v):
    return (((q @ k.mT) + torch.zeros(108)) * 0.5).softmax(-1) @ v


def over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def weak_mask(q, k, v):
    return (q @ k.mT).masked_fill(torch.arange(108) > 100, -5.0).softmax(-1) @ v


def dropped(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.0, training=True) * 1.5 @ v


def one_tensor(q, k, v):
    return (q @ q.mT).softmax(-1) @ v


def key_written_between(q, k, v):
    scores = q @ k.mT
    k.mul_(0.5)
    return scores.softmax(-1) @ (v + k)


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (weights_used, "the scores or the weights are used elsewhere"), (capped, "tanh is applied to the scores"),
        (scaled_by_a_tensor, "the scale is no number"), (mask_then_scale, "the scores are scaled after they are masked"),
        (over_queries, "the product with the value does not sum over the keys"), (weak_mask, "masked scores become -5.0"),
        (dropped, "mul is applied to the weights"), (key_written_between, "something is written to between its two products"),
    ],
)  # fmt: skip
def test_other_softmaxes_are_left_alone(form, why):
    left_alone(VideoDiT(block_of(form)), "form_not_rewritten", f"written-out softmax: {why}")


def test_a_dense_written_out_site_beside_a_sparse_one_stays_as_it_was_written():
    def block(model, tokens, grid, text):
        q, k, v = heads_of(model, text)
        text = text + model.attention.out(matmul(q, k, v).transpose(1, 2).flatten(2))
        return block_of(at_sign)(model, tokens + text.mean(1, keepdim=True), grid, text)

    def answer(model, tokens, grid, text):
        q, k, v = heads_of(model, text)
        text = text + model.attention.out(matmul(q, k, v).transpose(1, 2).flatten(2))
        mask = oracle.token_mask(9, 12, 0, reference=4, window=1)
        return block_of(lambda q, k, v: exactly(q, k, v, mask))(model, tokens + text.mean(1, keepdim=True), grid, text)

    report = check(randomise(VideoDiT(block)), randomise(VideoDiT(answer)), dit_inputs())
    assert [site.reason for site in report.sites] == ["not_video", ""]
