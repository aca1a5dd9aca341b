"""What a user hears and can ask for: one warning per model that stays dense, ``require``, receipts, lowerings that are slow."""

from __future__ import annotations

import logging
import pickle
import warnings

import pytest
import torch
from tiny_models import EXACT, PATTERN, VideoDiT, dit_inputs, randomise, wan, wan_inputs

import lvsa_compile
from lvsa_compile import LvsaWarning
from lvsa_compile.errors import RequireError
from lvsa_compile.lowering import cpu
from lvsa_compile.selection import select

NO_HORIZON = {"inner": "eager"}


def heard(run, calls=2):
    """The warnings of this package that ``calls`` calls give."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(calls):
            run()
    return [str(warning.message) for warning in caught if issubclass(warning.category, LvsaWarning)]


def compiled(model, inputs, options):
    run = torch.compile(model, backend="lvsa", options=options)
    return lambda: run(**inputs) if isinstance(inputs, dict) else run(*inputs)


def test_an_unknown_horizon_is_one_warning_with_its_remedy_whatever_sizes_follow():
    run = torch.compile(randomise(VideoDiT()), backend="lvsa", options=NO_HORIZON)
    said = heard(lambda: [run(*dit_inputs(frames)) for frames in (9, 10, 12)])
    assert said == [
        "lvsa left attention of VideoDiT dense: horizon_unknown: VideoDiT is not in the table of training horizons. Remedy: "
        "Pass options={'reference_frames': N}, N being the latent frames the model was trained on."
    ]


def test_two_models_are_two_warnings():
    first, second = (compiled(randomise(VideoDiT(), seed), dit_inputs(), NO_HORIZON) for seed in (1, 2))
    with torch.no_grad(), pytest.warns(LvsaWarning):
        first()
    assert heard(second) == []  # the same words: nothing new is said


@pytest.mark.parametrize(
    ("frames", "options"),
    [(9, {"reference_frames": 9}), (9, {"reference_frames": 33}), (1, {"reference_frames": 4}), (9, PATTERN)],
    ids=["at the horizon", "below it", "an image", "sparse"],
)
def test_nothing_is_said_where_nothing_is_to_be_done(frames, options):
    assert heard(compiled(randomise(VideoDiT()), dit_inputs(frames), {"inner": "eager", **options})) == []


def test_text_and_images_are_no_reason_to_warn():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50)
    encoder = transformers.T5EncoderModel(config).eval()
    ids = {"input_ids": torch.randint(0, 50, (1, 12))}
    assert heard(compiled(encoder, ids, {**EXACT, "require": "sparse"})) == []
    for block in encoder.encoder.block:
        block.compile(backend="lvsa", options={**EXACT, "require": "sparse"})
    assert heard(lambda: encoder(**ids)) == []


def test_blocks_of_a_model_that_is_not_followed_are_one_warning():
    model = lvsa_compile.undo(wan())
    for block in model.blocks:
        block.compile(backend="lvsa", options=EXACT)
    (said,) = heard(lambda: model(**wan_inputs()))
    assert said.startswith("lvsa left attention of WanTransformerBlock dense: no_grid: ")
    assert "no input of this graph shows a video grid, and WanTransformer3DModel around it gets a video. Remedy: " in said
    assert said.endswith("Use lvsa_compile.compile_repeated_blocks(model), lvsa's own and not diffusers', or compile the model as a whole.")


@pytest.mark.parametrize(
    ("model", "inputs", "given", "meant"),
    [(wan, lambda: wan_inputs(frames=31, rows=2, columns=2), 81, 21), (lambda: randomise(VideoDiT()), lambda: dit_inputs(31), 97, 25)],
    ids=["known model", "unknown model"],
)
def test_a_horizon_in_pixel_frames(model, inputs, given, meant):
    (said,) = heard(compiled(model(), inputs(), {"inner": "eager", "reference_frames": given}))
    assert f"pixel_frames: reference_frames={given}, and the video has 31 latent frames. Remedy: Give latent frames: " in said
    assert said.endswith(f"{given} pixel frames are reference_frames={meant}.")
    torch._dynamo.reset()
    assert heard(compiled(model(), inputs(), {"inner": "eager", "reference_frames": meant})) == []
    assert lvsa_compile.reports()[0].sparse_sites


def clones_out_of_sight(model, tokens, grid, text):
    return model.attention(_cloned(tokens))


@torch.compiler.disable
def _cloned(tokens):
    return tokens.clone()


@torch.compiler.disable
def _attended(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def attends_out_of_sight(model, tokens, grid, text):
    heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
    return _attended(heads, heads, heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("function", [clones_out_of_sight, attends_out_of_sight])
def test_where_mending_a_break_would_change_nothing_nothing_is_said(function):
    """At the horizon and below it, and for images."""
    for frames, words in ((9, 1), (4, 0), (1, 0)):
        torch._dynamo.reset()
        options = {**EXACT, "eager_attention": False}
        run = compiled(randomise(VideoDiT(function)), dit_inputs(frames), {**options, "require": "sparse"} if words == 0 else options)
        assert len(heard(run, calls=3)) == words, frames


def test_hooks_that_break_the_graph_around_attention_that_is_sparse_all_the_same():
    model = randomise(VideoDiT())
    model.attention.out.register_forward_hook(lambda module, inputs, output: print(end=""))
    assert heard(compiled(model, dit_inputs(), {**EXACT, "require": "sparse"}), calls=3) == []
    report = lvsa_compile.reports()[0]
    assert [site.decision for site in report.sites] == ["sparse"]
    assert [site.calls for site in report.receipt().sites] == [3]


def test_attention_between_graphs_is_in_the_receipt_and_not_counted():
    heard(compiled(randomise(VideoDiT(attends_out_of_sight)), dit_inputs(), {**EXACT, "eager_attention": False}))
    receipt = lvsa_compile.reports()[0].receipt()
    assert str(receipt).splitlines()[0] == "between graphs: dense, runs eagerly and is not counted"


# --- require ----------------------------------------------------------------------------------------------------------------------


def test_require_raises_from_the_second_forward_on_with_the_report():
    run = compiled(randomise(VideoDiT()), dit_inputs(), {**NO_HORIZON, "require": "sparse"})
    heard(run, calls=1)
    with pytest.raises(RequireError) as error, torch.no_grad():
        run()
    assert str(error.value).startswith(
        "require='sparse': attention over the video is dense. lvsa left attention of VideoDiT dense: horizon_"
    )
    assert str(lvsa_compile.reports()[0]) in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_require_in_blocks_waits_for_the_second_forward():
    model = wan()
    for block in model.blocks:
        block.compile(backend="lvsa", options={**EXACT, "require": "sparse"})
    heard(lambda: model(**wan_inputs()), calls=3)


def test_require_in_blocks_of_a_model_that_is_not_followed():
    model = lvsa_compile.undo(wan())
    for block in model.blocks:
        block.compile(backend="lvsa", options={**EXACT, "require": "sparse"})
    heard(lambda: model(**wan_inputs()), calls=1)
    with pytest.raises(RequireError, match="no_grid"), torch.no_grad():
        model(**wan_inputs())


@pytest.mark.parametrize(
    ("frames", "options"),
    [(9, {"reference_frames": 9}), (9, PATTERN), (9, {**PATTERN, "dense_layers": [0]}), (1, PATTERN)],
    ids=["full pattern", "sparse", "left out", "one frame"],
)
def test_require_raises_for_nothing_that_is_meant(frames, options):
    heard(compiled(randomise(VideoDiT()), dit_inputs(frames), {"inner": "eager", "require": "sparse", **options}), calls=3)


def test_require_takes_one_word():
    with pytest.raises(lvsa_compile.OptionError, match=r"option require='dense': not a known choice\. Choose one of: sparse\."):
        lvsa_compile.make_options(require="dense")


# --- receipts ---------------------------------------------------------------------------------------------------------------------


def test_a_receipt_counts_what_ran():
    run = torch.compile(wan(), backend="lvsa", options={**EXACT, "dense_steps": 2})
    with torch.no_grad():
        for value in (900.0, 900.0, 800.0, 700.0, 600.0):
            run(**wan_inputs(timestep=value))
    report = lvsa_compile.reports()[0]
    assert str(report.receipt(clear=True)).splitlines() == [
        "blocks.0-1.attn1 (2 sites): cpu, 5 calls, 3 of them at dense steps",
        "blocks.0-1.attn2 (2 sites): dense, 5 calls",
        "denoising step: 5 calls, timesteps from 600 to 900, 3 moves, 1 videos begun",
    ]
    assert {site.calls for site in report.receipt().sites} == {0}
    with torch.no_grad():
        run(**wan_inputs(timestep=500.0))
    assert {site.calls for site in report.receipt().sites} == {1}
    assert {site.dense_step_calls for site in report.receipt().sites} == {0}


def test_what_only_explains_has_no_receipt():
    assert str(lvsa_compile.explain(wan(), **wan_inputs(), options=PATTERN).receipt()) == "no attention site ran"


def test_dense_graphs_are_counted_too():
    run = compiled(randomise(VideoDiT()), dit_inputs(), {"inner": "eager", "reference_frames": 9})
    heard(run, calls=3)
    (site,) = lvsa_compile.reports()[0].receipt().sites
    assert (site.lowering, site.calls, site.fallbacks) == ("dense", 3, 0)


def test_where_no_compiler_is_the_fallback_is_said_and_counted(monkeypatch, caplog):
    monkeypatch.setattr(cpu, "_why_not_built", lambda: cpu.Failure("its kernel could not be compiled (no compiler)"))
    inputs = dit_inputs(25, 8, 8)
    with caplog.at_level(logging.WARNING, logger="lvsa_compile"):
        said = heard(compiled(randomise(VideoDiT()), inputs, EXACT))
    report = lvsa_compile.reports()[0]
    (site,) = report.sparse_sites
    assert (site.lowering, site.fell_back) == ("dense_merge", True)
    assert [(found.calls, found.fallbacks) for found in report.receipt().sites] == [(2, 2)]
    assert "2 in place of a faster lowering that failed" in str(report.receipt())
    assert bool(said) == (site.expected < 1.0)


def test_a_lowering_slower_than_dense_says_what_was_passed_over(monkeypatch):
    lowerings = [found for found in select.lowerings() if found.name == "reference"]
    failed = next(found for found in select.lowerings() if found.name == "cpu")
    monkeypatch.setattr(select, "lowerings", lambda: [failed, *lowerings])
    monkeypatch.setattr(cpu, "_why_not_built", lambda: cpu.Failure("its kernel could not be compiled (no compiler)"))
    (said,) = heard(compiled(randomise(VideoDiT()), dit_inputs(), EXACT))
    assert "since cpu: its kernel could not be compiled (no compiler)" in said
    assert "lowering reference (" in str(lvsa_compile.reports()[0])
    assert "since cpu: its kernel could not be compiled (no compiler)" in str(lvsa_compile.reports()[0])


# --- the recompile limit ------------------------------------------------------------------------------------------------------------


def test_at_the_recompile_limit_what_changed_is_said():
    """Hooks that are put on and off, as step caches and adapters do: no sizes are to blame."""
    model, inputs = randomise(VideoDiT()), dit_inputs()
    run, said = torch.compile(model, backend="lvsa", options=EXACT), []
    for number in range(8):
        hook = model.attention.register_forward_hook(lambda module, args, output, number=number: output * (1 + number / 100))
        said += heard(lambda: run(*inputs), calls=1)
        hook.remove()
    (text,) = [text for text in said if "recompile_limit" in text]
    assert "lvsa compiled VideoDiT for the 8th time, the last that torch._dynamo.config.recompile_limit = 8 allows" in text
    assert "size" not in text.partition("what changed last: ")[2].partition(". What differs")[0]
    assert text.partition("what changed last: ")[2][:7] != "unknown"
