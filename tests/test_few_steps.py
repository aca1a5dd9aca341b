"""Rotation from layer to layer: a layer's phase is the same whoever compiles it, and reports say where a schedule was short."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from test_regional import Block, Stack
from test_watching import graphs, in_place, in_the_list
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise, timesteps, wan, wan_inputs
from torch import nn
from torch.overrides import TorchFunctionMode

import lvsa_compile
from lvsa_compile.forward.layers import Layers
from lvsa_compile.policies.lvsa.policy import LVSA
from lvsa_compile.policies.rows import Turn, WithDenseSteps

FRAMES, TOKENS = 9, 12
INTERVAL = oracle.interval(FRAMES, 1, 1, 4)


class ByLayer(TorchFunctionMode):
    """Inside it, the n-th eager SDPA over the whole video gets the mask of the phase that ``phase_of(n)`` says."""

    def __init__(self, phase_of) -> None:
        super().__init__()
        self.phase_of, self.layer = phase_of, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            call = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            if call["query"].shape[-2] == call["key"].shape[-2] == FRAMES * TOKENS:
                mask = oracle.token_mask(FRAMES, TOKENS, self.phase_of(self.layer), reference=4, window=1)
                self.layer += 1
                return func(**{**call, "attn_mask": mask})
        return func(*args, **(kwargs or {}))


def close(output, answer):
    """Five layers without norms make a hundred times more of float32's rounding; another phase makes a difference of percents."""
    return float((output - answer).abs().max()) < 1e-3 * float(answer.abs().max())


PHASES = {
    "step": lambda step: lambda layer: step,
    "layer": lambda step: lambda layer: layer,
    "both": lambda step: lambda layer: step + layer,
}


def by_layer(model, inputs, phase_of):
    with ByLayer(phase_of):
        return model(*inputs)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def whole(model, **settings):
    return torch.compile(model, **settings)


def regional(model, **settings):
    return lvsa_compile.compile_repeated_blocks(model, options=settings["options"])


def watched(model, **settings):
    return lvsa_compile.enable(model, **settings["options"])


WAYS = {"whole": whole, "in place": in_place, "in the list": in_the_list, "regional": regional, "eager": watched}


@pytest.mark.parametrize("rotate", PHASES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_of_compiling_gives_a_layer_the_same_phase(way, rotate):
    alone = randomise(Stack(count=5))
    model = way(randomise(Stack(count=5)), backend="lvsa", options={**EXACT, "rotate": rotate})
    apart = by_layer(alone, dit_inputs(), PHASES[rotate](0)), by_layer(alone, dit_inputs(), lambda layer: 0)
    assert rotate == "step" or not close(*apart), "the test could not tell one layer from another"
    made = []
    for video in range(2):
        for step, value in enumerate(timesteps(4)):
            inputs = dit_inputs(timestep=value)
            output = model(*inputs)
            made.append(graphs())
            if video or step:
                assert close(output, by_layer(alone, inputs, PHASES[rotate](step))), (video, step)
    assert made[1] == made[-1], "no graph more over the steps"


def test_diffusers_wan_under_inductor_with_dense_steps():
    alone, model = wan(num_layers=3), wan(num_layers=3)
    compiled = torch.compile(model, backend="lvsa", options={"reference_frames": 4, "window": 1, "rotate": "both", "dense_steps": 1})
    for step, value in enumerate(timesteps(3)):
        inputs = wan_inputs(timestep=value)
        with ByLayer(PHASES["both"](step)):
            answer = alone(**inputs)[0]
        assert close(compiled(**inputs)[0], answer if step else alone(**inputs)[0]), step


def test_a_skipped_layer_keeps_its_number():
    def some(model, tokens, grid, text):
        for number, block in enumerate(model.blocks):
            if number not in model.skipped:
                tokens = block(tokens)
        return tokens

    alone, model = (randomise(Stack(some, count=4)) for _ in range(2))
    in_place(model, backend="lvsa", options={**EXACT, "rotate": "both"})
    skips = [(), (), (1,), (), (0, 2), (3,), ()]
    for step, (skipped, value) in enumerate(zip(skips, timesteps(len(skips)), strict=True)):
        alone.skipped = model.skipped = skipped
        kept = [number for number in range(4) if number not in skipped]
        output = model(*dit_inputs(timestep=value))
        if step:
            assert close(output, by_layer(alone, dit_inputs(timestep=value), lambda n, k=kept, s=step: s + k[n])), step


def test_two_kinds_of_blocks_and_blocks_that_hold_no_video_attention():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Linear(16, 16)

        def forward(self, tokens):
            return tokens + self.mlp(tokens)

    class Twice(Block):
        def __init__(self):
            super().__init__()
            self.again = Block()

        def forward(self, tokens):
            return self.again(super().forward(tokens))

    def mixed(model):
        model.blocks = nn.ModuleList([Block(), Plain(), Twice(), Block(), Plain(), Twice()])
        return randomise(model)

    options = {**EXACT, "rotate": "both"}
    alone, blocks, compiled = mixed(Stack()), in_place(mixed(Stack()), backend="lvsa", options=options), mixed(Stack())
    compiled = torch.compile(compiled, backend="lvsa", options=options)
    for step, value in enumerate(timesteps(4)):
        inputs = dit_inputs(timestep=value)
        answer = by_layer(alone, inputs, PHASES["both"](step))
        assert close(compiled(*inputs), answer), step
        output = blocks(*inputs)
        assert step == 0 or close(output, answer), step


def test_two_steps_in_one_graph_number_the_layers_of_the_model_once():
    alone, model = randomise(Stack(count=5)), randomise(Stack(count=5))

    def two_steps(latents, times, text):
        first, second = times.unbind()
        return model(latents, first[None], text), model(latents, second[None], text)

    compiled = torch.compile(two_steps, backend="lvsa", options={**EXACT, "rotate": "both"})
    latents, _, text = dit_inputs()
    for first in (0, 2):
        times = torch.tensor(timesteps(4)[first : first + 2])
        for number, output in enumerate(compiled(latents, times, text)):
            answer = by_layer(alone, (latents, times[number][None], text), PHASES["both"](first + number))
            assert close(output, answer), first + number


def test_guidance_in_one_graph_numbers_the_layers_of_the_model_once():
    alone, model = randomise(Stack(count=5)), randomise(Stack(count=5))

    def guided(latents, timestep, text):
        return model(latents, timestep, text) - 0.5 * model(latents, timestep, 2 * text)

    compiled = torch.compile(guided, backend="lvsa", options={**EXACT, "rotate": "both"})
    for step, value in enumerate(timesteps(3)):
        latents, timestep, text = dit_inputs(timestep=value)
        one, two = (by_layer(alone, (latents, timestep, t), PHASES["both"](step)) for t in (text, 2 * text))
        assert close(compiled(latents, timestep, text), one - 0.5 * two), step
    assert 5 % INTERVAL, "else numbers that went on would look the same"


def test_layers_are_numbered_in_the_order_in_which_forwards_reach_them():
    layers = Layers()
    one, two, three = object(), object(), object()
    assert [layers.first_of(part, 2, one) for part in "ac"] == [0, 2]
    assert [layers.first_of(part, 2, two) for part in "abc"] == [0, 2, 4], "what an earlier forward left out comes in its place"
    assert [layers.first_of(part, 2, three) for part in "xa"] == [0, 2]
    assert layers.count == 8


def test_rules_that_choose_alike_are_equal():
    assert Turn(3, by_layer=True).later(4) == Turn(3, by_layer=True).later(1)
    assert Turn(3).later(4) == Turn(3)
    assert WithDenseSteps(Turn(3, by_layer=True), 1, 3).later(2)(torch.tensor(2)) == 1
    still = Turn(3, by_step=False, by_layer=True).later(2)
    assert not still.moves
    assert [int(still(torch.tensor(step))) for step in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("value", [1, "steps", None, ["step"]])
def test_other_values_are_errors(value):
    remedy = r"Choose one of: 'step', 'layer', 'both', True \(which is 'step'\), False\."
    with pytest.raises(lvsa_compile.OptionError, match=f"rotate=.*not a known choice.*{remedy}"):
        lvsa_compile.make_options(rotate=value)
    with pytest.raises(lvsa_compile.OptionError, match=remedy):
        LVSA(rotate=value)


def anchors_of(steps, videos=1, **options):
    model = torch.compile(randomise(Stack(count=3)), backend="lvsa", options={**EXACT, **options})
    for _ in range(videos):
        for value in timesteps(steps):
            model(*dit_inputs(timestep=value))
    return [line.strip() for line in str(lvsa_compile.reports()[-1]).splitlines() if line.startswith("  anchors: ")]


def test_the_report_says_where_a_schedule_was_short():
    share = lvsa_compile.FramePattern(FRAMES, window=1, reference_frames=4).coverage(2)
    (line,) = anchors_of(2)
    assert line == (
        f"anchors: in 2 denoising steps {share:.0%} of the 9 latent frames were one at least once; all are after {INTERVAL}. "
        "options={'rotate': 'both'} moves the anchors from layer to layer, too"
    )
    torch._dynamo.reset()
    assert anchors_of(2, videos=3) == [line]


@pytest.mark.parametrize(("steps", "options"), [(8, {"rotate": "both"}), (INTERVAL, {}), (2, {"rotate": False}), (2, {"rotate": "layer"})])
def test_the_report_says_nothing_where_no_frame_was_left_out(steps, options):
    assert anchors_of(steps, **options) == []


def test_the_report_says_that_the_grid_moves_from_layer_to_layer():
    anchors_of(2, rotate="layer")
    assert "denoising step: rotate='layer', the anchor grid moves from layer to layer and not from step to step" in str(
        lvsa_compile.reports()[-1]
    )


def test_attention_in_one_line_of_a_loop_is_a_layer_per_round():
    def run(model, tokens, grid, text):
        for _ in range(3):
            heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
            tokens = tokens + F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        return tokens

    alone = randomise(VideoDiT(run))
    options = {**EXACT, "rotate": "both"}
    compiled, eager = torch.compile(randomise(VideoDiT(run)), backend="lvsa", options=options), randomise(VideoDiT(run))
    lvsa_compile.enable(eager, **options)
    for step, value in enumerate(timesteps(3)):
        inputs = dit_inputs(timestep=value)
        answer = by_layer(alone, inputs, PHASES["both"](step))
        assert close(compiled(*inputs), answer), step
        assert close(eager(*inputs), answer), step
