"""Where this package itself fails: one warning, one dense graph, one reason; and what passes beside the rewrite may do to a graph."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise

import lvsa_compile
from lvsa_compile import backend, functional, source_stamp
from lvsa_compile.axes import rules
from lvsa_compile.errors import LvsaWarning, RateError
from lvsa_compile.lowering import cpu
from lvsa_compile.passes import find_attention

OPTIONS = {**EXACT, "inner": "eager"}


class Broken(RuntimeError):
    pass


def broken(*args, **kwargs):
    raise Broken("it broke here\nand a second line")


def break_pass(monkeypatch):
    monkeypatch.setattr(backend, "PIPELINE", (*backend.ANALYSIS, broken))


def break_rule(monkeypatch):
    monkeypatch.setitem(rules.RULES, "convolution", broken)


def break_form(monkeypatch):
    monkeypatch.setattr(find_attention, "FORMS", (broken,))


def break_predicate(monkeypatch):
    monkeypatch.setattr(cpu, "_refuses", broken)
    from lvsa_compile.selection import select

    changed = tuple(dataclasses.replace(found, refuses=broken) if found.name == "cpu" else found for found in select.lowerings())
    monkeypatch.setattr(select, "lowerings", lambda: changed)


def break_report(monkeypatch):
    calls = []
    report_of = backend.report_of
    monkeypatch.setattr(backend, "report_of", lambda compilation: report_of(compilation) if calls else broken(calls.append(1)))


PLACES = [break_pass, break_rule, break_form, break_predicate, break_report]


@pytest.mark.parametrize("breaks", PLACES, ids=lambda f: f.__name__)
def test_an_error_of_ours_is_one_warning_and_one_dense_graph(breaks, monkeypatch):
    model, inputs = randomise(VideoDiT()), dit_inputs()
    breaks(monkeypatch)
    with torch.no_grad(), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        output = torch.compile(model, backend="lvsa", options=OPTIONS)(*inputs)
        assert torch.equal(output, model(*inputs))
    (warning,) = [str(w.message) for w in heard if w.category is LvsaWarning]
    (report,) = lvsa_compile.reports()
    (site,) = report.sites
    assert (site.name, site.decision, site.reason) == ("attention", "dense", "internal_error")
    assert "it broke here" in site.detail
    assert "second line" not in site.detail
    assert "Broken" in warning
    assert "report" in warning
    assert site.detail in warning
    assert "options={'strict': True}" in site.remedy


def test_the_line_of_this_package_is_named(monkeypatch):
    monkeypatch.setattr("lvsa_compile.axes.patch_rules.axis_size", broken)
    with (
        torch.no_grad(),
        pytest.warns(LvsaWarning, match=r"aten.convolution.default: Broken: it broke here, lvsa_compile/axes/patch_rules.py:\d+\."),
    ):
        torch.compile(randomise(VideoDiT()), backend="lvsa", options=OPTIONS)(*dit_inputs())


@pytest.mark.parametrize("breaks", PLACES, ids=lambda f: f.__name__)
def test_strict_lets_an_error_of_ours_through(breaks, monkeypatch):
    breaks(monkeypatch)
    with torch.no_grad(), pytest.raises(Exception, match="it broke here"):
        torch.compile(randomise(VideoDiT()), backend="lvsa", options={**OPTIONS, "strict": True})(*dit_inputs())


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch._dynamo.exc.Unsupported, lvsa_compile.OptionError])
def test_what_is_no_error_of_ours_is_let_through(error, monkeypatch):
    def interrupted(compilation):
        raise {"OptionError": lambda: error("window", 1, "no", "Yes.")}.get(error.__name__, lambda: error("stop"))()

    monkeypatch.setattr(backend, "PIPELINE", (interrupted,))
    with torch.no_grad(), pytest.raises((error, torch._dynamo.exc.BackendCompilerFailed)):
        torch.compile(randomise(VideoDiT()), backend="lvsa", fullgraph=True, options=OPTIONS)(*dit_inputs())
    assert not lvsa_compile.reports()


def test_explain_survives_an_error_of_ours(monkeypatch):
    break_rule(monkeypatch)
    with pytest.warns(LvsaWarning, match="lvsa failed"):
        report = lvsa_compile.explain(randomise(VideoDiT()), *dit_inputs(), options=OPTIONS)
    assert [site.reason for site in report.sites] == ["internal_error"]


def test_a_graph_that_fails_to_be_traced_inside_vmap_compiles_all_the_same(monkeypatch):
    def block(model, tokens, grid, text):
        shift = torch.vmap(lambda x: x.sin())(tokens)
        return tokens + model.attention(tokens + shift)

    monkeypatch.setattr("lvsa_compile.axes.tracker.pointwise", broken)
    model, inputs = randomise(VideoDiT(block)), dit_inputs()
    with torch.no_grad(), pytest.warns(LvsaWarning, match="lvsa failed"):
        output = torch.compile(model, backend="lvsa", options=OPTIONS)(*inputs)
    assert torch.equal(output, model(*inputs))
    assert torch._C._functorch.get_interpreter_stack() is None


def doubled(compilation):
    graph = compilation.graph_module.graph
    output = next(iter(reversed(graph.nodes)))
    (result,) = output.args[0]
    with graph.inserting_before(output):
        twice = graph.call_function(torch.mul, (result, 2.0))
        twice.meta["example_value"] = result.meta["example_value"]
    output.args = ((twice,),)
    return dataclasses.replace(compilation, changed=True)


@pytest.mark.parametrize("frames", [9, 4])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_pass_beside_the_rewrite_counts_whether_or_not_a_site_is_sparse(frames, place, monkeypatch):
    model, inputs = randomise(VideoDiT()), dit_inputs(frames)
    with torch.no_grad():
        plain = torch.compile(model, backend="lvsa", options=OPTIONS)(*inputs)
        torch._dynamo.reset()
        passes = (doubled, *backend.PIPELINE) if place == "first" else (*backend.PIPELINE, doubled)
        monkeypatch.setattr(backend, "PIPELINE", passes)
        twice = torch.compile(model, backend="lvsa", options=OPTIONS)(*inputs)
    assert lvsa_compile.reports()[-1].sites[0].decision == ("sparse" if frames == 9 else "dense")
    assert torch.equal(twice, 2 * plain)


def test_a_lowering_without_a_rate_is_an_error():
    with pytest.raises(RateError, match=r"Lowering\('mine'\): neither rates nor a speedup is given. Give rates="):
        dataclasses.replace(cpu.LOWERING, name="mine", speedup=None)


def test_the_stamp_covers_every_file_that_decides_results(tmp_path, monkeypatch):
    import shutil

    package = tmp_path / "lvsa_compile"
    shutil.copytree(source_stamp.Path(source_stamp.__file__).parent, package)
    monkeypatch.setattr(source_stamp, "__file__", str(package / "source_stamp.py"))
    stamp = source_stamp.source_stamp.__wrapped__
    before = stamp()
    for name in ("kernels/cpu/softmax.h", "backend.py", "report/page.html"):
        text = (package / name).read_text()
        (package / name).write_text(text + "\n")
        assert stamp() != before, name
        (package / name).write_text(text)
    (package / "__pycache__" / "made.pyc").parent.mkdir(exist_ok=True)
    (package / "__pycache__" / "made.pyc").write_bytes(b"x")
    assert stamp() == before


@pytest.mark.parametrize("name", ["report_of", "publish", "_beginning"])
def test_what_fails_each_time_still_leaves_a_right_graph(name, monkeypatch):
    monkeypatch.setattr(backend, name, broken)
    model, inputs = randomise(VideoDiT()), dit_inputs()
    with torch.no_grad(), pytest.warns(LvsaWarning, match="lvsa failed"):
        assert torch.equal(torch.compile(model, backend="lvsa", options=OPTIONS)(*inputs), model(*inputs))


@pytest.mark.parametrize("name", ["guard", "warnings_of", "_leave_the_clock_to_this_graph"])
def test_a_failure_after_the_report_was_made_publishes_one_report(name, monkeypatch):
    whole, calls = getattr(backend, name), []
    monkeypatch.setattr(backend, name, lambda *args: whole(*args) if calls else broken(calls.append(1)))
    with torch.no_grad(), pytest.warns(LvsaWarning, match="lvsa failed"):
        torch.compile(randomise(VideoDiT()), backend="lvsa", options=OPTIONS)(*dit_inputs())
    (report,) = lvsa_compile.reports()
    assert [site.reason for site in report.sites] == ["internal_error"]
    assert torch._dynamo.utils.counters["lvsa"]["sparse"] == 0


def test_what_is_kept_for_a_device_is_dropped_by_a_reset():
    query = torch.randn(1, 2, 108, 8)
    lvsa_compile.sparse_attention(query, query, query, grid=(9, 3, 4), window=1, reference_frames=4)
    assert functional._ready.cache_info().currsize
    with torch.no_grad():
        torch.compile(randomise(VideoDiT()), backend="lvsa", options=OPTIONS)(*dit_inputs())
    torch._dynamo.reset()
    assert not functional._ready.cache_info().currsize
    assert not lvsa_compile.reports()
