"""Finding what a report does not say at once: two reports beside each other, the first site that moves the output, torch's own trace."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import EXACT, PATTERN, VideoDiT, dit_inputs, randomise, wan, wan_inputs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import lvsa_compile
from lvsa_compile.bisecting import bisect
from lvsa_compile.cli import app
from lvsa_compile.errors import BisectError, ReportFileError
from lvsa_compile.report.comparison import Difference, differences, gathered, read_report
from lvsa_compile.report.names import together

MODEL = """
import sys
sys.path.insert(0, {tests!r})
from tiny_models import wan, wan_inputs
build = lambda: (wan(num_layers=3), wan_inputs())
"""
BAD = """
def raises():
    return {}['missing']
def misfit():
    return wan(), {**wan_inputs(), "hidden_states": wan_inputs()["hidden_states"][:, :2]}
def fails():
    def forward(x):
        return {}['gone']
    return forward, {"x": 1}
"""


def written(folder: Path, name: str, report) -> Path:
    path = folder / name
    path.write_text(json.dumps(report.to_dict()))
    return path


def test_two_reports_are_compared_site_by_site(tmp_path):
    reports = [lvsa_compile.explain(wan(), options={**PATTERN, **more}, **wan_inputs()) for more in ({}, {"dense_layers": [0]})]
    paths = [written(tmp_path, f"{n}.json", report) for n, report in enumerate(reports)]
    found = differences(*map(read_report, paths))
    first = reports[0].sparse_sites[0].name
    assert Difference(first, "decision", "sparse", "dense") in found
    assert Difference(first, "reason", "", "dense_layer") in found
    assert {difference.site for difference in found} == {"", first}
    assert {difference.what for difference in found if not difference.site} == {"options", "work", "forward"}
    run = CliRunner().invoke(app, ["diff", *map(str, paths)], env={"COLUMNS": "200"})
    assert run.exit_code == 1
    assert "dense_layer" in run.stdout
    as_json = CliRunner().invoke(app, ["diff", *map(str, paths), "--json"])
    assert [Difference(**row) for row in json.loads(as_json.stdout)] == found
    same = CliRunner().invoke(app, ["diff", str(paths[0]), str(paths[0])])
    assert (same.exit_code, same.stdout.strip()) == (0, "The reports say the same.")


def test_sites_that_come_and_go_and_names_that_repeat():
    def report(*names):
        return {"graphs": [{"sites": [{"name": name, "decision": "dense", "reason": "causal"} for name in names]}]}

    assert differences(report("a", "a", "b"), report("a", "c")) == [
        Difference("a (2)", "site", "dense causal", ""),
        Difference("b", "site", "dense causal", ""),
        Difference("c", "site", "", "dense causal"),
    ]


@pytest.mark.parametrize(("text", "problem"), [
    ("nothing", "cannot be read as JSON (Expecting value: line 1 column 1 (char 0))"), ("[]", "is no report: it has no list of graphs"),
    ('{"graphs": [], "schema": 3}', "has schema 3, a newer version's: this one reads 1 to 2"),
])  # fmt: skip
def test_a_file_that_is_no_report(tmp_path, text, problem):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ReportFileError) as raised:
        read_report(path)
    assert str(raised.value) == (
        f"{str(path)!r} {problem}. Give a file that `lvsa explain ... --json` or json.dump(report.to_dict()) wrote."
    )


def test_reports_of_an_older_schema_are_read_and_compared(tmp_path):
    """Schema 1 did not name itself, and knew no policies."""
    now = lvsa_compile.explain(wan(), options=PATTERN, **wan_inputs()).to_dict()
    assert now["schema"] == 2
    old = json.loads(json.dumps(now))
    del old["schema"]
    for site in old["graphs"][0]["sites"]:
        del site["policy"]
    del old["graphs"][0]["passes"]
    for name, content in (("old", old), ("now", now)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert differences(read_report(tmp_path / "old.json"), read_report(tmp_path / "now.json")) == []


def test_bisecting_finds_the_first_site_that_moves_the_output():
    """What attention gives is thrown away in all blocks but one, so that only its site can."""
    model, said = wan(num_layers=5), []
    for number, block in enumerate(model.blocks):
        if number != 2:
            torch.nn.init.zeros_(block.attn1.to_out[0].weight)
    found = bisect(model, wan_inputs(), tolerance=1e-6, options={**EXACT, "inner": "eager"}, say=said.append)
    assert (found.sites, found.number, found.site) == (5, 3, "blocks.2.attn1")
    assert found.error > 1e-4
    assert found.error_before < 1e-6
    assert len(said) + 1 == found.runs == 4
    assert said[0].startswith("5 of 5 sites sparse: the output moves by ")


def test_bisecting_a_model_that_moves_little_names_no_site():
    found = bisect(randomise(VideoDiT()), dict(zip(("latents", "timestep", "text"), dit_inputs(), strict=False)), 100.0, {**EXACT})
    assert (found.site, found.number) == ("", 0)
    assert 0 < found.error < 100


@pytest.mark.parametrize(("more", "text"), [
    (dict(tolerance=0.0), "bisect tolerance=0.0: not a positive number. Give how much the output may move, such as 0.05."),
    (dict(tolerance=1.0, options={"max_sites": 2}), "bisect max_sites=2: this is what bisecting varies. Leave it out."),
    (dict(tolerance=1.0, options={**EXACT, "reference_frames": 50}),
     "bisect model='WanTransformer3DModel': no site of it is sparse. See lvsa explain for why."),
])  # fmt: skip
def test_what_cannot_be_bisected(more, text):
    with pytest.raises(BisectError) as raised:
        bisect(wan(num_layers=1), wan_inputs(), **more)
    assert str(raised.value) == text


@pytest.mark.slow
def test_the_bisect_command(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(MODEL.format(tests=str(Path(__file__).parent)))
    options = [part for name, value in {**EXACT, "inner": "aot_eager"}.items() for part in ("-o", f"{name}={json.dumps(value)}")]
    run = CliRunner().invoke(app, ["bisect", str(file), "--tolerance", "1e-9", "--json", *options])
    assert run.exit_code == 1, run.output
    found = json.loads(run.stdout)
    assert (found["sites"], found["number"], found["error_before"]) == (3, 1, 0.0)


@pytest.mark.process
def test_torchs_structured_trace_holds_the_report(tmp_path):
    code = """
import torch
from tiny_models import EXACT, wan, wan_inputs
with torch.no_grad():
    torch.compile(wan(num_layers=1), backend="lvsa", options=EXACT)(**wan_inputs())
"""
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert '"name": "lvsa_report", "encoding": "json"' in text
    assert '"summary": "lvsa WanTransformer3DModel [0/0]: 1 of 2 attention sites sparse' in text


@pytest.mark.parametrize(("arguments", "text"), [
    (["explain", "model.py", "--html", "nowhere/x.html"], "--html 'nowhere/x.html' is a folder, or in one that does not exist."),
    (["explain", "model.py", "--html", "."], "--html '.' is a folder, or in one that does not exist. Give the path of a file."),
    (["explain", "model.py", "--device", "foo"], "--device 'foo' cannot be used:"),
    (["explain", "model.py:raises"], "raises() of 'model.py' raised KeyError: 'missing'"),
    (["explain", "model.py:misfit"], "a forward of WanTransformer3DModel with the inputs of 'model.py:misfit' raised RuntimeError: 'Given"),
    (["explain", "model.py:fails"], "raised KeyError: 'gone' (File"),
    (["explain", "broken.py"], "running 'broken.py' raised SyntaxError"),
    (["bisect", "nothing.py"], "'nothing.py' is no Python file."),
])  # fmt: skip
def test_bad_input_is_one_line_before_anything_runs(tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL.format(tests=str(Path(__file__).parent)) + BAD)
    (tmp_path / "broken.py").write_text("def build(:\n")
    run = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert run.exit_code == 2
    assert text in " ".join(run.output.split())
    assert "Traceback" not in run.output


def test_the_version():
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == importlib.metadata.version("lvsa-compile")


@pytest.mark.parametrize(("names", "one"), [
    (["a.0.attn"], "a.0.attn"),
    (["a.0.attn", "a.1.attn", "a.2.attn", "a.5.attn"], "a.0-2,5.attn (4 sites)"),
    (["a.10.x", "a.9.x"], "a.9-10.x (2 sites)"),
    (["a.0.x", "b.0.x", "c.0.x"], "a.0.x and 2 more"),
    (["a.0.b.1", "a.1.b.0"], "a.0.b.1 and 1 more"),
    (["a.0.attn", "a.0.attn"], "a.0.attn (2 sites)"),
    (["a.0", "a.0.x"], "a.0 and 1 more"),
])  # fmt: skip
def test_paths_that_differ_in_a_number_get_one_name(names, one):
    assert together(names) == one


def test_differences_that_are_the_same_at_many_sites_are_one_row():
    found = [Difference(f"blocks.{n}.attn1", "lowering", "cpu", "triton") for n in range(40)] + [Difference("", "model", "A", "B")]
    assert gathered(found) == [
        ("blocks.0-39.attn1 (40 sites)", Difference("", "lowering", "cpu", "triton")),
        ("", Difference("", "model", "A", "B")),
    ]


def test_measuring_times_each_sparse_site_as_it_is_lowered_and_dense():
    plain = lvsa_compile.explain(wan(num_layers=1), options=PATTERN, **wan_inputs())
    report = plain.measured()
    (site,) = report.sparse_sites
    assert set(site.seconds) == {"cpu", "dense"}
    assert site.measured == site.seconds["dense"] / site.seconds["cpu"] > 0
    assert f"{site.measured:.2g}×)" in str(site)
    assert "its sites measured" in report.gain
    assert "by what is expected of the lowering" in plain.gain
    assert plain.sparse_sites[0].seconds == {}, "the report that was measured is another one"
    nowhere = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in wan_inputs().items()}
    (site,) = lvsa_compile.explain(wan(num_layers=1).to("meta"), options=PATTERN, **nowhere).measured().sparse_sites
    assert (site.expected, site.seconds) == (0.0, {})
    json.dumps(report.to_dict())


def test_the_share_of_the_forward_is_that_of_torchs_own_count():
    """Oracle: torch.utils.flop_counter over the eager model."""
    model, inputs = wan(num_layers=2), wan_inputs(frames=30)
    report = lvsa_compile.explain(model, options=PATTERN, **inputs)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    (graph,) = report.graphs
    assert graph.flops == counter.get_total_flops()
    sparse = sum(site.flops for site in report.sparse_sites)
    assert f"is {sparse / graph.flops:.0%} of the forward's" in report.gain
    site = report.sparse_sites[0]
    whole = graph.flops / (graph.flops - sparse + sparse / site.expected)
    assert report.gain.endswith(f"the whole may become {whole:.2g}× as fast")


def test_a_trail_that_is_lost_and_a_horizon_nobody_knows_are_said_together():
    report = lvsa_compile.explain(randomise(VideoDiT(shuffled)), *dit_inputs())
    assert report.nearest_miss.reason == "layout_unknown"
    assert report.also_missing.startswith("horizon_unknown: ")
    assert f"after that there is also {report.also_missing}" in str(report)
    told = lvsa_compile.explain(randomise(VideoDiT(shuffled)), *dit_inputs(), options=PATTERN)
    assert told.also_missing == ""


def shuffled(model, tokens, grid, text):
    tokens = tokens[:, torch.sort(tokens[0, :, 0]).indices]
    heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def test_the_line_named_is_the_models_and_not_that_of_a_library_it_calls():
    site = lvsa_compile.explain(wan(num_layers=1), options=PATTERN, **wan_inputs()).sites[0]
    assert "transformer_wan.py" in site.source


def test_a_report_says_how_much_work_is_left_and_leaves_the_lowering_open_on_no_device():
    model = wan(num_layers=1).to("meta")
    inputs = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in wan_inputs().items()}
    report = lvsa_compile.explain(model, options=PATTERN, **inputs)
    (site,) = report.sparse_sites
    assert site.lowering == "(chosen on the real device)"
    assert site.passed_over == ()
    flops = 4 * 108**2 * 2 * 24
    assert report.work == (
        f"attention over the video computes {site.density:.0%} of what dense attention would "
        f"({flops * site.density / 1e6:.3g} MFLOP of {flops / 1e6:.3g} MFLOP per forward)"
    )
    assert f"  work: {report.work}" in str(report)
