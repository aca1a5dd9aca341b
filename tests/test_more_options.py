"""Options that choose steps, layers and sites, and verification."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from plans import attention_call
from test_backend import close, expected, graphs
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise, timesteps, wan, wan_inputs

import lvsa_compile
from lvsa_compile.errors import OptionError
from lvsa_compile.ops import verified as verification


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_dense_steps_come_first_and_do_not_recompile():
    model, inputs = wan(), wan_inputs()
    compiled = torch.compile(model, backend="lvsa", options={**EXACT, "dense_steps": 2})
    dense = model(**inputs)[0]
    for _video in range(2):
        for step, timestep in enumerate(timesteps(6)):
            inputs["timestep"] = torch.tensor([timestep])
            answer = model(**inputs)[0] if step < 2 else expected(model, inputs, step)
            assert close(compiled(**inputs)[0], answer), step
    assert graphs() == 1
    with lvsa_compile.step(0):
        assert close(compiled(**inputs)[0], model(**inputs)[0])
    with lvsa_compile.step(2):
        assert close(compiled(**inputs)[0], expected(model, inputs, 2))
    assert not close(dense, expected(model, wan_inputs(), 0))


def test_dense_steps_without_rotation():
    model, inputs = wan(), wan_inputs()
    compiled = torch.compile(model, backend="lvsa", options={**EXACT, "dense_steps": 1, "rotate": False})
    for step, timestep in enumerate(timesteps(3)):
        inputs["timestep"] = torch.tensor([timestep])
        assert close(compiled(**inputs)[0], model(**inputs)[0] if step < 1 else expected(model, inputs, 0))


@pytest.mark.parametrize(("options", "decisions", "reason"), [
    ({"dense_layers": [1]}, ["sparse", "dense", "sparse"], "dense_layer"),
    ({"dense_layers": (0, 2)}, ["dense", "sparse", "dense"], "dense_layer"),
    ({"max_sites": 1}, ["sparse", "dense", "dense"], "max_sites"),
    ({"max_sites": 0}, ["dense", "dense", "dense"], "max_sites"),
])  # fmt: skip
def test_layers_and_sites_can_be_left_out(options, decisions, reason):
    torch.compile(wan(num_layers=3), backend="lvsa", options={**EXACT, **options})(**wan_inputs())
    sites = [site for site in lvsa_compile.reports()[0].sites if site.reason != "cross_attention"]
    assert [site.decision for site in sites] == decisions
    assert {site.reason for site in sites if site.decision == "dense"} == {reason}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_reports_the_worst_error_of_each_site(dtype):
    model = wan(num_layers=1).to(dtype)
    inputs = {k: v.to(dtype) if isinstance(v, torch.Tensor) and k != "timestep" else v for k, v in wan_inputs().items()}
    compiled = torch.compile(model, backend="lvsa", options={**EXACT, "verify": True})
    plain = torch.compile(model, backend="lvsa", options=EXACT)
    assert torch.equal(compiled(**inputs)[0], plain(**inputs)[0])
    (site,) = lvsa_compile.reports()[0].sparse_sites
    assert 0 <= site.worst_error <= verification.TOLERANCE[dtype]
    assert f"worst error {site.worst_error:.1e}" in str(lvsa_compile.reports()[0])
    assert lvsa_compile.reports()[1].sparse_sites[0].worst_error is None


def test_verify_sees_a_wrong_lowering(monkeypatch):
    from lvsa_compile.lowering import dense_merge

    right = dense_merge.merge_into
    monkeypatch.setattr(dense_merge, "merge_into", lambda output, lse, part, part_lse: right(output, lse, part, part_lse + 1))
    torch.compile(randomise(VideoDiT()), backend="lvsa", options={**EXACT, "verify": True, "lowering": "dense_merge"})(*dit_inputs())
    (site,) = lvsa_compile.reports()[0].sparse_sites
    assert site.worst_error > 100 * verification.TOLERANCE[torch.float32]
    assert "ABOVE the tolerance" in str(site)


@pytest.mark.parametrize(("given", "text"), [
    ({"verify": True, "mode": "reduce-overhead"},
     "option verify=True: CUDA graphs replay without running the comparison. Drop mode and triton.cudagraphs while verifying."),
    ({"verify": True, "triton.cudagraphs": True},
     "option verify=True: CUDA graphs replay without running the comparison. Drop mode and triton.cudagraphs while verifying."),
    ({"dense_layers": 3},
     "option dense_layers=3: not a list of whole numbers from 0. Give the indices of video attention sites, such as [0, 1]."),
    ({"dense_steps": -1}, "option dense_steps=-1: not a whole number of at least 0. Give 0 or more."),
    ({"max_sites": 1.5}, "option max_sites=1.5: not a whole number of at least 0. Give 0 or more."),
])  # fmt: skip
def test_bad_values(given, text):
    with pytest.raises(OptionError) as raised:
        lvsa_compile.make_options(**given)
    assert str(raised.value) == text


def test_dense_layers_of_a_block_that_serves_many_layers_is_an_error():
    model = wan()
    model.compile_repeated_blocks(backend="lvsa", options={**EXACT, "dense_layers": [0]})
    with pytest.raises(
        Exception, match=r"option dense_layers=\[0\]: what is compiled is a block, which serves many layers. Compile the whole"
    ):
        model(**wan_inputs())
    again = lvsa_compile.compile_repeated_blocks(wan(), options={**EXACT, "dense_layers": [0]})
    with pytest.raises(Exception, match=r"option dense_layers=\[0\]"):
        again(**wan_inputs())


def test_blocks_of_a_model_that_is_not_followed_are_dense_and_say_what_to_do():
    model, inputs = lvsa_compile.undo(wan()), wan_inputs()
    answer = model(**inputs)[0]
    model.compile_repeated_blocks(backend="lvsa", options={**EXACT, "inner": "eager"})
    assert torch.equal(model(**inputs)[0], answer)
    site = lvsa_compile.reports()[0].sites[0]
    assert site.reason == "no_grid"
    assert "lvsa_compile.compile_repeated_blocks(model)" in site.remedy


def test_a_lowering_asked_for_by_name_that_cannot_serve_is_an_error():
    from lvsa_compile.errors import LoweringUnavailableError
    from lvsa_compile.policies.tables import VideoSpan
    from lvsa_compile.selection.select import select

    span = VideoSpan(0, 30, 12, 0)
    call = attention_call(torch.device("cuda"), torch.bfloat16, 1, 2, 2, 64, 64, span, span, lvsa_compile.FramePattern(30))
    assert select(call).lowering.name == "reference"
    assert dict(select(call).passed_over) == {
        "cpu": "it runs on the CPU, not on cuda",
        "triton": "no device of this kind is here",
        "dense_merge": "no device of this kind is here",
        "flashinfer": dict(select(call).passed_over)["flashinfer"],  # by whether it is installed
        "flex": "no device of this kind is here",
        **{f"ascend_{name}": "it runs on npu, not on cuda" for name in ("block_sparse", "paged", "gather")},
    }
    with pytest.raises(LoweringUnavailableError) as raised:
        select(call, "cpu")
    assert str(raised.value) == (
        "lowering 'cpu' cannot be used here: cpu: it runs on the CPU, not on cuda. Use lowering='auto' to let lvsa-compile choose."
    )

    class WiderValues(VideoDiT):
        """The dense kernel wants values as wide as keys; ours does not."""

        def __init__(self):
            super().__init__(self.wide)

        def wide(self, model, tokens, grid, text):
            heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
            wide = torch.cat([heads, heads], -1)
            return torch.nn.functional.scaled_dot_product_attention(heads, heads, wide).transpose(1, 2).flatten(2)[..., :16]

    model = randomise(WiderValues())
    torch.compile(model, backend="lvsa", options=EXACT)(*dit_inputs())
    assert lvsa_compile.reports()[0].sparse_sites[0].lowering == "cpu"
    with pytest.raises(Exception, match="lowering 'dense_merge' cannot be used here: dense_merge: the dense kernel wants equal head dims"):
        torch.compile(model, backend="lvsa", options={**EXACT, "lowering": "dense_merge"})(*dit_inputs())


@pytest.mark.parametrize("name", ["trace_layout", "find_horizon", "rewrite", "lower"])
def test_a_pass_that_is_switched_off_leaves_sites_dense_and_says_so(name):
    model, inputs = randomise(VideoDiT()), dit_inputs()
    options = {**EXACT, "inner": "eager", "disable_passes": [name]}
    with torch.no_grad():
        plain = model(*inputs)
        assert torch.equal(torch.compile(model, backend="lvsa", options=options)(*inputs), plain)
    (report,) = lvsa_compile.reports()
    assert {site.reason for site in report.sites} == {"pass_disabled"}
    assert report.sites[0].detail == f"disable_passes=['{name}']"
    assert name not in [done.name for done in report.graphs[0].passes]


@pytest.mark.parametrize("name", ["count_work", "look_around", "find_timestep", "follow_trails", "verify"])
def test_passes_for_the_report_can_be_switched_off(name):
    model, inputs = randomise(VideoDiT()), dit_inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"})(*inputs)
        torch._dynamo.reset()
        found = torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager", "disable_passes": (name,)})(*inputs)
    assert torch.equal(found, wanted)
    assert len(lvsa_compile.reports()[-1].sparse_sites) == len(lvsa_compile.reports()[-1].sites)


@pytest.mark.parametrize(("given", "text"), [
    (["rewrites"], "option disable_passes=['rewrites']: there is no pass 'rewrites'. The passes are: count_work, find_attention,"),
    (["decide"], "option disable_passes=['decide']: nothing is known without pass 'decide'. Use backend=\"inductor\" to do without all"),
    ("rewrite", "option disable_passes='rewrite': not a list of names. Give names of passes, such as ['rewrite']."),
])  # fmt: skip
def test_a_pass_that_cannot_be_switched_off_is_an_error(given, text):
    model, inputs = randomise(VideoDiT()), dit_inputs()
    with pytest.raises(Exception, match=re.escape(text)), torch.no_grad():
        torch.compile(model, backend="lvsa", options={**EXACT, "disable_passes": given})(*inputs)


def test_each_pass_says_what_it_changed(caplog):
    model, inputs = randomise(VideoDiT()), dit_inputs()
    with torch.no_grad(), caplog.at_level("DEBUG", logger="lvsa_compile.passes.pipeline"):
        torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"})(*inputs)
    told = {done.name: done.changed for done in lvsa_compile.reports()[0].graphs[0].passes}
    assert told["find_attention"] == "sites: 1"
    assert told["rewrite"].startswith("decisions: 1; extra_inputs: 3; changed: True; +")
    assert told["verify"] == "nothing changed"
    assert re.search(r"pass \d+ rewrite: decisions: 1; extra_inputs: 3; .* \(\d+\.\d{3} s\)", caplog.text)
