"""``compile_repeated_blocks``: blocks compiled one by one, with the layout and the clock of the model around them."""

from __future__ import annotations

import copy
import functools
import io
import types
import warnings

import oracle
import pytest
import torch
from test_graph_breaks import close, masked
from tiny_models import EXACT, Attention, VideoDiT, dit_inputs, randomise, timesteps, wan, wan_inputs
from torch import nn

import lvsa_compile
from lvsa_compile.forward import context
from lvsa_compile.regional import repeated_blocks
from lvsa_compile.watching.watch import Watch, watch_of


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(16, 2), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, tokens, text=None):
        sequence = tokens if text is None else torch.cat([text, tokens], 1)
        tokens = tokens + self.attention(sequence)[:, sequence.shape[1] - tokens.shape[1] :]
        return tokens + self.mlp(tokens)


def one_after_the_other(model, tokens, grid, text):
    for block in model.blocks:
        tokens = block(tokens)
    return tokens


def with_text(model, tokens, grid, text):
    for block in model.blocks:
        tokens = block(tokens, text=text)
    return tokens


class Stack(VideoDiT):
    def __init__(self, run=one_after_the_other, block=Block, count=3):
        super().__init__(run)
        self.blocks = nn.ModuleList(block() for _ in range(count))


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def regional(model, **options):
    return lvsa_compile.compile_repeated_blocks(model, options={**EXACT, **options})


def test_one_graph_for_all_blocks_at_every_step_of_two_videos():
    alone, model = wan(), regional(wan())
    for _video in range(2):
        for step, value in enumerate(timesteps(9)):
            inputs = wan_inputs(timestep=value)
            with torch.no_grad():
                for _guidance in range(2):
                    output = model(**inputs)[0]
                assert close(output, masked(lambda i=inputs: alone(**i)[0], (), step)), step
    assert graphs() == 1
    (report,) = lvsa_compile.reports()
    assert [site.name for site in report.sites] == ["blocks.*.attn1", "blocks.*.attn2"]
    assert "horizon: 4 latent frames" in str(report)
    assert "denoising step: value of input 'timestep', where the forward began" in str(report)


MODELS = {"list of blocks": Stack, "with text": lambda: Stack(with_text), "wrapper": lambda: Wrapper(Stack())}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models_that_list_no_blocks(make):
    alone, model = randomise(make()), regional(randomise(make()))
    around = {"prefix": 7} if getattr(alone, "block", None) is with_text else {}
    for step, value in enumerate(timesteps(3)):
        inputs = dit_inputs(timestep=value)
        with torch.no_grad():
            output = model(*inputs)
        assert close(output, masked(alone, inputs, step, **around)), step
    assert graphs() == 1


def test_which_modules_are_blocks():
    assert list(repeated_blocks(Stack())) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(repeated_blocks(Wrapper(wan()))) == ["model.blocks.0", "model.blocks.1"]
    assert list(repeated_blocks(VideoDiT())) == []


def test_swapped_grids_of_equal_length():
    alone, model = randomise(Stack()), regional(randomise(Stack()))
    for frames, rows, columns in ((9, 2, 4), (12, 2, 3), (9, 2, 4), (8, 3, 3), (12, 2, 3)):
        inputs = dit_inputs(frames, rows, columns)
        lvsa_compile.reset()
        with torch.no_grad():
            assert close(model(*inputs), masked(alone, inputs, frames=frames, places=rows * columns))
    assert graphs() == 3


def test_twelve_sizes_block_by_block():
    alone, model = randomise(Stack()), regional(randomise(Stack()))
    for frames in range(6, 18):
        inputs = dit_inputs(frames)
        lvsa_compile.reset()
        with torch.no_grad():
            assert close(model(*inputs), masked(alone, inputs, frames=frames)), frames


@pytest.mark.slow
def test_twelve_sizes_of_a_whole_model_are_exact_and_end_in_one_warning():
    """Symbolic sizes too: frames and places are fixed, since the pattern depends on them."""
    model = randomise(VideoDiT())
    compiled = torch.compile(model, backend="lvsa", options=EXACT, dynamic=True)
    exact, said = [], []
    for frames in range(6, 18):
        inputs = dit_inputs(frames)
        lvsa_compile.reset()
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exact.append(close(compiled(*inputs), masked(model, inputs, frames=frames)))
        said += [str(warning.message) for warning in caught if "What differs from all of them" in str(warning.message)]
    assert exact == [True] * 12  # the last four in eager code
    assert len(said) == 1
    assert "Raise the limit (torch._dynamo.config.recompile_limit = 64), or keep that from changing." in said[0]


def test_class_state_and_copies_are_as_before():
    model = wan()
    keys, kind = list(model.state_dict()), type(model)
    inputs = wan_inputs()
    with torch.no_grad():
        dense = model(**inputs)[0]
        sparse = regional(model)(**inputs)[0]
    assert (list(model.state_dict()), type(model)) == (keys, kind)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**inputs)[0], dense)  # a copy is another model, and compiled no more
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(**inputs)[0], dense)
        lvsa_compile.reset()
        assert torch.equal(model(**inputs)[0], sparse)


def test_hooks_that_look_run_once_and_not_for_the_trace():
    calls = []

    def look(module, args, output=None):
        calls.append(args[0].abs().sum())

    alone, model = randomise(Stack()), randomise(Stack())
    model.blocks[1].register_forward_hook(look)
    model.register_forward_pre_hook(look)
    regional(model)
    inputs = dit_inputs()
    with torch.no_grad():
        assert close(model(*inputs), masked(alone, inputs))
    assert [type(call) for call in calls] == [torch.Tensor] * 2


def turn(module, args, output=None):
    return (args[0].flip(2), *args[1:]) if output is None else output.flip(1)


def with_masks_in(model, numbers):
    """The model whose blocks ``numbers`` attend under the mask of the first step."""
    mask = oracle.token_mask(9, 12, 0, reference=4, window=1)
    for number in numbers:

        def attend(x, attention=model.blocks[number].attention.forward):
            with oracle.MaskedAttention(mask):
                return attention(x)

        model.blocks[number].attention.forward = attend
    return model


PUT_AROUND = {  # what is put on a model, and the blocks whose tokens come before it
    "after a block": (lambda model: model.blocks[0].register_forward_hook(turn), [0]),
    "inside a block": (lambda model: model.blocks[1].mlp.register_forward_hook(turn), [0, 1]),
    "before a block": (lambda model: model.blocks[2].register_forward_pre_hook(lambda module, args: (args[0].flip(1),)), [0, 1]),
    "before the model": (lambda model: model.register_forward_pre_hook(turn), []),
    "a forward that is no method": (lambda model: setattr(model.patch, "forward", lambda x: nn.Conv3d.forward(model.patch, x).flip(2)), []),
}


@pytest.mark.parametrize("way", ["repeated blocks", "in place"])
@pytest.mark.parametrize(("put", "before"), PUT_AROUND.values(), ids=PUT_AROUND)
def test_what_is_put_around_modules_and_turns_frames_around_is_seen(put, before, way):
    alone, model = randomise(Stack()), randomise(Stack())
    for each in (alone, model):
        put(each)
    if way == "repeated blocks":
        regional(model)
    else:
        for block in model.blocks:
            block.compile(backend="lvsa", options=EXACT)
    inputs = dit_inputs()
    with torch.no_grad():
        for _ in range(3):
            output = model(*inputs)
        assert close(output, with_masks_in(alone, before)(*inputs))
    sites = {site.reason: site for report in lvsa_compile.reports() for site in report.sites}
    assert "unknown after flip" in sites["layout_unknown"].detail


def test_a_forward_that_is_put_on_the_model_is_followed():
    def turned(self, latents, timestep, text):
        return VideoDiT.forward(self, latents, timestep, text) if self.turns == 0 else _turns_tokens(self, latents)

    def _turns_tokens(self, latents):
        tokens = self.patch(latents).flatten(2).transpose(1, 2).flip(1)
        return self.unpatch(self.block(self, tokens, None, None))

    alone, model = randomise(Stack()), regional(randomise(Stack()))
    inputs = dit_inputs()
    for each in (alone, model):
        each.forward, each.turns = types.MethodType(turned, each), 0
    for turns in (0, 1, 0):
        alone.turns = model.turns = turns
        with torch.no_grad():
            output = model(*inputs)
            assert close(output, alone(*inputs) if turns else masked(alone, inputs)), turns


def turned_if(model, tokens, grid, text):
    turned = model.settings["turned"] or torch.is_autocast_enabled("cpu") or not text.is_contiguous()
    return one_after_the_other(model, _turned(tokens) if turned else tokens, grid, text)


def test_what_a_model_holds_and_the_modes_of_torch_decide_a_forward():
    alone, model = randomise(Stack(turned_if)), randomise(Stack(turned_if))
    alone.settings, model.settings = {"turned": False}, {"turned": False}
    regional(model)
    latents, timestep, text = dit_inputs()
    across = text.transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad():
        for turned, prompt in ((False, text), (True, text), (False, across), (False, text)):
            alone.settings["turned"] = model.settings["turned"] = turned
            output, inputs = model(latents, timestep, prompt), (latents, timestep, prompt)
            assert close(output, alone(*inputs) if turned or prompt is across else masked(alone, inputs))


def test_what_is_put_around_modules_later_is_seen(monkeypatch):
    alone, model, inputs = randomise(Stack()), regional(randomise(Stack())), dit_inputs()
    with torch.no_grad():
        assert close(model(*inputs), masked(alone, inputs))
        for each in (alone, model):
            each.patch.register_forward_hook(lambda module, args, output: output.flip(2))
        assert close(model(*inputs), alone(*inputs))

    def turned(self, latents, timestep, text):
        return self.unpatch(self.block(self, self.patch(latents).flatten(2).transpose(1, 2).flip(1), None, None))

    alone, model = randomise(Stack()), regional(randomise(Stack()))
    with torch.no_grad():
        model(*inputs)
        monkeypatch.setattr(VideoDiT, "forward", turned)
        assert close(model(*inputs), alone(*inputs))


def test_a_table_that_is_kept_for_later_is_real():
    @functools.lru_cache
    def table(length):
        return torch.arange(length)[:, None] * 0.01

    def with_table(model, tokens, grid, text):
        return one_after_the_other(model, tokens + table(tokens.shape[1]), grid, text)

    alone, model, inputs = randomise(Stack(with_table)), regional(randomise(Stack(with_table))), dit_inputs()
    with torch.no_grad():
        assert close(model(*inputs), masked(alone, inputs))


def test_inference_mode_first_and_then_another():
    alone, model, inputs = randomise(Stack()), regional(randomise(Stack())), dit_inputs()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert close(model(*inputs), masked(alone, inputs))


def test_a_second_compile_takes_the_place_of_the_first():
    model, alone, inputs = randomise(Stack()), randomise(Stack()), dit_inputs()
    regional(regional(model), reference_frames=100)
    with torch.no_grad():
        assert torch.equal(model(*inputs), alone(*inputs))
    assert isinstance(watch_of(model), Watch)
    assert lvsa_compile.undo(model) is model
    assert all("_compiled_call_impl" not in vars(module) for module in model.modules())


@torch._dynamo.disable
def _turned(tokens):
    return tokens.flip(1)


def test_values_decide_what_the_blocks_get():
    def sometimes_turned(model, tokens, grid, text):
        return one_after_the_other(model, _turned(tokens) if text.sum() > 0 else tokens, grid, text)

    alone, model = randomise(Stack(sometimes_turned)), regional(randomise(Stack(sometimes_turned)))
    latents, timestep, text = dit_inputs()
    for sign in (1, -1, 1, -1):
        inputs = (latents, timestep, text.abs() * sign)
        with torch.no_grad():
            output = model(*inputs)
            assert close(output, alone(*inputs) if sign > 0 else masked(alone, inputs))


def test_weights_decide_what_the_blocks_get():
    def decided_by_a_weight(model, tokens, grid, text):
        return one_after_the_other(model, tokens if model.unpatch.weight.sum() > 0 else tokens.flip(1), grid, text)

    alone, model = randomise(Stack(decided_by_a_weight)), regional(randomise(Stack(decided_by_a_weight)))
    inputs = dit_inputs()
    for sign in (1, -1, 1):
        with torch.no_grad():
            for each in (alone, model):
                each.unpatch.weight.copy_(each.unpatch.weight.abs() * sign)
            assert close(model(*inputs), masked(alone, inputs) if sign > 0 else alone(*inputs))


def test_a_block_called_by_itself_is_dense():
    model, inputs = regional(randomise(Stack())), dit_inputs()
    tokens = torch.randn(1, 108, 16)
    with torch.no_grad():
        dense = randomise(Stack()).blocks[0](tokens)
        assert torch.equal(model.blocks[0](tokens), dense)
        model(*inputs)
        assert torch.equal(model.blocks[0](tokens), dense)


def test_a_forward_that_fails_leaves_nothing_behind():
    model = regional(randomise(Stack()))
    latents, timestep, text = dit_inputs()
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(latents[:, :3], timestep, text)
    assert context.parent.get() is None
    with torch.no_grad():
        assert close(model(latents, timestep, text), masked(randomise(Stack()), (latents, timestep, text)))


class Broken(Block):
    def forward(self, tokens, text=None):
        torch._dynamo.graph_break()
        return super().forward(tokens)


class Cut(Block):
    """Cuts its prompt to a length that only run time knows."""

    def forward(self, tokens, text=None):
        text = text[:, : (text[0, :, 0] != 0).sum()]
        return tokens + self.attention(torch.cat([tokens, text], 1))[:, : tokens.shape[1]]


@pytest.mark.parametrize(("block", "run", "suffix"), [(Broken, one_after_the_other, 0), (Cut, with_text, 5)])
def test_blocks_that_are_no_single_graph_by_default(block, run, suffix):
    alone, model = randomise(Stack(run, block)), regional(randomise(Stack(run, block)))
    latents, timestep, text = dit_inputs()
    text[:, 5:] = 0
    inputs = (latents, timestep, text)
    with torch.no_grad():
        assert close(model(*inputs), masked(alone, inputs, suffix=suffix))


def test_two_models_have_two_clocks():
    models = [regional(randomise(Stack(), seed)) for seed in (1, 2)]
    alone = [randomise(Stack(), seed) for seed in (1, 2)]
    for step, value in enumerate(timesteps(3)):
        inputs = dit_inputs(timestep=value)
        with torch.no_grad():
            assert close(models[0](*inputs), masked(alone[0], inputs, step))
        if step == 1:
            with torch.no_grad():
                assert close(models[1](*inputs), masked(alone[1], inputs, 0))


BY_BLOCKS = lvsa_compile.compile_repeated_blocks
ERRORS = [
    (lambda: BY_BLOCKS("pipe"), "compile_repeated_blocks(model=str): not a module. Give the transformer, such as pipe.transformer."),
    (lambda: BY_BLOCKS(VideoDiT()), "(model=VideoDiT): no list of modules holds two blocks of a class. Use torch.compile(model, "),
    (lambda: BY_BLOCKS(Stack(), backend="inductor"), "(backend=inductor): this function compiles for 'lvsa'. Leave backend out."),
    (lambda: BY_BLOCKS(Stack(), options={"windw": 2}), "option windw=2: neither lvsa nor Inductor has this option. Did you mean 'window'?"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_what_cannot_be_compiled_by_blocks(call, message):
    with pytest.raises(lvsa_compile.LvsaError) as error:
        call()
    assert message in str(error.value)
