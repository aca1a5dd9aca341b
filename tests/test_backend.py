"""The backend as a user meets it, on the real Wan transformer and on hand-written models."""

from __future__ import annotations

import copy
import logging
import warnings

import oracle
import pytest
import torch
from tiny_models import EXACT, PATTERN, VideoDiT, dit_inputs, randomise, timesteps, wan, wan_inputs

import lvsa_compile
from lvsa_compile.errors import LvsaWarning


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def expected(model, inputs: dict, step: int, frames: int = 9, rows: int = 3, columns: int = 4) -> torch.Tensor:
    """The eager model with explicit masks on video self-attention."""
    mask = oracle.token_mask(frames, rows * columns, step, reference=4, window=1)
    with oracle.MaskedAttention(mask) as masked:
        output = model(**inputs)[0]
    assert masked.calls
    return output


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def test_fifty_steps_with_guidance_then_a_second_video_are_one_graph_and_right_at_every_step():
    model = wan()
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    inputs = wan_inputs()
    answers = [expected(model, inputs, phase) for phase in range(20)]
    assert not close(answers[0], answers[1]), "the test could not tell one phase from another"
    for _video in range(2):
        for step, timestep in enumerate(timesteps(50)):
            inputs["timestep"] = torch.full((1,), timestep)
            for _guidance in range(2):
                output = compiled(**inputs)[0]
            if step < 6 or step > 47:
                assert close(output, expected(model, inputs, step)), f"step {step}"
    assert graphs() == 1


def test_two_models_of_one_class_interleaved_keep_their_own_steps():
    models = [wan(seed) for seed in (0, 1)]
    compiled = [torch.compile(model, backend="lvsa", options=EXACT) for model in models]
    for model_steps in ((0, 0), (1, 0), (2, 1), (3, 1)):
        for model, run, step in zip(models, compiled, model_steps, strict=True):
            inputs = wan_inputs(timestep=timesteps(8)[step])
            assert close(run(**inputs)[0], expected(model, inputs, step))
    assert graphs() == 1


@pytest.mark.slow
def test_twelve_lengths_are_each_right_or_warned_of():
    model = wan(num_layers=1)
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for frames in range(6, 18):
            lvsa_compile.reset()
            inputs = wan_inputs(frames)
            output, warned = compiled(**inputs)[0], [str(w.message) for w in caught if issubclass(w.category, LvsaWarning)]
            assert close(output, expected(model, inputs, 0, frames)) or warned, frames
    assert any("recompile_limit = 8" in text and "Raise the limit" in text for text in warned)
    assert len(warned) == 1


@pytest.mark.parametrize("model_inputs", [(4,), (3,), (1,)])
@pytest.mark.inductor
def test_at_the_horizon_the_output_is_bit_identical_to_inductor(model_inputs):
    model, inputs = wan(num_layers=1), wan_inputs(*model_inputs)
    stock = torch.compile(model, backend="inductor")(**inputs)[0]
    torch._dynamo.reset()
    ours = torch.compile(model, backend="lvsa", options=PATTERN)(**inputs)[0]
    assert torch.equal(ours, stock)
    assert {site.reason for report in lvsa_compile.reports() for site in report.sites} <= {
        "pattern_full",
        "single_frame",
        "cross_attention",
    }


@pytest.mark.inductor
def test_through_inductor_in_place_with_module_compile():
    model, inputs = wan(), wan_inputs()
    answers = [expected(model, dict(inputs, timestep=torch.full((1,), timesteps(8)[step])), step) for step in range(3)]
    model.compile(backend="lvsa", options=PATTERN)
    for step in range(3):
        assert close(model(**dict(inputs, timestep=torch.full((1,), timesteps(8)[step])))[0], answers[step], 5e-4)
    assert graphs() == 1


def test_as_torchs_default_backend():
    if not hasattr(torch.compiler, "set_default_backend"):
        pytest.skip("this torch has no default backend")
    torch.compiler.set_default_backend("lvsa")
    try:
        model, inputs = wan(), wan_inputs()
        assert close(torch.compile(model, options=EXACT)(**inputs)[0], expected(model, inputs, 0))
    finally:
        torch.compiler.set_default_backend(None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_batch(dtype):
    model, inputs = wan().to(dtype), wan_inputs(batch=2)
    inputs = {k: v.to(dtype) if isinstance(v, torch.Tensor) and k != "timestep" else v for k, v in inputs.items()}
    output = torch.compile(model, backend="lvsa", options=EXACT)(**inputs)[0]
    assert output.dtype == dtype
    assert close(output.float(), expected(model, inputs, 0).float(), 0.05)


def test_autocast_regions_keep_their_dtypes():
    model, inputs = randomise(VideoDiT()), dit_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = torch.compile(model, backend="lvsa", options=EXACT)(*inputs)
        mask = oracle.token_mask(9, 12, 0, reference=4, window=1)
        with oracle.MaskedAttention(mask):
            answer = model(*inputs)
    assert output.dtype == answer.dtype
    assert close(output.float(), answer.float(), 0.05)


def test_the_scale_of_the_site_is_kept():
    model, inputs = randomise(VideoDiT(lambda m, x, grid, text: x + m.attention(x, scale=0.7))), dit_inputs()
    with oracle.MaskedAttention(oracle.token_mask(9, 12, 0, reference=4, window=1)):
        answer = model(*inputs)
    assert close(torch.compile(model, backend="lvsa", options=EXACT)(*inputs), answer)


def test_explicit_step_beats_the_timestep():
    model, inputs = wan(), wan_inputs()
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    for step in (0, 2, 5):
        with lvsa_compile.step(step):
            assert close(compiled(**inputs)[0], expected(model, inputs, step))
    assert graphs() == 1


def test_rotate_false_keeps_the_grid_of_step_0():
    model, inputs = wan(), wan_inputs()
    compiled = torch.compile(model, backend="lvsa", options={**EXACT, "rotate": False})
    for timestep in timesteps(3):
        inputs["timestep"] = torch.full((1,), timestep)
        assert close(compiled(**inputs)[0], expected(model, inputs, 0))


def test_a_timestep_passed_by_position_under_another_name_is_found():
    class Renamed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = randomise(VideoDiT())

        def forward(self, x, how_noisy, words):
            return self.inner(x, how_noisy, words)

    model, inputs = Renamed(), dit_inputs()
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    for step, timestep in enumerate(timesteps(4)):
        arguments = (inputs[0], torch.tensor([timestep]), inputs[2])
        with oracle.MaskedAttention(oracle.token_mask(9, 12, step, reference=4, window=1)):
            answer = model(*arguments)
        assert close(compiled(*arguments), answer)
    assert "how_noisy" in str(lvsa_compile.reports()[0])


def test_without_a_timestep_the_user_is_told_once():
    class NoTime(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = randomise(VideoDiT())

        def forward(self, latents, text):
            return self.inner(latents, torch.ones(1), text)

    latents, _, text = dit_inputs()
    with pytest.warns(LvsaWarning, match=r"found no timestep .* lvsa_compile\.step\(i\)"):
        torch.compile(NoTime(), backend="lvsa", options=EXACT)(latents, text)


def test_gradients_leave_attention_dense_with_a_warning():
    model, inputs = wan(), wan_inputs()
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    with torch.enable_grad():
        with pytest.warns(LvsaWarning, match=r"Run the model under torch\.no_grad\(\)"):
            output = compiled(**inputs)[0]
        output.sum().backward()
    assert all(p.grad is not None for p in model.blocks[0].attn1.parameters())
    assert close(output.detach(), model(**inputs)[0])
    assert {site.reason for site in lvsa_compile.reports()[0].sites} == {"training"}


def test_the_horizon_comes_from_the_table_by_class_and_config():
    for channels, horizon in ((4, 21), (48, 31)):
        model = wan(in_channels=channels, out_channels=channels, num_layers=1)
        for frames, reason in ((horizon, {"pattern_full", "cross_attention"}), (horizon + 12, {"", "cross_attention"})):
            torch._dynamo.reset()
            torch.compile(model, backend="lvsa", options={"inner": "eager"})(**wan_inputs(frames, 2, 2, channels=channels))
            (report,) = lvsa_compile.reports()
            assert {site.reason for site in report.sites} == reason, (channels, frames)
            assert report.horizon.startswith(f"{horizon} latent frames (table: WanTransformer3DModel")


def test_a_wrapped_model_is_found_in_the_table_too():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = wan(in_channels=48, out_channels=48, num_layers=1)

        def forward(self, **inputs):
            return self.transformer(**inputs)

    torch.compile(Wrapper(), backend="lvsa", options={"inner": "eager"})(**wan_inputs(45, 2, 2, channels=48))
    (report,) = lvsa_compile.reports()
    assert report.horizon.startswith("31 latent frames")
    assert report.sparse_sites[0].name == "transformer.blocks.0.attn1"


def test_unknown_horizon_is_dense_and_the_remedy_works():
    model, inputs = randomise(VideoDiT()), dit_inputs()
    assert torch.equal(torch.compile(model, backend="lvsa", options={"inner": "eager"})(*inputs), model(*inputs))
    site = lvsa_compile.reports()[0].sites[0]
    assert str(site) == (
        "attention: dense, horizon_unknown: VideoDiT is not in the table of training horizons  [video 9×3×4]  "
        "Remedy: Pass options={'reference_frames': N}, N being the latent frames the model was trained on."
    )
    torch._dynamo.reset()
    torch.compile(model, backend="lvsa", options={"inner": "eager", "reference_frames": 4})(*inputs)
    assert lvsa_compile.reports()[0].sites[0].decision == "sparse"


def test_report_and_log_line_and_counters(caplog):
    with caplog.at_level(logging.INFO, logger="lvsa_compile"):
        compiled = torch.compile(wan(), backend="lvsa", options=EXACT)  # a report tells what the clock says as long as the model lives
        compiled(**wan_inputs())
    line = "lvsa WanTransformer3DModel [0/0]: 2 of 4 attention sites sparse; dense: 2 cross_attention"
    assert line in caplog.text
    cross = "query video 9×3×4, key encoder_hidden_states 7  [video 9×3×4 -> encoder_hidden_states 7]"
    assert str(lvsa_compile.reports()[0]).splitlines() == [
        line,
        "  work: attention over the video computes 54% of what dense attention would (2.43 MFLOP of 4.48 MFLOP per forward)",
        f"  forward: {lvsa_compile.reports()[0].gain}",
        "  video: 9 latent frames, 2.2× the training horizon, so its attention is sparse",
        "  horizon: 4 latent frames (option reference_frames)",
        "  denoising step: value of input 'timestep'; 1 calls, timesteps from 900 to 900, 0 moves, 1 videos begun",
        "  blocks.0-1.attn1 (2 sites): sparse, density 0.543, lowering cpu  [video 9×3×4]",
        f"  blocks.0-1.attn2 (2 sites): dense, cross_attention: {cross}",
    ]
    assert dict(torch._dynamo.utils.counters["lvsa"]) == {"sites": 4, "sparse": 2, "dense.cross_attention": 2}
    torch._dynamo.reset()
    assert lvsa_compile.reports() == []


@pytest.mark.parametrize("inner", ["inductor", "eager"])
@pytest.mark.inductor
def test_a_graph_without_inputs(inner):
    compiled = torch.compile(lambda: torch.ones(3) * 2, backend="lvsa", options={"inner": inner})
    assert torch.equal(compiled(), torch.full((3,), 2.0))


def test_graphs_are_dumped_before_and_after_each_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("LVSA_DUMP_DIR", str(tmp_path))
    torch.compile(wan(num_layers=1), backend="lvsa", options=EXACT)(**wan_inputs())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "0.0.0-before.txt"
    assert "0.0.11-rewrite.txt" in names
    assert "torch.ops.lvsa.attention.default" in (tmp_path / "0.0.11-rewrite.txt").read_text()
    assert "torch.ops.lvsa.attention_cpu.default" in (tmp_path / "0.0.12-lower.txt").read_text()
    assert "blocks.0.attn1: sparse by cpu" in (tmp_path / "0.0.12-lower.txt").read_text()


def test_when_slower_dense_opts_out_of_sites_that_gain_nothing():
    torch.compile(wan(), backend="lvsa", options={**EXACT, "when_slower": "dense"})(**wan_inputs())
    assert {site.reason for site in lvsa_compile.reports()[0].sites} == {"not_faster", "cross_attention"}


def test_the_reference_lowering_can_be_asked_for():
    model, inputs = wan(), wan_inputs()
    output = torch.compile(model, backend="lvsa", options={**EXACT, "lowering": "reference"})(**inputs)[0]
    assert close(output, expected(model, inputs, 0))
    assert lvsa_compile.reports()[0].sites[0].lowering == "reference"


def test_the_graph_of_the_user_and_the_model_are_left_as_they_were():
    model = wan()
    before = copy.deepcopy(model.state_dict())
    torch.compile(model, backend="lvsa", options=EXACT)(**wan_inputs())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(model).forward is type(wan()).forward


def test_dynamic_sizes_are_specialised_and_reported():
    model = wan(num_layers=1)
    compiled = torch.compile(model, backend="lvsa", options=EXACT, dynamic=True)
    for frames in (9, 11):
        lvsa_compile.reset()
        inputs = wan_inputs(frames)
        assert close(compiled(**inputs)[0], expected(model, inputs, 0, frames))
    assert any("frames" in text for report in lvsa_compile.reports() for graph in report.graphs for text in graph.specialised)
