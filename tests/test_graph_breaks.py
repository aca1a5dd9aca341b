"""A forward that Dynamo breaks into several graphs: layout and clock go with the tensors from one to the next."""

from __future__ import annotations

import re

import oracle
import pytest
import torch
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise, timesteps
from torch import nn

import lvsa_compile


def breaks_before(model, tokens, grid, text):
    torch._dynamo.graph_break()
    return tokens + model.attention(tokens)


def breaks_after(model, tokens, grid, text):
    tokens = tokens + model.attention(tokens)
    torch._dynamo.graph_break()
    return tokens


def breaks_twice(model, tokens, grid, text):
    torch._dynamo.graph_break()
    tokens = tokens + model.attention(tokens)
    torch._dynamo.graph_break()
    return tokens + model.second(tokens)


def joint_after_a_break(model, tokens, grid, text):
    sequence = torch.cat([text, tokens], 1)
    torch._dynamo.graph_break()
    return model.attention(sequence)[:, text.shape[1] :]


def frames_apart_at_the_break(model, tokens, grid, text):
    frames = tokens.unflatten(1, (grid[0], -1))
    torch._dynamo.graph_break()
    return tokens + model.attention(frames.flatten(1, 2))


def decided_by_a_value(model, tokens, grid, text):
    if text.sum() > 1e9:
        text = text * 2
    return model.attention(torch.cat([tokens, text], 1))[:, : tokens.shape[1]]


SPARSE = [breaks_before, breaks_after, breaks_twice, joint_after_a_break, frames_apart_at_the_break, decided_by_a_value]


def masked(model, inputs, step=0, frames=9, places=12, prefix=0, suffix=0):
    with torch.no_grad(), oracle.MaskedAttention(
        oracle.token_mask(frames, places, step, reference=4, window=1, prefix=prefix, suffix=suffix)
    ) as mode:  # fmt: skip
        answer = model(*inputs)
    assert mode.calls
    return answer


def close(output, answer):
    return float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())


@pytest.mark.parametrize("block", SPARSE, ids=lambda f: f.__name__)
def test_sites_after_a_break_are_sparse_at_every_step(block):
    model = randomise(VideoDiT(block))
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    around = {"prefix": 7} if block is joint_after_a_break else {"suffix": 7} if block is decided_by_a_value else {}
    graphs = None
    for _video in range(2):
        for step, value in enumerate(timesteps(5)):
            inputs = dit_inputs(timestep=value)
            with torch.no_grad():
                output, again = compiled(*inputs), compiled(*inputs)
            assert close(output, masked(model, inputs, step, **around)), step
            assert torch.equal(output, again)
            graphs = graphs or torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_the_report_says_where_the_clock_is_read():
    with torch.no_grad():
        torch.compile(randomise(VideoDiT(breaks_before)), backend="lvsa", options=EXACT)(*dit_inputs())
    (report,) = lvsa_compile.reports()
    assert "denoising step: value of input 'timestep', where the forward began" in str(report)


def test_a_timestep_that_is_rescaled_after_the_break_moves_the_clock_once():
    class Rescaled(VideoDiT):
        def forward(self, latents, timestep, text):
            tokens = self.patch(latents).flatten(2).transpose(1, 2)
            torch._dynamo.graph_break()
            timestep = timestep / 1000
            angles = timestep[:, None] * torch.arange(8)
            tokens = tokens + self.time(torch.cat([angles.cos(), angles.sin()], -1))[:, None]
            torch._dynamo.graph_break()
            return self.attention(tokens) * timestep[:, None, None]

    model = randomise(Rescaled())
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    for step, value in enumerate(timesteps(4)):
        inputs = dit_inputs(timestep=value)
        with torch.no_grad():
            assert close(compiled(*inputs), masked(model, inputs, step)), step


@pytest.mark.parametrize("dynamic", [None, True])
def test_swapped_grids_of_equal_length(dynamic):
    """After the break both videos are [1, 72, 16]; Dynamo sees no difference."""
    model = randomise(VideoDiT(breaks_before))
    compiled = torch.compile(model, backend="lvsa", options=EXACT, dynamic=dynamic)
    for frames, rows, columns in ((9, 2, 4), (12, 2, 3), (9, 2, 4), (8, 3, 3), (12, 2, 3)):
        inputs = dit_inputs(frames, rows, columns)
        lvsa_compile.reset()
        with torch.no_grad():
            assert close(compiled(*inputs), masked(model, inputs, frames=frames, places=rows * columns))


def test_two_models_of_a_class_have_their_own_clocks_across_breaks():
    models = [randomise(VideoDiT(breaks_twice), seed) for seed in (1, 2)]
    compiled = [torch.compile(model, backend="lvsa", options=EXACT) for model in models]
    for step, value in enumerate(timesteps(3)):
        inputs = dit_inputs(timestep=value)
        with torch.no_grad():
            assert close(compiled[0](*inputs), masked(models[0], inputs, step))
        if step == 0:
            with torch.no_grad():
                assert close(compiled[1](*inputs), masked(models[1], inputs, 0))


# --- what must stay dense ------------------------------------------------------------------------------------------------------


def _eagerly(function):
    return torch._dynamo.disable(function)


@_eagerly
def _turned(tokens):
    return tokens.flip(1)


@_eagerly
def _written(tokens):
    tokens.copy_(tokens.flip(1))


def turned_between(model, tokens, grid, text):
    return model.attention(_turned(tokens))


def written_between(model, tokens, grid, text):
    tokens = tokens * 1.0
    _written(tokens)
    return model.attention(tokens)


@pytest.mark.parametrize("block", [turned_between, written_between], ids=lambda f: f.__name__)
def test_what_eager_code_did_to_tokens_is_not_guessed(block):
    model, inputs = randomise(VideoDiT(block)), dit_inputs()
    with torch.no_grad():
        output = torch.compile(model, backend="lvsa", options=EXACT)(*inputs)
        assert torch.equal(output, model(*inputs))
    (site,) = lvsa_compile.reports()[0].sites
    assert (site.decision, site.reason) == ("dense", "graph_break")
    assert f"in {block.__name__} (" in site.detail
    assert "Where it stays dense: Take torch.compiler.disable off what is called there." in site.remedy


def test_which_of_two_videos_is_generated_is_not_guessed():
    class TwoVideos(VideoDiT):
        def forward(self, latents, timestep, reference):
            tokens, others = (self.patch(x).flatten(2).transpose(1, 2) for x in (latents, reference))
            torch._dynamo.graph_break()
            return self.attention(tokens) + self.second(others).mean()

    latents, timestep, _ = dit_inputs()
    inputs = (latents, timestep, torch.randn(1, 4, 10, 6, 8))
    model = randomise(TwoVideos())
    with torch.no_grad():
        output = torch.compile(model, backend="lvsa", options=EXACT)(*inputs)
        assert torch.equal(output, model(*inputs))
    assert {site.reason for site in lvsa_compile.reports()[0].sites} == {"other_video"}


def test_writes_that_are_not_counted_in_inference_mode():
    model, inputs = randomise(VideoDiT(written_between)), dit_inputs()
    with torch.inference_mode():
        output = torch.compile(model, backend="lvsa", options=EXACT)(*inputs)
        assert torch.equal(output, model(*inputs))


def test_the_answer_of_one_forward_is_no_generated_video_of_the_next():
    class WithReference(VideoDiT):
        def forward(self, latents, timestep, reference):
            tokens = self.patch(latents).flatten(2).transpose(1, 2)
            torch._dynamo.graph_break()
            others = self.patch(reference).flatten(2).transpose(1, 2)
            tokens = self.attention(tokens) + self.second(others).mean()
            torch._dynamo.graph_break()
            return self.unpatch(tokens).reshape(latents.shape)

    compiled = torch.compile(randomise(WithReference()), backend="lvsa", options=EXACT)
    latents, timestep, _ = dit_inputs()
    with torch.no_grad():
        before = compiled(latents, timestep, torch.randn(1, 4, 9, 6, 8))
        assert torch.equal(compiled(latents, timestep, before), compiled(latents, timestep, before.clone()))


def test_a_value_decides_how_frames_lie():
    """Eager code may do this or that: the tensors say which it was."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = VideoDiT(lambda model, tokens, grid, text: model.attention(_turned(tokens) if text.sum() > 0 else tokens))

        def forward(self, *inputs):
            return self.model(*inputs)

    model = randomise(Sometimes())
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    latents, timestep, text = dit_inputs()
    for sign in (1, -1, 1, -1):
        inputs = (latents, timestep, text.abs() * sign)
        with torch.no_grad():
            output = compiled(*inputs)
            assert close(output, model(*inputs) if sign > 0 else masked(model, inputs))


@_eagerly
def _attended(model, tokens):
    return model.attention(tokens)


def test_attention_in_no_graph_is_counted_by_explain():
    model, inputs = randomise(VideoDiT(lambda model, tokens, grid, text: _attended(model, tokens))), dit_inputs()
    options = {**EXACT, "eager_attention": False}
    report = lvsa_compile.explain(model, *inputs, options=options)
    (site,) = report.sites
    assert re.search(r'outside_graphs: File ".*tiny_models.py", line \d+, in forward: called 1 times outside of all graphs', str(site))
    assert site.remedy.startswith("Mend the graph breaks (TORCH_LOGS=graph_breaks names them)")
    with torch.no_grad():
        torch.compile(model, backend="lvsa", options=options)(*inputs)
    (site,) = lvsa_compile.reports()[0].sites
    assert re.search(r'File ".*tiny_models.py", line \d+, in forward: under torch.compiler.disable, called at File ".*", line', site.detail)
    assert site.remedy.startswith("Take torch.compiler.disable off what is called there.")
    assert site.mendable


# --- sizes that only run time knows --------------------------------------------------------------------------------------------


def test_lengths_that_only_run_time_knows():
    """``fullgraph=True`` with a prompt cut to its length: torch gives every slice a new symbol."""

    def cut(model, tokens, grid, text):
        text = text[:, : (text[0, :, 0] != 0).sum()]
        for attention in (model.attention, model.second):
            sequence = attention(torch.cat([tokens, text], 1))
            tokens, text = sequence[:, : tokens.shape[1]], sequence[:, tokens.shape[1] :]
        return tokens

    model, (latents, timestep, text) = randomise(VideoDiT(cut)), dit_inputs()
    text[:, 5:] = 0
    compiled = torch.compile(model, backend="lvsa", options=EXACT, fullgraph=True)
    with torch.no_grad():
        assert close(compiled(latents, timestep, text), masked(model, (latents, timestep, text), suffix=5))
    assert lvsa_compile.reports()[0].summary.endswith("2 of 2 attention sites sparse")
