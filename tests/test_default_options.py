"""Options for programs that take a backend by its name alone: ``LVSA_OPTIONS`` and ``set_default_options``."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from tiny_models import VideoDiT, dit_inputs, randomise

import lvsa_compile
from lvsa_compile import LvsaError
from lvsa_compile.options import Options, parse_options


@pytest.fixture
def defaults(monkeypatch):
    monkeypatch.delenv("LVSA_OPTIONS", raising=False)
    yield monkeypatch
    lvsa_compile.set_default_options()


def test_defaults_are_merged_key_by_key_and_calls_come_first(defaults):
    defaults.setenv("LVSA_OPTIONS", '{"reference_frames": 21, "window": 2, "dense_layers": [1], "mode": "max-autotune"}')
    lvsa_compile.set_default_options(window=1, first_frames=2)
    options = parse_options({"first_frames": 0, "max_autotune": True})
    assert (options.reference_frames, options.window, options.first_frames, options.dense_layers) == (21, 1, 0, (1,))
    assert options.mode == "max-autotune"
    assert parse_options({}, mode="default").mode == "default"
    assert parse_options({"reference_frames": None}).reference_frames is None
    variable, function = "environment variable LVSA_OPTIONS", "lvsa_compile.set_default_options"
    assert dict(options.sources) == dict(reference_frames=variable, dense_layers=variable, mode=variable, window=function)
    lvsa_compile.set_default_options(expand_window=False)
    assert parse_options({}).window == 2, "each call replaces the one before"


def test_a_backend_by_name_alone_gets_the_defaults_and_the_report_says_so(defaults):
    defaults.setenv("LVSA_OPTIONS", '{"reference_frames": 4}')
    lvsa_compile.set_default_options(window=1, inner="eager")
    model, inputs = randomise(VideoDiT()), dit_inputs()
    with torch.no_grad():
        torch.compile(model, backend="lvsa")(*inputs)
    (report,) = lvsa_compile.reports()
    assert report.sites[0].decision == "sparse"
    assert "  option: reference_frames=4, from environment variable LVSA_OPTIONS" in str(report)
    assert "  option: window=1, from lvsa_compile.set_default_options" in str(report)
    assert report.to_dict()["option_sources"]["window"] == "lvsa_compile.set_default_options"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"environment variable LVSA_OPTIONS='\{': it is no JSON .* Give a JSON object of options, such as LVSA_OPTIONS='\{\"ref"),
        ("[1]", "it is JSON, and a list"),
        ('{"window": -1}', "option window=-1 of environment variable LVSA_OPTIONS: not a whole number of at least 0"),
        (
            '{"windw": 1}',
            "option windw=1 of environment variable LVSA_OPTIONS: neither lvsa nor Inductor has this option. Did you mean 'window'",
        ),
        ('{"max_autotune": 3}', "option max_autotune=3 of environment variable LVSA_OPTIONS: Inductor wants bool"),
    ],
)
def test_a_bad_variable_is_an_error_that_names_it(text, said, defaults):
    defaults.setenv("LVSA_OPTIONS", text)
    with pytest.raises(LvsaError, match=said) as caught:
        parse_options({})
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="LVSA_OPTIONS"):
        torch.compile(randomise(VideoDiT()), backend="lvsa")(*dit_inputs())


def test_a_bad_default_changes_nothing(defaults):
    lvsa_compile.set_default_options(window=2)
    with pytest.raises(LvsaError, match=r"option window='two': not a whole number"):
        lvsa_compile.set_default_options(window="two")
    assert parse_options({}).window == 2


def test_an_empty_variable_is_none(defaults):
    defaults.setenv("LVSA_OPTIONS", " ")
    assert parse_options({}) == Options()


@pytest.mark.process
def test_spawned_processes_get_the_variable_and_not_the_function(defaults):
    defaults.setenv("LVSA_OPTIONS", '{"window": 2}')
    lvsa_compile.set_default_options(first_frames=3)
    code = "from lvsa_compile.options import parse_options as p; o = p({}); print(o.window, o.first_frames)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["2", "1"]


def test_a_call_that_clashes_with_a_default_is_told_where_the_default_is_from(defaults):
    defaults.setenv("LVSA_OPTIONS", '{"inner": "eager"}')
    with pytest.raises(LvsaError, match=r"inner='eager' does not use Inductor \(inner comes from environment variable LVSA_OPTIONS\)"):
        parse_options({}, mode="max-autotune")


def test_a_key_of_inductor_is_one_key_however_it_is_spelt(defaults):
    lvsa_compile.set_default_options(**{"max-autotune": True})
    assert dict(parse_options({"max_autotune": False}).inductor) == {"max_autotune": False}
