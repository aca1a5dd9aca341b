"""Policies beside LVSA, through every lowering that serves; whole, block by block, and with graph breaks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import html
import importlib
import json
import pickle
import re
import sys
import types
from pathlib import Path
from typing import ClassVar

import oracle
import pytest
import torch
from block_policies import COUNTING, BlockDiagonal, Counting, Refusing
from plans import plan as lvsa_plan
from test_graph_breaks import breaks_after, breaks_before, breaks_twice
from test_regional import Block, Stack, with_text
from tiny_models import VideoDiT, dit_inputs, randomise, wan, wan_inputs
from torch import nn
from typer.testing import CliRunner

import lvsa_compile
from lvsa_compile import FramePattern, LvsaWarning, OptionError, registry
from lvsa_compile.cli import app
from lvsa_compile.errors import PlanError, PolicyError
from lvsa_compile.forward import state
from lvsa_compile.options import parse_options
from lvsa_compile.policies.contract import Facts, Geometry, Plan, plan_of
from lvsa_compile.policies.lvsa.policy import LVSA
from lvsa_compile.policies.tables import VideoSpan, padded
from lvsa_compile.report.comparison import differences
from lvsa_compile.report.page import page
from lvsa_compile.selection import select

EAGER = {"inner": "eager", "lowering": "auto"}
SERVING = [lowering.name for lowering in select.lowerings() if lowering.name in ("cpu", "dense_merge", "reference")]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class PerHead(oracle.MaskedAttention):
    """Inside it, SDPA over the video gets a mask per head."""

    def __init__(self, mask):
        super().__init__(mask[0])
        self.per_head = mask

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before = self.calls
        masked, self.mask = self.mask, self.per_head[0]
        try:
            answer = super().__torch_function__(func, types, args, kwargs)
        finally:
            self.mask = masked
        if self.calls == before:
            return answer
        call = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        return torch.nn.functional.scaled_dot_product_attention(**{**call, "attn_mask": self.per_head[None]})


def diagonal(frames: int, places: int, heads: int = 2, prefix: int = 0, suffix: int = 0) -> torch.Tensor:
    """bool [heads, S, S], from the definition."""
    tokens = frames * places
    edges = [prefix + tokens * n // 4 for n in range(5)]
    block = torch.tensor([sum(edge <= at for edge in edges[1:4]) for at in range(prefix, prefix + tokens)])
    mask = torch.ones(heads, prefix + tokens + suffix, prefix + tokens + suffix, dtype=torch.bool)
    for head in range(heads):
        own = block // (2 if head % 2 else 1)
        mask[head, prefix : prefix + tokens, prefix : prefix + tokens] = own[:, None] == own[None]
    return mask


def masked(model, inputs, mask):
    with PerHead(mask) as mode:
        answer = model(*inputs) if isinstance(inputs, tuple) else model(**inputs)[0]
    assert mode.calls
    return answer


def close(found, wanted, tolerance=2e-5):
    return float((found - wanted).abs().max() / wanted.abs().max()) < tolerance


@pytest.mark.parametrize("lowering", SERVING)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_static_pattern_per_head_by_every_lowering(lowering, inner):
    model, inputs = wan(), wan_inputs()
    found = torch.compile(model, backend="lvsa", options={"policy": BlockDiagonal(), "lowering": lowering, "inner": inner})(**inputs)[0]
    assert close(found, masked(model, inputs, diagonal(9, 12)))
    (report,) = lvsa_compile.reports()
    assert [site.lowering for site in report.sparse_sites] == [lowering] * 2
    assert report.sparse_sites[0].density == pytest.approx(0.375)


def test_a_static_pattern_per_head_by_triton_in_its_interpreter():
    model, inputs = wan(num_layers=1), wan_inputs()
    found = torch.compile(model, backend="lvsa", options={"policy": BlockDiagonal(), "lowering": "triton", "inner": "eager"})(**inputs)[0]
    assert close(found, masked(model, inputs, diagonal(9, 12)))


@pytest.mark.inductor
def test_a_static_pattern_per_head_by_inductor():
    model, inputs = wan(), wan_inputs()
    assert close(
        torch.compile(model, backend="lvsa", options={"policy": BlockDiagonal()})(**inputs)[0], masked(model, inputs, diagonal(9, 12))
    )


def with_text_before(model, tokens, grid, text):
    return model.attention(torch.cat([text, tokens], 1))[:, text.shape[1] :]


MODELS = {
    "text before": (lambda: VideoDiT(with_text_before), diagonal(9, 12, prefix=7), 1),
    "breaks": (lambda: VideoDiT(breaks_twice), diagonal(9, 12), 2),
}


@pytest.mark.parametrize(("make", "mask", "sites"), MODELS.values(), ids=MODELS)
def test_text_and_graph_breaks(make, mask, sites):
    model, inputs = randomise(make()), dit_inputs()
    assert close(torch.compile(model, backend="lvsa", options={**EAGER, "policy": BlockDiagonal()})(*inputs), masked(model, inputs, mask))
    assert sum(len(report.sparse_sites) for report in lvsa_compile.reports()) == sites


def test_block_by_block_and_at_a_second_size():
    model, alone = randomise(Stack(with_text)), randomise(Stack(with_text))
    lvsa_compile.compile_repeated_blocks(model, options={**EAGER, "policy": BlockDiagonal()})
    for frames in (9, 13):
        inputs = dit_inputs(frames)
        assert close(model(*inputs), masked(alone, inputs, diagonal(frames, 12, prefix=7)))


def test_a_free_number_of_text_tokens_before_the_video():
    model = randomise(VideoDiT(with_text_before))
    compiled = torch.compile(model, backend="lvsa", dynamic=True, options={**EAGER, "policy": BlockDiagonal()})
    for text in (7, 9, 12):
        inputs = dit_inputs(text=text)
        assert close(compiled(*inputs), masked(model, inputs, diagonal(9, 12, prefix=text)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def masked_by_frames(model, tokens, grid, text):
    """A constant mask: the last two frames do not see the first two."""
    frame = torch.arange(9).repeat_interleave(12)
    mask = ~((frame[:, None] >= 7) & (frame[None] < 2))
    return tokens + model.attention(tokens, attn_mask=mask)


def test_a_constant_mask_and_empty_query_blocks():
    """Blocks of whole frames, and text blocks without a token."""

    @dataclasses.dataclass(frozen=True)
    class Frames:
        name: ClassVar[str] = "frames"
        needs_horizon: ClassVar[bool] = False

        def applies(self, geometry, facts):
            return None

        def plan(self, geometry, facts):
            bounds = [0, *(12 * n for n in range(10)), 108]
            own = [[(0, 1)], *([(12 * max(n - 2, 0), 12 * (n + 1))] for n in range(9)), [(0, 1)]]
            return Plan(self, geometry, facts, padded(bounds, [[own]]))

    model, inputs = randomise(VideoDiT(masked_by_frames)), dit_inputs()
    found = torch.compile(model, backend="lvsa", options={**EAGER, "policy": Frames()})(*inputs)
    frame = torch.arange(9).repeat_interleave(12)
    mask = (frame[None] <= frame[:, None]) & (frame[None] >= frame[:, None] - 2) & ~((frame[:, None] >= 7) & (frame[None] < 2))
    with oracle.MaskedAttention(mask) as mode:
        mode.replaces_masks = True
        wanted = model(*inputs)
    assert lvsa_compile.reports()[0].sparse_sites
    assert close(found, wanted)


def test_dense_steps_hold_for_every_policy():
    model = wan()
    compiled = torch.compile(model, backend="lvsa", options={**EAGER, "policy": BlockDiagonal(), "dense_steps": 1})
    for step, value in enumerate((900.0, 800.0, 700.0)):
        inputs = wan_inputs(timestep=value)
        wanted = masked(model, inputs, diagonal(9, 12)) if step else model(**inputs)[0]
        assert close(compiled(**inputs)[0], wanted), step
    assert [site.dense_step_calls for site in lvsa_compile.reports()[0].receipt().sites][:1] == [1]


@pytest.mark.parametrize("policy", [BlockDiagonal(), Counting()], ids=["static", "state"])
def test_verify_measure_report_and_page(policy, counting):
    model, inputs = wan(), wan_inputs()
    torch.compile(model, backend="lvsa", options={"inner": "aot_eager", "policy": policy, "verify": policy != Counting()})(**inputs)
    (report,) = lvsa_compile.reports()
    site = report.sparse_sites[0]
    assert site.worst_error is None if policy == Counting() else site.worst_error < 1e-5
    shown = html.unescape(page(report))
    assert f"policy {policy.name!r}; density" in shown
    assert f"video: 9 latent frames, sparse by policy {policy.name!r}" in str(report)
    (plain,) = {json.dumps(each["policy"]) for each in json.loads(json.dumps(report.to_dict()))["graphs"][0]["sites"] if each["policy"]}
    assert json.loads(plain) == {"name": policy.name}
    (view,) = json.loads(re.search(r'id="patterns">(.*?)</script>', page(report), re.DOTALL)[1])
    if policy == BlockDiagonal():
        assert (view["turns"], len(view["phases"]), view["columns"]) == ("head", 2, 108)
        assert view["phases"][0][1] == [[[27 * n, 27 * n + 26]] for n in range(4)]
        assert view["phases"][1][1] == [[[0, 53]], [[0, 53]], [[54, 107]], [[54, 107]]]
        assert set(report.measured().sparse_sites[0].seconds) == {site.lowering, "dense"}


def counted(model, inputs, branch_calls):
    """Eager: each site's attention times how often its branch was called."""

    class Times(oracle.MaskedAttention):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            before = self.calls
            answer = super().__torch_function__(func, types, args, kwargs)
            return answer * branch_calls if self.calls > before else answer

    with Times(torch.ones(108, 108, dtype=torch.bool)) as mode:
        answer = model(**inputs)[0]
    assert mode.calls
    return answer


@pytest.fixture
def counting(monkeypatch):
    everything = (*select.lowerings(), COUNTING)
    monkeypatch.setattr(select, "lowerings", lambda: everything)


RUNS = {"whole": "aot_eager", "inductor": "inductor", "blocks": "aot_eager"}


@pytest.mark.parametrize("run", RUNS)
def test_state_is_kept_by_step_site_and_branch_and_begins_with_each_video(run, counting):
    model, alone = wan(), wan()
    options = {"policy": Counting(), "inner": RUNS[run]}
    if run == "blocks":
        lvsa_compile.compile_repeated_blocks(model, options=options)
    compiled = model if run == "blocks" else torch.compile(model, backend="lvsa", options=options)
    for _video in range(2):
        for step, value in enumerate((900.0, 600.0, 300.0)):
            for _branch in range(2):
                inputs = wan_inputs(timestep=value)
                assert close(compiled(**inputs)[0], counted(alone, inputs, step + 1)), (step, _branch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_branches_beyond_those_that_have_state_begin_anew_each_time(counting):
    model, alone = wan(num_layers=1), wan(num_layers=1)
    compiled = torch.compile(model, backend="lvsa", options={"policy": Counting(), "inner": "aot_eager"})
    for step, value in enumerate((900.0, 600.0)):
        for branch in range(state.BRANCHES + 1):
            wanted = step + 1 if branch < state.BRANCHES - 1 else 1
            inputs = wan_inputs(timestep=value)
            assert close(compiled(**inputs)[0], counted(alone, inputs, wanted)), (step, branch)


def test_steps_that_are_said_tell_branches_too(counting):
    model, alone = wan(num_layers=1), wan(num_layers=1)
    compiled = torch.compile(model, backend="lvsa", options={"policy": Counting(), "inner": "aot_eager"})
    for _video in range(2):
        for step in range(3):
            for _branch in range(2):
                with lvsa_compile.step(step):
                    found = compiled(**wan_inputs())[0]
                assert close(found, counted(alone, wan_inputs(), step + 1)), (step, _branch)


def run_counting(compiled, alone, inputs_at, steps=(900.0, 600.0, 300.0), branches=2, explicit=False, length=108):
    """Two videos: every site's attention is multiplied by how many steps its branch ran."""
    for _video in range(2):
        for step, value in enumerate(steps):
            for _branch in range(branches):
                inputs = inputs_at(value)
                with lvsa_compile.step(step) if explicit else contextlib.nullcontext():
                    found = compiled(*inputs)
                assert close(found, times(alone, inputs, step + 1), 1e-3), (step, _branch)


def times(model, inputs, factor):
    class Times(oracle.MaskedAttention):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            answer = func(*args, **(kwargs or {}))
            return answer * factor if func is torch.nn.functional.scaled_dot_product_attention else answer

    with Times(torch.ones(1, 1)):
        return model(*inputs)


def twice(model, tokens, grid, text):
    tokens = tokens + model.attention(tokens)
    return tokens + model.attention(tokens)


def again_after_a_break(model, tokens, grid, text):
    tokens = tokens + model.attention(tokens)
    torch._dynamo.graph_break()
    return tokens + model.attention(tokens)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("block", [breaks_before, breaks_after, breaks_twice, twice, again_after_a_break])
def test_state_across_graph_breaks_and_of_a_module_that_is_called_twice(block, explicit, counting):
    """One call of the forward is one guidance branch, however many graphs it has."""
    model, alone = randomise(VideoDiT(block)), randomise(VideoDiT(block))
    compiled = torch.compile(model, backend="lvsa", options={"policy": Counting(), "inner": "aot_eager"})
    run_counting(compiled, alone, lambda value: dit_inputs(timestep=value), explicit=explicit)


class WithBuffers(Block):
    """A block without parameters, as quantised ones are."""

    def __init__(self):
        super().__init__()
        for module in list(self.modules()):
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    module.register_buffer(name, parameter.detach().clone())


def each_twice(model, tokens, grid, text):
    for block in model.blocks:
        tokens = block(block(tokens))
    return tokens


BLOCKS = {"buffers": lambda: Stack(block=WithBuffers), "called twice": lambda: Stack(each_twice), "with text": lambda: Stack(with_text)}


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_state_of_blocks_that_share_a_graph(make, counting):
    model, alone = randomise(make()), randomise(make())
    alone.load_state_dict(model.state_dict())
    lvsa_compile.compile_repeated_blocks(model, options={"policy": Counting(), "inner": "aot_eager"})
    run_counting(model, alone, lambda value: dit_inputs(timestep=value))


@pytest.mark.parametrize("blocks", [False, True])
def test_state_stays_with_the_module_where_parameters_are_replaced(blocks, counting):
    """As where adapters are merged or weights are loaded by assignment; nothing of the old ones is kept."""
    model, alone = randomise(Stack()), randomise(Stack())
    options = {"policy": Counting(), "inner": "aot_eager"}
    if blocks:
        lvsa_compile.compile_repeated_blocks(model, options=options)
    compiled = model if blocks else torch.compile(model, backend="lvsa", options=options)
    for step, value in enumerate((900.0, 600.0, 300.0)):
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
        inputs = dit_inputs(timestep=value)
        assert close(compiled(*inputs), times(alone, inputs, step + 1), 1e-3), step


def test_state_goes_with_the_video_from_thread_to_thread(counting):
    """As servers run steps; with two guidance calls, whichever thread makes them."""
    model, alone = randomise(VideoDiT()), randomise(VideoDiT())
    compiled = torch.compile(model, backend="lvsa", options={"policy": Counting(), "inner": "aot_eager"})
    compiled(*dit_inputs(timestep=900.0))
    lvsa_compile.reset()
    threads = {name: concurrent.futures.ThreadPoolExecutor(1) for name in "AB"}

    def call(value):
        with torch.no_grad():
            return compiled(*dit_inputs(timestep=value))

    for step, (name, value) in enumerate(zip("ABABA", (900.0, 700.0, 500.0, 300.0, 100.0), strict=True)):
        for _branch in range(2):
            found = threads[name].submit(call, value).result()
            assert close(found, times(alone, dit_inputs(timestep=value), step + 1)), (step, name)


def test_a_loop_over_steps_in_one_graph_keeps_state_from_step_to_step(counting):
    model, alone = randomise(VideoDiT()), randomise(VideoDiT())

    def sampler(denoiser, latents, timesteps, text):
        for step in range(3):
            latents = latents - 0.1 * denoiser(latents, timesteps[step].reshape(1), text)
        return latents

    def expected(latents, timesteps, text):
        for step in range(3):
            latents = latents - 0.1 * times(alone, (latents, timesteps[step].reshape(1), text), step + 1)
        return latents

    latents, _, text = dit_inputs()
    schedule = torch.tensor([900.0, 600.0, 300.0])
    compiled = torch.compile(lambda *args: sampler(model, *args), backend="lvsa", options={"policy": Counting(), "inner": "aot_eager"})
    for _video in range(2):
        assert close(compiled(latents, schedule, text), expected(latents, schedule, text))


def test_dynamo_reset_and_lvsa_reset(counting):
    """The one gives the tensors up, the other begins new videos at the same addresses."""
    model, alone = randomise(VideoDiT()), randomise(VideoDiT())
    options = {"policy": Counting(), "inner": "aot_eager"}
    compiled = torch.compile(model, backend="lvsa", options=options)
    for expected, value, reset in ((1, 900.0, None), (2, 600.0, lvsa_compile.reset), (1, 300.0, torch._dynamo.reset), (1, 200.0, None)):
        inputs = dit_inputs(timestep=value)
        assert close(compiled(*inputs), times(alone, inputs, expected)), value
        if reset is not None:
            reset()
            compiled = torch.compile(model, backend="lvsa", options=options)  # torch resets the backends of calls since its last reset
    assert all(len(states._tensors) <= 2 for states in state._everywhere)


def test_what_was_set_for_another_policy_does_not_reach_this_one(monkeypatch):
    monkeypatch.setenv("LVSA_OPTIONS", '{"window": 1, "reference_frames": 4}')
    assert parse_options({}).chosen_policy == LVSA(window=1)
    assert parse_options({"policy": LVSA()}).chosen_policy == LVSA()
    assert parse_options({"policy": BlockDiagonal()}).reference_frames == 4
    monkeypatch.setenv("LVSA_OPTIONS", '{"policy": {"name": "lvsa", "window": 1}}')
    with pytest.raises(OptionError, match="option window=3: a field of policy 'lvsa' beside policy="):
        parse_options({"window": 3})


def test_a_flag_of_lvsa_is_true_or_false():
    with pytest.raises(OptionError, match=r"not True or False\. Give True or False"):
        LVSA(expand_window=1)


def test_reports_are_pickled_and_measure_afterwards():
    model = wan(num_layers=1)
    torch.compile(model, backend="lvsa", options={**EAGER, "policy": BlockDiagonal(), "lowering": "cpu"})(**wan_inputs())
    report = pickle.loads(pickle.dumps(lvsa_compile.reports()[0]))
    assert report.summary == lvsa_compile.reports()[0].summary
    assert set(report.measured().sparse_sites[0].seconds) == {"cpu", "dense"}


def test_policies_that_stand_still_ask_for_no_timestep(recwarn):
    class NoTime(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = randomise(VideoDiT())

        def forward(self, latents, text):
            return self.inner(latents, torch.full((1,), 500.0), text)

    latents, _, text = dit_inputs()
    for policy in (BlockDiagonal(), LVSA(window=1, rotate=False)):
        torch._dynamo.reset()
        with lvsa_compile.step(0):
            torch.compile(NoTime(), backend="lvsa", options={**EAGER, "policy": policy, "reference_frames": 4})(latents, text)
        (report,) = lvsa_compile.reports()
        still = "all steps are alike" if policy == BlockDiagonal() else "rotate=False, the anchor grid stands still"
        assert f"denoising step: {still}" in str(report)
    assert not [str(each.message) for each in recwarn if "timestep" in str(each.message)]


def test_reports_differ_where_policies_do():
    found = [lvsa_compile.explain(wan(num_layers=1), options={"policy": p, "reference_frames": 4}, **wan_inputs()).to_dict()
             for p in (LVSA(window=1), LVSA(window=2))]  # fmt: skip
    changed = {each.what for each in differences(*found) if each.site}
    assert {"policy", "pattern"} <= changed


def test_two_models_and_two_sizes_have_state_of_their_own_and_a_third_size_begins_anew(counting):
    models = [wan(seed, num_layers=1) for seed in range(2)]
    alone = [wan(seed, num_layers=1) for seed in range(2)]
    compiled = [torch.compile(model, backend="lvsa", options={"policy": Counting(), "inner": "aot_eager"}) for model in models]
    first, second = wan_inputs(), wan_inputs(rows=4, columns=3)
    for step, value in enumerate((900.0, 600.0)):
        for which, other in ((0, 0), (1, 1), (0, 1)):
            inputs = (first, second)[other] | {"timestep": torch.tensor([value])}
            assert close(compiled[which](**inputs)[0], counted(alone[which], inputs, step + 1)), (step, which, other)


@pytest.mark.slow
def test_state_lies_at_fixed_addresses_and_is_told_to_inductor_as_static(counting, monkeypatch):
    """What lets CUDA graphs take a graph that writes to its inputs."""
    import torch._inductor.compile_fx as fx

    seen, inner = [], fx._compile_fx_inner

    def spy(graph, example_inputs, **more):
        seen.append(([node.name for node in graph.graph.find_nodes(op="placeholder")], list(more.get("static_input_idxs") or ())))
        return inner(graph, example_inputs, **more)

    addresses = []

    def run(graph_module, example_inputs):
        names = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]

        def call(*args):
            addresses.append([arg.data_ptr() for name, arg in zip(names, args, strict=True) if name.startswith("lvsa_")])
            return graph_module.forward(*args)

        return call

    monkeypatch.setattr(fx, "_compile_fx_inner", spy)
    model = wan(num_layers=1)
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(model, backend="lvsa", options={"policy": Counting()})(**wan_inputs())
    ((names, static),) = seen
    appended = [n for n in range(len(names)) if n >= len(names) - 6]
    assert sum(n in static for n in appended) == 4, "two tables and two states, not the row and the branch"
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="lvsa", options={"policy": Counting(), "inner": run})
    for value in (900.0, 600.0, 950.0, 800.0):
        compiled(**wan_inputs(timestep=value))
    assert len(addresses) == 4
    assert len({tuple(each) for each in addresses}) == 1


def test_a_policy_that_answers_a_miss_leaves_the_site_dense_with_its_reason():
    model, inputs = wan(), wan_inputs()
    assert torch.equal(torch.compile(model, backend="lvsa", options={**EAGER, "policy": Refusing()})(**inputs)[0], model(**inputs)[0])
    site = lvsa_compile.reports()[0].sites[0]
    assert site.reason == "shape_not_supported"
    assert site.detail == "policy 'refusing' refuses 2 heads of (9, 3, 4)"


def test_a_policy_at_the_horizon_serves_where_lvsa_leaves_nothing_out():
    model = wan()
    options = {**EAGER, "reference_frames": 9, "window": 1, "policy_at_horizon": BlockDiagonal()}
    inputs = wan_inputs(9)
    assert close(torch.compile(model, backend="lvsa", options=options)(**inputs)[0], masked(model, inputs, diagonal(9, 12)))
    torch._dynamo.reset()
    longer = wan_inputs(25)
    mask = oracle.token_mask(25, 12, 0, reference=9, window=1)
    assert close(torch.compile(model, backend="lvsa", options=options)(**longer)[0], masked(model, longer, mask.expand(2, -1, -1)))


def test_a_policy_at_the_horizon_may_leave_it_dense_too():
    model, inputs = wan(), wan_inputs()
    options = {**EAGER, "reference_frames": 9, "policy_at_horizon": BlockDiagonal(least_frames=10)}
    assert torch.equal(torch.compile(model, backend="lvsa", options=options)(**inputs)[0], model(**inputs)[0])
    assert lvsa_compile.reports()[0].sites[0].detail == "9 latent frames, policy 'block_diagonal' wants 10"


def test_an_unknown_horizon_matters_only_to_a_policy_that_needs_one():
    model, inputs = randomise(VideoDiT()), dit_inputs()
    with pytest.warns(LvsaWarning, match="horizon_unknown"):
        torch.compile(model, backend="lvsa", options=EAGER)(*inputs)
    torch._dynamo.reset()
    torch.compile(model, backend="lvsa", options={**EAGER, "policy": BlockDiagonal()})(*inputs)
    assert lvsa_compile.reports()[0].sparse_sites


GIVEN = {"name": "lvsa", "object": LVSA(window=1), "json": {"name": "lvsa", "window": 1}}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_a_policy_is_given_by_name_as_an_object_or_as_json_has_it(given):
    options = {"policy": given, "reference_frames": 4, **({"window": 1} if given == "lvsa" else {})}
    assert parse_options(options).chosen_policy == LVSA(window=1)
    model, inputs = wan(), wan_inputs()
    found = torch.compile(model, backend="lvsa", options={**EAGER, **options})(**inputs)[0]
    mask = oracle.token_mask(9, 12, 0, reference=4, window=1)
    assert close(found, masked(model, inputs, mask.expand(2, -1, -1)))


@pytest.mark.parametrize(("given", "text"), [
    ({"policy": "lsva"}, "option policy='lsva': no policy has this name. Did you mean 'lvsa'?"),
    ({"policy": 3}, "option policy=3: no policy. Give one of 'adaspa', 'haste', 'losa', 'lvsa', 'radial', 'xattention', or a policy"),
    ({"policy": LVSA}, "this is a class. Give a policy, such as LVSA()."),
    ({"policy": {"name": "lvsa", "windows": 2}}, "policy 'lvsa' has no field 'windows'. Its fields are: window, first_frames,"),
    ({"policy": {"name": "lvsa", "window": -2}}, "option window=-2: smaller than 0. Give a number of latent frames, at least 0."),
    ({"policy": {"window": 2}}, "no policy. Give one of 'adaspa', 'haste', 'losa', 'lvsa', 'radial', 'xattention', or a policy object."),
    ({"policy": LVSA(window=2), "rotate": True},
     "option rotate=True: a field of policy 'lvsa' beside policy={'name': 'lvsa', 'window': 2}. Give it there, as in policy=LVSA(rotate="),
    ({"policy": BlockDiagonal(), "window": 2},
     "option window=2: a field of policy 'lvsa' beside policy={'name': 'block_diagonal'}. Leave it out."),
    ({"policy_at_horizon": "lvsa2"}, "option policy_at_horizon='lvsa2': no policy has this name. Did you mean 'lvsa'?"),
])  # fmt: skip
def test_what_is_no_policy_is_an_error_that_says_what_to_give(given, text):
    with pytest.raises(OptionError, match=re.escape(text)):
        parse_options(given)


def test_lvsas_options_are_its_fields():
    options = parse_options({"window": 2, "rotate": False, "sparsity_scale": 0.5, "key_frame_interval": 7, "first_frames": 2})
    assert options.chosen_policy == LVSA(2, 2, 0.5, 7, True, False)
    assert parse_options({"policy": LVSA(window=2)}).changed() == {"policy": {"name": "lvsa", "window": 2}}


class Wrong(BlockDiagonal):
    def __init__(self, table, rows=None):
        object.__setattr__(self, "table", table)

    def __hash__(self):
        return id(self)

    def plan(self, geometry: Geometry, facts: Facts) -> Plan:
        return Plan(self, geometry, facts, self.table)


@pytest.mark.parametrize(("part", "bounds", "key_ranges", "text"), [
    ("table", (0, 50), [[[[(0, 108)]]]], "query_bounds are (0, 50). Let query_bounds rise from 0 to geometry.query.whole[1], 108."),
    ("table", (0, 80, 50, 108), [[[[(0, 108)]] * 3]], "query_bounds are (0, 80, 50, 108). Let query_bounds rise"),
    ("table", (0, 50, 200), [[[[(0, 108)]] * 2]], "query_bounds are (0, 50, 200). Let query_bounds rise"),
    ("table", (0, 108), [[[[(0, 108)]]] * 3], "it has 3 heads. Give 1 or 2, the query heads."),
    ("table", (0, 54, 108), [[[[(0, 108)]]]], "a row has 1 blocks, query_bounds have 2. Give each query block its key ranges."),
    ("table", (0, 108), [[[[(-5, 20)]]]], "block 0 attends keys (-5, 20) of 108. Keep ranges within geometry.key.whole."),
    ("table", (0, 108), [[[[(0, 500)]]]], "block 0 attends keys (0, 500) of 108. Keep ranges within geometry.key.whole."),
    ("table", (0, 54, 108), [[[[(0, 9)], []]]], "block 1 attends no key. Give every query block at least one key."),
    ("rows", (0, 108), [[[[(0, 108)]]]] * 3, "a step chooses among 1 rows, the table has 3. Give rows=Turn(number of rows)."),
])  # fmt: skip
def test_a_plan_that_does_not_fit_is_an_error_of_the_policy(part, bounds, key_ranges, text):
    span = VideoSpan(0, 9, 12, 0)
    with pytest.raises(PlanError, match=re.escape(f"policy 'block_diagonal', its plan's {part}: {text}")):
        plan_of(Wrong(padded(bounds, key_ranges)), Geometry.of(span, span, heads=2), Facts())


def test_ranges_may_come_in_any_order_and_overlap():
    table = padded((0, 9), [[[[(4, 7), (0, 2), (6, 9), (2, 2)]]]])
    assert table.key_ranges == (((((0, 2), (4, 9)),),),)
    span = VideoSpan(0, 3, 3, 0)
    assert table.density(span, span) == pytest.approx(7 / 9)


def answers(**methods):
    """A policy some of whose methods are replaced."""
    return type("Answering", (BlockDiagonal,), {"__hash__": lambda self: id(self), **methods})()


def raising(self, geometry, facts):
    return {}["missing"]


@pytest.mark.parametrize(("policy", "error", "text"), [
    (answers(applies=raising), PolicyError, "policy 'block_diagonal': its applies raised KeyError: 'missing' (File \"{file}\", line"),
    (answers(plan=raising), PolicyError, "policy 'block_diagonal': its plan raised KeyError: 'missing' (File \"{file}\", line"),
    (answers(applies=lambda *_: "no"), PolicyError, "policy 'block_diagonal': its applies returned 'no'. Return None, or a Miss such as"),
    (answers(plan=lambda *_: None), PolicyError, "policy 'block_diagonal': its plan returned None. Return a Plan."),
    (answers(plan=lambda self, g, f: dataclasses.replace(Counting().plan(g, f), policy=self, op="nobody_has_it")), PlanError,
     "its plan's op: there is no op lvsa::nobody_has_it. Define it: define_stateful_op('nobody_has_it', body)."),
    (answers(plan=lambda self, g, f: dataclasses.replace(Counting().plan(g, f), policy=self, state=())), PlanError,
     "its plan's state: lvsa::counting keeps state, the plan has 0 tensors of it. Give state=(State(...), ...) where the op has it"),
    (answers(plan=lambda self, g, f: dataclasses.replace(Counting().plan(g, f), policy=self, op="attention")), PlanError,
     "its plan's state: lvsa::attention keeps no state, the plan has 2 tensors of it. Give state=(State(...), ...) where the op has it"),
])  # fmt: skip
def test_a_policy_that_fails_is_an_error_that_names_it(policy, error, text):
    model = wan(num_layers=1)
    with pytest.raises(Exception, match=rf"{error.__name__}: .*{re.escape(text.format(file=__file__))}"):
        torch.compile(model, backend="lvsa", options={**EAGER, "policy": policy})(**wan_inputs())


def test_a_table_that_grows_unevenly_with_the_text_is_an_error():
    def plan(self, geometry, facts):
        end = min(geometry.query.prefix**2 + 5, geometry.key.length)
        return Plan(self, geometry, facts, padded((0, geometry.query.whole[1]), [[[[(0, end)]]]]))

    span = VideoSpan(1, 9, 12, 0, free_start=True)
    made = plan_of(answers(plan=plan), Geometry.of(span, span, heads=2), Facts())
    with pytest.raises(PlanError, match=r"it does not grow evenly with the number of tokens before the video. Let every position in it be"):
        made.slopes()


@dataclasses.dataclass
class NotFrozen:
    name = "not_frozen"
    needs_horizon = False
    applies = plan = lambda self, geometry, facts: None


class Half:
    name = "half"

    def applies(self, geometry, facts):
        return None


@dataclasses.dataclass(frozen=True)
class WithList(BlockDiagonal):
    sizes: list = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(("given", "text"), [
    (WithList(), "a policy that cannot be hashed (unhashable type: 'list'). Give it fields that can be, as tuples."),
    (NotFrozen(), "a policy without __hash__. Give it what a policy has. Make it a dataclass(frozen=True)."),
    (Half(), "a policy without needs_horizon, plan. Give it what a policy has."),
    (BlockDiagonal, "this is a class. Give a policy, such as BlockDiagonal()."),
])  # fmt: skip
def test_what_is_nearly_a_policy_is_told_what_it_lacks(given, text):
    with pytest.raises(OptionError, match=re.escape(text)):
        parse_options({"policy": given})


def test_policies_and_lowerings_are_registered_in_a_script():
    registry.register_policy(Counting)
    registry.register_lowering(COUNTING)
    model, inputs = wan(num_layers=1), wan_inputs()
    found = torch.compile(model, backend="lvsa", options={"policy": "counting", "inner": "aot_eager"})(**inputs)[0]
    assert close(found, counted(model, inputs, 1))
    assert registry.stamp_of_registered()
    registry.register_policy(Counting)  # as a cell of a notebook that runs again
    with pytest.raises(ValueError, match=r"lvsa_compile\.policies has a 'lvsa' already"):
        registry.register_policy(LVSA)


def test_a_part_of_the_video_can_be_asked_about():
    """Frames 6 to 8 of 9 as the query of one process."""
    pattern, whole, part = FramePattern(9, 1, 1, 4), VideoSpan(0, 9, 4, 2), VideoSpan(0, 3, 4, 0)
    geometry = Geometry(part, whole, (3, 2, 2), first_frame=6, total_frames=9, heads=1)
    facts = Facts(lvsa_plan(pattern, whole, whole).facts.horizon)
    policy = LVSA(window=1)
    assert policy.applies(geometry, facts) is None
    found, everything = policy.plan(geometry, facts).table, lvsa_plan(pattern, whole, whole).table
    for row, ((own,), (of_all,)) in enumerate(zip(found.key_ranges, everything.key_ranges, strict=True)):
        tokens = [[{t for r in block for t in range(*r)} for block in blocks] for blocks in (own, of_all[6:9])]
        assert tokens[0] == tokens[1], row


def test_policies_and_lowerings_of_other_packages_are_found_by_entry_point(tmp_path, monkeypatch):
    (tmp_path / "outside.py").write_text("from block_policies import COUNTING, BlockDiagonal\n")
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    points = "[lvsa_compile.policies]\nblock_diagonal = outside:BlockDiagonal\nbroken = outside:Nothing\n"
    (info / "entry_points.txt").write_text(points + "[lvsa_compile.lowerings]\ncounting = outside:COUNTING\n")
    stamp = registry.stamp_of_registered()
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    registry.registered.cache_clear()
    try:
        assert parse_options({"policy": "block_diagonal"}).chosen_policy == BlockDiagonal()
        assert parse_options({"policy": {"name": "block_diagonal", "least_frames": 3}}).chosen_policy == BlockDiagonal(3)
        assert "counting" in select.lowering_names()
        (failed,) = registry.registered(registry.POLICIES).failed
        assert (failed.name, failed.where) == ("broken", "outside:Nothing")
        assert "AttributeError" in failed.error
        shown = " ".join(CliRunner().invoke(app, ["doctor"]).output.split())
        assert "policy 'broken' of outside:Nothing is left out, it cannot be imported: AttributeError: " in shown
        assert "block_diagonal" in shown
        assert registry.stamp_of_registered() != stamp == ""
        model, inputs = wan(num_layers=1), wan_inputs()
        found = torch.compile(model, backend="lvsa", options={**EAGER, "policy": "block_diagonal"})(**inputs)[0]
        assert close(found, masked(model, inputs, diagonal(9, 12)))
    finally:
        sys.modules.pop("outside", None)
        registry.registered.cache_clear()


def test_a_lowering_does_not_serve_the_op_of_another_policy():
    model = wan(num_layers=1)
    with pytest.warns(LvsaWarning, match="no registered lowering computes op 'counting' of policy 'counting'. Remedy: Register"):
        torch.compile(model, backend="lvsa", options={**EAGER, "policy": Counting()})(**wan_inputs())
    assert isinstance(model, nn.Module)


def block_of_the_page(number):
    text = (Path(__file__).parent.parent / "docs/adding_a_policy.md").read_text()
    module = types.ModuleType(f"of_the_page_{number}")
    sys.modules[module.__name__] = module
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number], module.__dict__)
    return module


def test_the_policy_of_the_page_works_as_the_page_says():
    """Every other head attends two of the four blocks."""
    policy = block_of_the_page(0).BlockDiagonal()
    model, inputs = randomise(VideoDiT(with_text_before)), dit_inputs()
    found = torch.compile(model, backend="lvsa", options={**EAGER, "policy": policy})(*inputs)
    assert close(found, masked(model, inputs, diagonal(9, 12, prefix=7)))


def test_the_policy_of_the_page_that_learns():
    """Dense at the first step of each video and at dense steps, then half of the keys, by branch."""

    class Half(oracle.MaskedAttention):
        kept: ClassVar = {}

        def __init__(self, branch, dense):
            super().__init__(torch.ones(108, 108, dtype=torch.bool))
            self.branch, self.dense = branch, dense

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                call = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
                query, key = call["query"], call["key"]
                if query.shape[-2] == key.shape[-2] == 108:
                    mass = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).sum((0, 2))
                    best = torch.zeros_like(mass, dtype=torch.bool).scatter(1, mass.topk(54).indices, True)
                    kept = self.kept.setdefault(self.branch, best)
                    self.mask = torch.ones(2, 1, 108, dtype=torch.bool) if self.dense else kept[:, None]
                    return func(query, key, call["value"], self.mask)
            return func(*args, **(kwargs or {}))

    module = block_of_the_page(2)
    model, alone = wan(num_layers=1), wan(num_layers=1)
    options = {"policy": module.Remember(), "inner": "aot_eager", "dense_steps": 2}
    compiled = torch.compile(model, backend="lvsa", options=options)
    for _video in range(2):
        Half.kept = {}
        for step, value in enumerate((900.0, 600.0, 300.0)):
            for branch in range(2):
                inputs = wan_inputs(timestep=value)
                inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"] + branch
                with Half(branch, step < 2):
                    wanted = alone(**inputs)[0]
                assert close(compiled(**inputs)[0], wanted), (step, branch)
