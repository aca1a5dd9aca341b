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
from typer.testing import CliRunner

import lvsa_compile
from lvsa_compile.bisecting import bisect
from lvsa_compile.cli import app
from lvsa_compile.errors import BisectError, ReportFileError
from lvsa_compile.report.comparison import Difference, differences, read_report

MODEL = """
import sys
sys.path.insert(0, {tests!r})
from tiny_models import wan, wan_inputs
build = lambda: (wan(num_layers=3), wan_inputs())
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
])  # fmt: skip
def test_a_file_that_is_no_report(tmp_path, text, problem):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ReportFileError) as raised:
        read_report(path)
    assert str(raised.value) == (
        f"{str(path)!r} {problem}. Give a file that `lvsa explain ... --json` or json.dump(report.to_dict()) wrote."
    )


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


def test_the_bisect_command(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(MODEL.format(tests=str(Path(__file__).parent)))
    options = [part for name, value in {**EXACT, "inner": "aot_eager"}.items() for part in ("-o", f"{name}={json.dumps(value)}")]
    run = CliRunner().invoke(app, ["bisect", str(file), "--tolerance", "1e-9", "--json", *options])
    assert run.exit_code == 1, run.output
    found = json.loads(run.stdout)
    assert (found["sites"], found["number"], found["error_before"]) == (3, 1, 0.0)


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
    (["explain", "broken.py"], "running 'broken.py' raised SyntaxError"),
    (["bisect", "nothing.py"], "'nothing.py' is no Python file."),
])  # fmt: skip
def test_bad_input_is_one_line_before_anything_runs(tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(f"{MODEL.format(tests=str(Path(__file__).parent))}\ndef raises():\n    return {{}}['missing']\n")
    (tmp_path / "broken.py").write_text("def build(:\n")
    run = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert run.exit_code == 2
    assert text in " ".join(run.output.split())
    assert "Traceback" not in run.output


def test_the_version():
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == importlib.metadata.version("lvsa-compile")


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
