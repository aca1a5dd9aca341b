from __future__ import annotations

import pickle

import pytest
import torch
from tiny_models import VideoDiT, dit_inputs, randomise

import lvsa_compile
from lvsa_compile.errors import OptionError, UnknownOptionError
from lvsa_compile.options import Options, option_fields, parse_options


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (dict(windwo=3), "option windwo=3: neither lvsa nor Inductor has this option. Did you mean 'window'?"),
        (
            {"triton.cudagraph": True},
            "option triton.cudagraph=True: neither lvsa nor Inductor has this option. Did you mean 'triton.cudagraphs'?",
        ),
        (dict(window=-1), "option window=-1: not a whole number of at least 0. All lengths are in latent frames; give 0 or more."),
        (dict(window=True), "option window=True: not a whole number of at least 0. All lengths are in latent frames; give 0 or more."),
        (
            dict(reference_frames=0),
            "option reference_frames=0: not a whole number of at least 1. All lengths are in latent frames; give 1 or more.",
        ),
        (dict(sparsity_scale=0.0), "option sparsity_scale=0.0: not a positive number. Use 1.0 for the published budget."),
        (dict(rotate=1), "option rotate=1: not a known choice. Choose one of: 'step', 'layer', 'both', True (which is 'step'), False."),
        (
            dict(lowering="tritn"),
            "option lowering='tritn': not a known choice. Choose one of: auto, cpu, cpu_blocks, cpu_dynamic, dense_merge, triton, "
            "triton_blocks, triton_dynamic, flashinfer, flex, ascend_block_sparse, ascend_paged, ascend_gather, reference_blocks, "
            "reference_dynamic, reference.",
        ),
        (
            dict(inner="tvm"),
            "option inner='tvm': not a known choice. Choose one of: auto, inductor, torchair, npugraph_ex, aot_eager, eager; "
            "or give a Dynamo backend as a function.",
        ),
        (dict(when_slower="maybe"), "option when_slower='maybe': not a known choice. Choose one of: sparse, dense."),
        (dict(max_autotune=1), "option max_autotune=1: Inductor wants bool, not int. Give a value of that type."),
        (
            dict(inner="eager", mode="max-autotune"),
            "option mode='max-autotune': this is Inductor's, and inner='eager' does not use Inductor. Drop it, or use inner='inductor'.",
        ),
        (
            dict(reference_frames=4, window=0, first_frames=0, key_frame_interval=0),
            "option key_frame_interval=0: with window=0 and first_frames=0 no frame would attend anything. "
            "Raise window or first_frames, or leave key_frame_interval at None.",
        ),
    ],
)
def test_bad_options_are_named_with_value_and_remedy(given, text):
    with pytest.raises(OptionError) as raised:
        lvsa_compile.make_options(**given)
    assert str(raised.value) == text


def test_make_options_returns_what_it_was_given():
    given = {"window": 2, "reference_frames": 21, "max_autotune": True, "triton.cudagraphs": False}
    assert lvsa_compile.make_options(**given) == given


def test_inductors_own_options_pass_through_and_mode_is_read_from_both_places():
    parsed = parse_options({"max-autotune": True, "window": 2})
    assert parsed.inductor == (("max_autotune", True),)
    assert parse_options({"mode": "max-autotune"}).mode == parse_options({}, mode="max-autotune").mode == "max-autotune"


def test_defaults_are_the_published_ones():
    options = Options()
    assert (options.window, options.first_frames, options.sparsity_scale, options.key_frame_interval) == (3, 1, 1.0, None)
    assert options.expand_window
    assert options.rotate


def test_every_option_has_a_meaning():
    assert all(len(field.metadata["meaning"]) > 20 for field in option_fields())


def test_an_error_at_the_first_forward_names_option_value_and_remedy():
    model = torch.compile(randomise(VideoDiT()), backend="lvsa", options={"windwo": 3})
    with pytest.raises(Exception, match=r"option windwo=3: .* Did you mean 'window'\?"), torch.no_grad():
        model(*dit_inputs())


@pytest.mark.parametrize("error", [OptionError("window", -1, "bad", "Do this."), UnknownOptionError("windwo", 3, ["window"])])
def test_errors_survive_a_process_boundary(error):
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_cuda_graphs_are_known_by_option_mode_or_configuration():
    import torch._inductor.config as config

    assert not parse_options({}).uses_cuda_graphs
    assert parse_options({"mode": "reduce-overhead"}).uses_cuda_graphs
    assert not parse_options({"mode": "max-autotune", "triton.cudagraphs": False}).uses_cuda_graphs
    with config.patch({"triton.cudagraphs": True}):
        assert parse_options({}).uses_cuda_graphs
        assert not parse_options({"inner": "eager"}).uses_cuda_graphs
