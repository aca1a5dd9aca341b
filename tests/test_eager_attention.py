"""Attention in eager code is the same attention: sparse and exact where it runs, reported, or dense for one true reason."""

from __future__ import annotations

import gc
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import HookRegistry, LayerSkipConfig
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from test_graph_breaks import close, masked
from test_regional import Stack
from test_watching import EAGER, flipped, graphs, in_place, modes
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise, timesteps, wan, wan_inputs
from torch import nn

import lvsa_compile
from lvsa_compile.errors import LvsaError, OptionError, RequireError
from lvsa_compile.watching.watch import watch_of


@torch.compiler.disable
def out_of_sight(query, key, value, **more):
    return F.scaled_dot_product_attention(query, key, value, **more)


def heads_of(tokens):
    return tokens.unflatten(-1, (2, -1)).transpose(1, 2)


def disabled(model, tokens, grid, text):
    for _ in range(2):
        heads = heads_of(tokens)
        tokens = tokens + out_of_sight(heads, heads, heads).transpose(1, 2).flatten(2)
    return tokens


def exact(model, alone, first="sparse", steps=4, videos=2, **around):
    """Calls a model through some videos and compares with the masked oracle; ``first`` is what the very first forward is."""
    for video in range(videos):
        for step, value in enumerate(timesteps(steps)):
            inputs = dit_inputs(timestep=value)
            output = model(*inputs)
            answer = masked(alone, inputs, step, **around)
            if (video, step) == (0, 0) and first == "dense":
                answer = alone(*inputs)
            assert close(output, answer), (video, step)


def twins(run=disabled, **kinds):
    alone = randomise(VideoDiT(run, **kinds))
    model = VideoDiT(run, **kinds)
    model.load_state_dict(alone.state_dict())
    return alone, model.eval()


def heard(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if issubclass(each.category, lvsa_compile.LvsaWarning)]


# --- where it runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode], ids=lambda s: s.__name__)
def test_attention_under_disable_is_sparse_from_the_second_forward_on(surroundings):
    alone, model = twins()
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    with surroundings():
        assert heard(lambda: exact(compiled, alone, first="dense")) == []
    first, *_, last = lvsa_compile.reports()
    assert {site.reason for site in first.sites} == {"first_forward"}
    assert "in out_of_sight: under torch.compiler.disable, called at" in first.sites[0].detail
    (site,) = last.sparse_sites
    assert site.name.startswith("out_of_sight")
    assert "out_of_sight" in site.source
    assert "nobody" not in str(last.receipt())
    assert modes() == 0


def test_two_calls_of_one_kind_are_one_site_and_no_graph_is_added_after_the_second_forward():
    alone, model = twins()
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    with torch.no_grad():
        exact(compiled, alone, first="dense", steps=2, videos=1)
        so_far, reports = graphs(), len(lvsa_compile.reports())
        exact(compiled, alone, steps=9)
    assert (graphs(), len(lvsa_compile.reports())) == (so_far, reports)


def test_code_that_dynamo_gave_up():
    """In VideoDiT heads are taken apart in a generator expression, which Dynamo gives up under a default device."""
    alone, model = twins(None)
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    torch.set_default_device("cpu")
    try:
        with torch.no_grad():
            exact(compiled, alone, first="dense")
    finally:
        torch.set_default_device(None)


HELD = [F.scaled_dot_product_attention]


@torch.compiler.disable
def hooked(query, key, value):
    """No name in its code leads to attention, as where a cache's hook keeps the function that it replaced."""
    return HELD[0](query, key, value)


def hidden(model, tokens, grid, text):
    heads = heads_of(tokens)
    return hooked(heads, heads, heads).transpose(1, 2).flatten(2)


def test_attention_that_only_running_shows_is_sparse_from_the_third_forward_on():
    alone, model = twins(hidden)
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    with torch.no_grad():
        for step, value in enumerate(timesteps(5)):
            inputs = dit_inputs(timestep=value)
            assert close(compiled(*inputs), alone(*inputs) if step < 2 else masked(alone, inputs, step)), step


def test_a_broken_model_without_attention_outside_is_left_after_sixteen_forwards():
    def run(model, tokens, grid, text):
        tokens = model.attention(tokens)
        torch._dynamo.graph_break()
        return tokens * 2

    model = randomise(VideoDiT(run))
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    with torch.no_grad():
        for forward in range(18):
            compiled(*dit_inputs())
            assert (watch_of(compiled) is None) == (forward >= 16), forward
    assert modes() == 0


def test_eager_attention_false_leaves_it_as_it_is():
    alone, model = twins()
    compiled = torch.compile(model, backend="lvsa", options={**EXACT, "eager_attention": False})
    inputs = dit_inputs()
    with torch.no_grad():
        (message,) = heard(lambda: [compiled(*inputs) for _ in range(3)])
        assert close(compiled(*inputs), alone(*inputs))
    assert "outside_graphs" in message
    assert watch_of(model) is None


def test_attention_between_blocks_that_others_compile():
    def run(model, tokens, grid, text):
        for block in model.blocks:
            heads = heads_of(block(tokens))
            tokens = tokens + F.scaled_dot_product_attention(heads, heads, heads, scale=0.01).transpose(1, 2).flatten(2)
        return tokens

    alone = randomise(Stack(run))
    model = Stack(run)
    model.load_state_dict(alone.state_dict())
    in_place(model.eval(), backend="lvsa", options=EAGER)
    with torch.no_grad():
        exact(model, alone, first="dense")
    last = lvsa_compile.reports()[-1]
    assert len(last.sparse_sites) == 2
    assert last.sites == last.sparse_sites


# --- enable ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode], ids=lambda s: s.__name__)
def test_enable_makes_a_model_sparse_that_nobody_compiles(surroundings):
    alone, model = twins()
    assert lvsa_compile.enable(model, **EAGER) is model
    with surroundings():
        exact(model, alone)
    (report,) = lvsa_compile.reports()
    assert [site.name for site in report.sites] == ["out_of_sight"]
    assert graphs() == 0
    lvsa_compile.undo(model)
    inputs = dit_inputs()
    with surroundings():
        assert torch.equal(model(*inputs), alone(*inputs))


def test_enable_beside_a_compile_of_the_whole_model_moves_the_clock_once():
    alone, model = randomise(VideoDiT()), randomise(VideoDiT())
    lvsa_compile.enable(model, **EAGER)
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    with torch.no_grad():
        for step, value in enumerate(timesteps(4)):
            inputs = dit_inputs(timestep=value)
            for _guidance in range(2):
                assert close(compiled(*inputs), masked(alone, inputs, step))
    assert "8 calls" in str(lvsa_compile.reports()[-1])


class Pipe:
    def __init__(self, **components):
        self.components = components


def test_enable_takes_a_pipeline():
    alone, model = wan(), wan()
    pipe = Pipe(transformer=model, text_encoder=nn.Linear(2, 2), scheduler=object())
    lvsa_compile.enable(pipe, **EAGER)
    assert watch_of(pipe.components["text_encoder"]) is None
    with torch.no_grad():
        for step, value in enumerate((999.0, 900.0, 800.0)):
            inputs = wan_inputs(timestep=value)
            want = masked_wan(alone, inputs, step)
            assert close(model(**inputs)[0], want)
    lvsa_compile.undo(pipe)
    assert watch_of(model) is None


def masked_wan(model, inputs, step):
    with oracle.MaskedAttention(oracle.token_mask(9, 12, step, reference=4, window=1)) as mode:
        output = model(**inputs)[0]
    assert mode.calls
    return output


@pytest.mark.parametrize("given", ["pipe", nn.Identity, Pipe(text_encoder=nn.Linear(2, 2))], ids=["a name", "a class", "no denoiser"])
@pytest.mark.parametrize("function", [lvsa_compile.enable, lvsa_compile.undo])
def test_what_enable_and_undo_do_not_take(function, given):
    with pytest.raises(LvsaError) as error:
        function(given)
    assert str(error.value) == (
        f"{function.__name__}(model={type(given).__name__}): neither a module nor an object that holds one whose forward gets a timestep. "
        "Give the transformer, such as pipe.transformer."
    )


def test_options_of_enable_are_checked_at_once():
    with pytest.raises(OptionError, match="window"):
        lvsa_compile.enable(VideoDiT(), window=-1)
    with pytest.raises(OptionError, match=r"eager_attention=False: enable is for attention in eager code\. Leave it out\."):
        lvsa_compile.enable(VideoDiT(), eager_attention=False)


def test_enable_again_takes_the_options_given_last():
    _, model = twins()
    inputs = dit_inputs()
    with torch.no_grad():
        for options, words in (({"reference_frames": 4, "window": 1}, ["sparse"]), ({"reference_frames": 9}, ["dense"])):
            lvsa_compile.enable(model, **options)
            model(*inputs)
            assert [site.decision for site in lvsa_compile.reports()[-1].sites] == words


# --- forms that eager dispatch shows ---------------------------------------------------------------------------------------------


def with_arguments(**more):
    def run(model, tokens, grid, text):
        heads = heads_of(tokens)
        return out_of_sight(heads, heads, heads, **more).transpose(1, 2).flatten(2)

    return run


def padded(model, tokens, grid, text):
    """The last tokens are padding, by a mask that is the same for each query."""
    sequence = torch.cat([tokens, text], 1)
    counts = torch.arange(sequence.shape[1], device=tokens.device) < sequence.shape[1] - 2
    heads = heads_of(sequence)
    out = out_of_sight(heads, heads, heads, attn_mask=counts[None, None, None])
    return out.transpose(1, 2).flatten(2)[:, : tokens.shape[1]]


def exact_with_padding(model, alone):
    """Compares with the oracle where the last two of seven text tokens after the video are padding."""
    for step, value in enumerate(timesteps(3)):
        inputs, mask = dit_inputs(timestep=value), oracle.token_mask(9, 12, step, reference=4, window=1, suffix=7)
        mask[:, -2:] = False
        with oracle.MaskedAttention(mask) as mode:
            mode.replaces_masks = True
            answer = alone(*inputs)
        assert close(model(*inputs), answer), step
        assert mode.calls == 1


def grouped(model, tokens, grid, text):
    heads = heads_of(tokens)
    few = heads.mean(1, keepdim=True)
    return out_of_sight(heads, few, few, enable_gqa=True).transpose(1, 2).flatten(2)


FORMS = {"scale": with_arguments(scale=0.3), "padding": padded, "grouped queries": grouped}


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode], ids=lambda s: s.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, surroundings):
    alone, model = twins(FORMS[form])
    lvsa_compile.enable(model, **EAGER, strict=True)
    with surroundings():
        if form == "padding":
            exact_with_padding(model, alone)
        else:
            exact(model, alone, steps=3, videos=1)


@pytest.mark.parametrize(
    ("more", "reason"),
    [({"is_causal": True}, ("causal", "mask_not_expressible")), ({"attn_mask": torch.randn(108, 108)}, ("mask_not_expressible",))],
    ids=["causal", "a mask of pairs"],
)
@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode], ids=lambda s: s.__name__)
def test_what_stays_dense_says_why(more, reason, surroundings):
    """Of attention that torch runs by its formula only a mask shows that it is causal."""
    alone, model = twins(with_arguments(**more))
    lvsa_compile.enable(model, **EAGER)
    inputs = dit_inputs()
    with surroundings():
        assert torch.equal(model(*inputs), alone(*inputs))
    (site,) = lvsa_compile.reports()[-1].sites
    assert site.reason in reason


def in_rows(model, tokens, grid, text):
    return disabled(model, tokens.contiguous(), grid, text)


def test_where_gradients_are_needed_it_stays_dense_and_they_are_right():
    alone, model = twins(in_rows)
    lvsa_compile.enable(model, **EAGER)
    inputs = dit_inputs()
    assert torch.equal(model(*inputs), alone(*inputs))
    for run in (model, alone):
        run(*inputs).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), alone.parameters(), strict=True) if b.grad is not None)
    assert {site.reason for report in lvsa_compile.reports() for site in report.sites} == {"training"}
    lvsa_compile.reset()
    with torch.no_grad():
        exact(model, alone, steps=2, videos=1)


def test_what_turns_frames_around_before_it_keeps_it_dense():
    alone, model = randomise(Stack()), randomise(Stack())
    model.load_state_dict(alone.state_dict())
    for each in (alone, model):
        each.blocks[1].register_forward_pre_hook(flipped)
    lvsa_compile.enable(model, **EAGER)
    inputs = dit_inputs()
    with torch.no_grad():
        model(*inputs)
    decisions = [site.decision for report in lvsa_compile.reports() for site in report.sites]
    assert sorted(decisions) == ["dense", "sparse"]


# --- what nobody sees, what fails -------------------------------------------------------------------------------------------------


def test_attention_by_no_op_that_is_known_is_named():
    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            return torch.from_numpy((torch.softmax(query @ key.mT, -1) @ value).numpy())

    @torch.compiler.disable
    def sageattn(query, key, value):
        return Kernel.apply(query, key, value)

    def run(model, tokens, grid, text):
        heads = heads_of(tokens)
        return sageattn(heads, heads, heads).transpose(1, 2).flatten(2)

    _, model = twins(run)
    with torch.no_grad():
        assert heard(lambda: lvsa_compile.enable(model, **EAGER)(*dit_inputs())) == [
            "lvsa saw no attention in a forward of VideoDiT: it runs in graphs of another compiler, or by kernels that are no ops of torch "
            'or of a library that lvsa knows. Compile with backend="lvsa", or use torch.nn.functional.scaled_dot_product_attention.'
        ]


def test_require_raises_in_the_second_forward():
    alone, model = twins()
    lvsa_compile.enable(model, **{**EAGER, "reference_frames": None}, require="sparse")
    inputs = dit_inputs()
    with torch.no_grad():
        assert torch.equal(model(*inputs), alone(*inputs))
        with pytest.raises(RequireError, match="horizon_unknown"):
            model(*inputs)
    assert modes() == 0


def test_explain_says_what_runs():
    _, model = twins()
    report = lvsa_compile.explain(model, *dit_inputs(), options=EXACT)
    assert [(site.name, site.decision) for site in report.sites] == [("out_of_sight", "sparse")]
    assert watch_of(model) is None
    report = lvsa_compile.explain(model, *dit_inputs(), options={**EXACT, "eager_attention": False})
    assert {site.reason for site in report.sites} == {"outside_graphs"}


def test_nothing_grows_over_many_forwards():
    _, model = twins()
    lvsa_compile.enable(model, **EAGER)
    inputs = dit_inputs()
    with torch.no_grad():
        for _ in range(5):
            model(*inputs)
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(100):
            model(*inputs)
        gc.collect()
    assert len(gc.get_objects()) - before < 100


# --- past the recompile limit -----------------------------------------------------------------------------------------------------


def test_sizes_past_the_recompile_limit_are_sparse_in_eager_code():
    alone, model = randomise(VideoDiT()), randomise(VideoDiT())
    compiled = torch.compile(model, backend="lvsa", options=EXACT, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for frames in (9, 10, 11, 12, 9, 11):
            for step, value in enumerate(timesteps(3)):
                inputs = dit_inputs(frames=frames, timestep=value)
                assert close(compiled(*inputs), masked(alone, inputs, step, frames=frames)), (frames, step)
            lvsa_compile.reset()
    assert graphs() == 2


def test_without_eager_attention_they_are_dense_and_the_warning_says_so():
    alone, model = randomise(VideoDiT()), randomise(VideoDiT())
    compiled = torch.compile(model, backend="lvsa", options={**EXACT, "eager_attention": False}, dynamic=False)

    def run():
        for frames in (9, 10, 11):
            lvsa_compile.reset()
            outputs.append(compiled(*dit_inputs(frames=frames)))

    outputs = []
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        (message,) = [each for each in heard(run) if "recompile_limit" in each]
        assert close(outputs[-1], alone(*dit_inputs(frames=11)))
    assert "runs in eager mode with dense attention. Raise the limit" in message
    assert watch_of(model) is None


def test_hooks_that_skip_layers_for_a_call():
    """Skip-layer guidance puts hooks on for a call and takes them off, and Dynamo makes a graph of the whole model for each hook."""
    alone, model = wan(num_layers=3), wan(num_layers=3)
    model.compile(backend="lvsa", options=EXACT)
    with torch._dynamo.config.patch(recompile_limit=3), torch.no_grad():
        for step, value in enumerate((999.0, 900.0, 800.0, 700.0, 600.0)):
            inputs = wan_inputs(timestep=value)
            for skips in (False, True):
                for each in (alone, model):
                    if skips:
                        _apply_layer_skip_hook(each, LayerSkipConfig(indices=[1], fqn="blocks"), name="skip")
                answer = masked_wan(alone, inputs, step)
                assert close(model(**inputs)[0], answer), (step, skips)
                for each in (alone, model):
                    if skips:
                        HookRegistry.check_if_exists_or_initialize(each).remove_hook("skip", recurse=True)


# --- kernels of other devices, by their schemas: they cannot run here, so that only a sparse site gives an answer -------------------


def scaled(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, scale=0.3)


def as_flash(query, key, value):
    """With head_dim padded to a multiple of eight, as torch hands it over."""
    padded_ones = [F.pad(each, (0, 8 - each.shape[-1] % 8)) for each in (query, key, value)]
    return torch.ops.aten._scaled_dot_product_flash_attention(*padded_ones, 0.0, False, scale=0.3)[0][..., : value.shape[-1]]


def as_efficient(query, key, value):
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, False, scale=0.3)[0]


def as_cudnn(query, key, value):
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, False, 0.0, False, False, scale=0.3)[0]


def as_overridden(query, key, value):
    return torch.ops.aten._scaled_dot_product_fused_attention_overrideable(query, key, value, scale=0.3)[0]


KERNELS = {"flash": as_flash, "efficient": as_efficient, "cuDNN": as_cudnn, "overridden": as_overridden}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_of_other_devices(kernel):
    def run_by(attention):
        def run(model, tokens, grid, text):
            heads = heads_of(tokens.contiguous()).contiguous()
            return attention(heads, heads, heads).transpose(1, 2).flatten(2)

        return run

    alone, model = twins(run_by(scaled))
    model.block = run_by(KERNELS[kernel])
    lvsa_compile.enable(model, **EAGER, strict=True)
    with torch.no_grad():
        exact(model, alone, steps=3, videos=1)


def test_a_mask_as_the_efficient_kernel_gets_it():
    """Bool made float, padded to a multiple of 16 keys, cut and repeated over queries and heads."""

    def sequence_of(tokens, text):
        return heads_of(torch.cat([tokens, text], 1)).contiguous()

    counts = torch.arange(115) < 113

    def run(model, tokens, grid, text):
        heads = sequence_of(tokens, text)
        bias = torch.zeros(115).masked_fill(~counts, float("-inf"))
        bias = F.pad(bias, (0, 13))[None, None, None, :115].expand(heads.shape[0], heads.shape[1], 115, 115)
        out = torch.ops.aten._scaled_dot_product_efficient_attention(heads, heads, heads, bias, False, scale=0.3)[0]
        return out.transpose(1, 2).flatten(2)[:, : tokens.shape[1]]

    def plain(model, tokens, grid, text):
        heads = sequence_of(tokens, text)
        out = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=counts[None, None, None], scale=0.3)
        return out.transpose(1, 2).flatten(2)[:, : tokens.shape[1]]

    alone, model = twins(plain)
    model.block = run
    lvsa_compile.enable(model, **EAGER, strict=True)
    with torch.no_grad():
        exact_with_padding(model, alone)


def test_who_asks_for_the_log_sum_exp_gets_that_of_the_kernel():
    def run(model, tokens, grid, text):
        heads = heads_of(tokens.contiguous()).contiguous()
        return torch.ops.aten._scaled_dot_product_efficient_attention(heads, heads, heads, None, True)[0]

    _, model = twins(run)
    lvsa_compile.enable(model, **EAGER)
    with torch.no_grad(), pytest.raises(NotImplementedError):
        model(*dit_inputs())
    assert modes() == 0
