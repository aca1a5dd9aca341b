from __future__ import annotations

import oracle
import pytest
import torch

import lvsa_compile
from lvsa_compile.errors import GradientError, ShapeError, StepError

PATTERN = dict(reference_frames=4, window=1)


def qkv(tokens=53, heads=4, key_heads=4, dtype=torch.float64):
    return [torch.randn(2, n, tokens, 16, dtype=dtype) for n in (heads, key_heads, key_heads)]


@pytest.mark.parametrize("step", [0, 1, 2, 7])
def test_it_is_masked_attention_with_log_sum_exp(step):
    query, key, value = qkv(key_heads=2)
    output, log_sum_exp = lvsa_compile.sparse_attention(
        query, key, value, grid=(8, 2, 3), prefix=2, suffix=3, step=step, return_lse=True, **PATTERN
    )
    expected, expected_lse = oracle.dense(query, key, value, oracle.token_mask(8, 6, step, prefix=2, suffix=3, reference=4, window=1))
    assert (output - expected).abs().max() < 1e-12
    assert (log_sum_exp - expected_lse).abs().max() < 1e-12


def test_a_step_tensor_never_recompiles_and_gives_what_an_int_gives():
    query, key, value = qkv()

    def run(step):
        return lvsa_compile.sparse_attention(query, key, value, grid=(8, 2, 3), prefix=5, step=step, **PATTERN)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for step in range(5):
        assert torch.equal(compiled(torch.tensor(step)), run(step))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_under_autocast_it_follows_sdpa():
    query, key, value = qkv(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run = torch.compile(
            lambda q: lvsa_compile.sparse_attention(q, key, value, grid=(8, 2, 3), prefix=5, **PATTERN), backend="aot_eager"
        )
        assert run(query).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            dict(grid=(8, 2, 4)),
            ShapeError,
            "grid=(8, 2, 4): prefix 5 + 8·2·4 + suffix 0 = 69 tokens, but the query has 53. "
            "Make grid, prefix and suffix add up to the query's tokens.",
        ),
        (dict(grid=(8, 6)), ShapeError, "grid=(8, 6): not three positive numbers. Give (frames, height, width) in tokens."),
        (dict(prefix=-1), ShapeError, "prefix=-1: negative. Give a number of tokens, 0 or more."),
        (dict(step=-2), StepError, "step(-2): a denoising step is a whole number from 0. Pass the index of the step, not its timestep."),
        (dict(windwo=3), lvsa_compile.OptionError, "option windwo=3: neither lvsa nor Inductor has this option. Did you mean 'window'?"),
        (dict(window=-3), lvsa_compile.OptionError, "option window=-3: smaller than 0. Give a number of latent frames, at least 0."),
    ],
)
def test_bad_arguments_are_named_with_value_and_remedy(change, error, text):
    query, key, value = qkv()
    with pytest.raises(error) as raised:
        lvsa_compile.sparse_attention(query, key, value, **{"grid": (8, 2, 3), "prefix": 5, **change})
    assert str(raised.value) == text


@pytest.mark.parametrize(
    ("which", "replacement", "text"),
    [
        (0, torch.randn(4, 53, 16), "query=(4, 53, 16): not [batch, heads, tokens, head_dim]. Reshape it, or transpose tokens and heads."),
        (
            1,
            torch.randn(2, 4, 50, 16),
            "key=(2, 4, 50, 16): batch and tokens differ from the query's (2, 4, 53, 16). Give all three the same.",
        ),
        (1, torch.randn(2, 4, 53, 8), "key=(2, 4, 53, 8): head_dim differs from the query's 16. Give both the same head_dim."),
        (
            2,
            torch.randn(2, 3, 53, 16),
            "key=(2, 4, 53, 16): 4 query heads, 4 key heads and 3 value heads do not go together. "
            "Key and value need the same number of heads, and it must divide the query's.",
        ),
        (2, torch.randn(2, 4, 53, 16).half(), "value='torch.float16 on cpu': the query is torch.float32 on cpu. Convert one of them."),
    ],
)
def test_tensors_that_do_not_fit_are_named(which, replacement, text):
    arguments = qkv(dtype=torch.float32)
    arguments[which] = replacement
    with pytest.raises(ShapeError) as raised:
        lvsa_compile.sparse_attention(*arguments, grid=(8, 2, 3), prefix=5)
    assert str(raised.value) == text


def test_a_gradient_is_refused_rather_than_lost():
    query, key, value = qkv()
    with pytest.raises(GradientError, match="computes no gradients"):
        lvsa_compile.sparse_attention(query.requires_grad_(), key, value, grid=(8, 2, 3), prefix=5)


def test_opcheck():
    query, key, value = qkv(dtype=torch.float32)
    arguments = (query, key, value, torch.tensor(3), [8, 2, 3], 5, 0, None, 1, 1, 4, 1.0, None, True)
    torch.library.opcheck(torch.ops.lvsa.sparse_attention.default, arguments)


@pytest.mark.parametrize("step", [1.5, None, True, torch.tensor(1.5)])
def test_a_step_that_is_no_whole_number_is_an_error(step):
    query, key, value = qkv()
    with pytest.raises(StepError, match="a denoising step is a whole number from 0"):
        lvsa_compile.sparse_attention(query, key, value, grid=(8, 2, 3), prefix=5, step=step)


def test_a_grid_that_is_no_tuple_is_an_error():
    query, key, value = qkv()
    with pytest.raises(ShapeError, match="grid=48: not three positive numbers"):
        lvsa_compile.sparse_attention(query, key, value, grid=48, prefix=5)
