"""Each reason is the true one in a program as somebody writes it, and its remedy, followed, works."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from test_warnings import heard
from tiny_models import EXACT, Attention, VideoDiT, dit_inputs, randomise, wan, wan_inputs
from torch import nn

import lvsa_compile


def run(model, inputs=None, **options):
    """The sites of a first forward, and what was warned of."""
    function = torch.compile(model, backend="lvsa", options={**EXACT, **options})
    inputs = dit_inputs() if inputs is None else inputs
    said = heard(lambda: function(**inputs) if isinstance(inputs, dict) else function(*inputs), calls=1)
    return [site for report in lvsa_compile.reports() for site in report.sites], said


def block(function):
    return randomise(VideoDiT(function))


# --- broken forwards ------------------------------------------------------------------------------------------------------------


def unflattens(model, tokens, grid, text):
    """Dynamo breaks the graph at ``Tensor.unflatten`` under a default device."""
    heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("function", "reason"), [(unflattens, "graph_break"), (None, "outside_graphs")], ids=["after", "given up"])
def test_a_default_device_is_named_and_taken_out_all_is_sparse(function, reason):
    """In VideoDiT itself heads are taken apart in a generator expression, which Dynamo gives up together with its function."""
    model = block(function)
    torch.set_default_device("cpu")
    try:
        sites, said = run(model, eager_attention=False)
    finally:
        torch.set_default_device(None)
    assert {site.reason for site in sites} == {reason}
    assert "Take torch.set_default_device out, under which torch breaks graphs" in sites[0].remedy
    assert len(said) == 1
    torch._dynamo.reset()
    sites, said = run(model)
    assert [site.decision for site in sites] == ["sparse"]
    assert said == []


def test_a_graph_that_was_cut_names_what_cuts(tmp_path):
    """DistributedDataParallel cuts a graph into buckets of parameters."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = VideoDiT(lambda model, tokens, grid, text: model.attention(tokens + model.narrow(model.wide(tokens))))
        model.wide, model.narrow = nn.Linear(16, 40000), nn.Linear(40000, 16)
        model = nn.parallel.DistributedDataParallel(randomise(model), bucket_cap_mb=1)
        sites, said = run(model)
        assert {site.reason for site in sites} == {"graph_break"}
        assert "something cut it before it reached lvsa, as DistributedDataParallel does by buckets" in sites[0].detail
        assert len(said) == 1
        torch._dynamo.reset()
        with torch._dynamo.config.patch(optimize_ddp=False):
            sites, _ = run(model)
        assert "sparse" in {site.decision for site in sites}
    finally:
        torch.distributed.destroy_process_group()


@torch.compiler.disable
def out_of_sight(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


def hidden(model, tokens, grid, text):
    heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
    return out_of_sight(heads, heads, heads).transpose(1, 2).flatten(2)


def in_sight(model, tokens, grid, text):
    heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def test_attention_under_disable_is_a_site_with_its_line():
    (site,), said = run(block(hidden), eager_attention=False)
    assert site.reason == "outside_graphs"
    assert re.search(
        r'test_true_reasons.py", line \d+, in out_of_sight: under torch.compiler.disable, called at File ".*", line', site.detail
    )
    assert site.remedy.startswith("Take torch.compiler.disable off what is called there.")
    assert len(said) == 1
    torch._dynamo.reset()
    sites, said = run(block(in_sight))
    assert [site.decision for site in sites] == ["sparse"]


# --- layouts --------------------------------------------------------------------------------------------------------------------


class TwoVideos(VideoDiT):
    """A reference video is attended beside the noisy one, and the answer is sorted: which is generated cannot be told."""

    def forward(self, latents, timestep, text):
        reference = latents.flip(1) if text is None else text
        a, b = (self.patch(video).flatten(2).transpose(1, 2) for video in (latents, reference))
        a, b = a + self.attention(a), b + self.attention(b)
        answer = (a + b * timestep.reshape(-1, 1, 1)).sort(1).values
        return self.unpatch(answer)


def test_a_way_to_the_output_that_was_lost_is_lost_at_an_op():
    latents, timestep, _ = dit_inputs()
    sites, _ = run(randomise(TwoVideos()), (latents, timestep, latents.flip(0) * 2))
    assert {site.reason for site in sites} == {"layout_unknown"}
    assert re.search(
        r'the way of the video to what the model returns is lost after sort, File ".*test_true_reasons.py", line', sites[0].detail
    )


def cached(model, tokens, grid, text):
    """Keys of earlier calls, and new ones, in a buffer that goes round."""
    heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
    kept = text.unflatten(-1, (2, -1)).transpose(1, 2)
    keys = torch.cat([kept, heads], 2).roll(-5, 2)
    return F.scaled_dot_product_attention(heads, keys, keys).transpose(1, 2).flatten(2)


def test_keys_from_a_cache():
    (site,), said = run(block(cached))
    assert site.reason == "cached_keys"
    assert "is unknown after roll, File" in site.detail
    assert site.remedy == ""
    assert said == []


def test_a_block_of_a_known_model_has_its_own_reason():
    model = lvsa_compile.undo(wan())
    model.blocks[0].compile(backend="lvsa", options={"inner": "eager"})
    with torch.no_grad():
        model(**wan_inputs())
    report = lvsa_compile.reports()[0]
    assert report.nearest_miss.reason == "no_grid"
    assert "WanTransformerBlock is a part of WanTransformer3DModel, and only the whole model tells its horizon" in report.also_missing


def test_blocks_that_something_else_calls():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = VideoDiT()
            self.blocks = nn.ModuleList([Attention(16, 2), Attention(16, 2)])

    def through(model, latents, timestep, text):
        tokens = model.whole.patch(latents).flatten(2).transpose(1, 2) + timestep.reshape(-1, 1, 1)
        for each in model.blocks:
            tokens = tokens + each(tokens)
        return model.whole.unpatch(tokens).unflatten(1, (9, 3, 4)).permute(0, 4, 1, 2, 3)

    model = lvsa_compile.compile_repeated_blocks(randomise(Blocks()), options=EXACT)
    (said,) = heard(lambda: through(model, *dit_inputs()))
    (site,) = lvsa_compile.reports()[0].sites
    assert (site.reason, site.detail) == ("forward_not_called", "blocks.0 of Blocks is called, its forward is not")
    assert site.remedy.startswith('Compile the function that calls the blocks, torch.compile(function, backend="lvsa")')
    assert said.startswith("lvsa left attention of Blocks dense: forward_not_called: ")
    torch._dynamo.reset()
    model = randomise(Blocks())
    sites, _ = run(lambda latents, timestep, text: through(model, latents, timestep, text))
    assert [site.decision for site in sites] == ["sparse", "sparse"]


# --- lines ----------------------------------------------------------------------------------------------------------------------


class OwnProcessor(WanAttnProcessor):
    """An attention processor of the user's own, in a model of diffusers."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (t.unflatten(2, (attn.heads, -1)) for t in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        return attn.to_out[0](dispatch_attention_fn(query, key, value).flatten(2))


def test_the_line_of_the_users_own_processor():
    model = wan()
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor = OwnProcessor()
    sites, _ = run(model, wan_inputs())
    assert all(re.match(r'File ".*test_true_reasons.py", line \d+, in __call__', site.source) for site in sites)


def lost_before_a_break(model, tokens, grid, text):
    tokens = tokens.sort(1).values
    torch._dynamo.graph_break()
    return model.attention(tokens)


def test_what_was_lost_in_another_graph_has_its_line():
    sites, _ = run(block(lost_before_a_break))
    (site,) = sites
    assert site.reason == "layout_unknown"
    assert re.search(r'is unknown after \w+, File ".*test_true_reasons.py", line \d+, in lost_before_a_break', site.detail)


# --- forms ------------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("lvsa_tests::mixes", mutates_args=())
def mixes(one: torch.Tensor, two: torch.Tensor, three: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(one, two, three).contiguous()


@mixes.register_fake
def _(one, two, three):
    return torch.empty(one.shape)


@torch.library.custom_op("lvsa_tests::bends", mutates_args=())
def bends(scores: torch.Tensor) -> torch.Tensor:
    return scores * 1.5


@bends.register_fake
def _(scores):
    return torch.empty_like(scores)


def by_an_unknown_operator(model, tokens, grid, text):
    heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
    return torch.ops.lvsa_tests.mixes(heads, heads * 2, heads).transpose(1, 2).flatten(2)


def bent_scores(model, tokens, grid, text):
    heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
    scores = torch.ops.lvsa_tests.bends(heads @ heads.transpose(-1, -2))
    return (scores.softmax(-1) @ heads).transpose(1, 2).flatten(2)


def bent_weights(model, tokens, grid, text):
    heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
    weights = torch.ops.lvsa_tests.bends((heads @ heads.transpose(-1, -2)).softmax(-1))
    return (weights @ heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (by_an_unknown_operator, "lvsa_tests.mixes, which is not known, gets [1, 2, 108, 8], [1, 2, 108, 8], [1, 2, 108, 8] and may be"),
        (bent_scores, "written-out softmax: bends stands between its product and the softmax"),
        (bent_weights, "written-out softmax: bends stands between the softmax and its product"),
    ],
)
def test_an_operator_that_is_not_known_is_named(function, text):
    (site,), said = run(block(function))
    assert site.reason == "form_not_rewritten"
    assert site.detail.startswith(text)
    assert site.remedy.startswith("Use torch.nn.functional.scaled_dot_product_attention")
    assert len(said) == 1
    torch._dynamo.reset()
    sites, said = run(block(in_sight))
    assert [site.decision for site in sites] == ["sparse"]
    assert said == []


def gated(model, tokens, grid, text):
    """Three tensors of four axes that are no attention: torch's own ops are known."""
    heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
    return torch.addcmul(heads, heads, heads).transpose(1, 2).flatten(2)


def routed(model, tokens, grid, text):
    """A softmax that chooses experts."""
    weights = (tokens @ text.new_ones(16, 4)).softmax(-1)
    return tokens * torch.ops.lvsa_tests.bends(weights).sum(-1, keepdim=True)


@pytest.mark.parametrize("function", [gated, routed])
def test_what_is_no_attention_is_no_site(function):
    assert run(block(function)) == ([], [])


# --- sizes ------------------------------------------------------------------------------------------------------------------------


class Shortened(VideoDiT):
    """How many frames there are is read from a tensor."""

    def forward(self, latents, timestep, text):
        frames = int((text[0, :, 0] != 0).sum().item()) + 2
        return super().forward(latents[:, :, :frames], timestep, text)


def test_a_number_of_frames_that_only_run_time_knows():
    model = randomise(Shortened())
    with torch._dynamo.config.patch(capture_scalar_outputs=True), torch.no_grad(), pytest.warns(lvsa_compile.LvsaWarning, match="size_not"):
        torch.compile(model, backend="lvsa", options=EXACT, fullgraph=True)(*dit_inputs())
    (site,) = lvsa_compile.reports()[0].sites
    assert (site.reason, site.remedy) == ("size_not_known", "Compile without dynamic=True, or without fullgraph=True.")
    torch._dynamo.reset()
    sites, _ = run(model)
    assert [site.decision for site in sites] == ["sparse"]
