from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from test_backend import close, expected
from tiny_models import EXACT, PATTERN, VideoDiT, dit_inputs, randomise, timesteps, wan, wan_inputs
from typer.testing import CliRunner

import lvsa_compile
from lvsa_compile.cli import app
from lvsa_compile.errors import ExplainError, OptionError

FIRST = Path(sys.executable).parent


class Breaks(VideoDiT):
    """Reads a value between two attentions, so that Dynamo makes two graphs."""

    def forward(self, latents, timestep, text):
        tokens = self.patch(latents).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens) + self.time(timestep[:, None].cos().expand(-1, 16))[:, None]
        if float(tokens.sum()) > 1e30:
            tokens = tokens * 2
        return tokens + self.second(tokens)


def cache_entries(function) -> int:
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return len(_debug_get_cache_entry_list(function.__code__))


def test_it_says_what_compiling_would_do():
    model, inputs = wan(), wan_inputs()
    report = lvsa_compile.explain(model, **inputs, options=PATTERN)
    with torch.no_grad():
        torch.compile(model, backend="lvsa", options=EXACT)(**inputs)
    (compiled,) = lvsa_compile.reports()
    assert report.sites == compiled.sites
    assert report.model == compiled.model == "WanTransformer3DModel"


def test_it_leaves_dynamo_reports_counters_clocks_and_randomness_alone():
    model, inputs = wan(), wan_inputs()
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    with torch.no_grad():
        for step in range(2):
            compiled(**{**inputs, "timestep": torch.tensor([timesteps(5)[step]])})
        graphs, kept, counted = (
            torch._dynamo.utils.counters["stats"]["unique_graphs"],
            lvsa_compile.reports(),
            dict(torch._dynamo.utils.counters["lvsa"]),
        )
        hooks, state = dict(vars(model)), torch.get_rng_state()
        for frames in range(5, 7):
            lvsa_compile.explain(model, **wan_inputs(frames), options=PATTERN)
            lvsa_compile.explain(compiled, **wan_inputs(frames), options=PATTERN)
        assert lvsa_compile.reports() == kept
        assert dict(torch._dynamo.utils.counters["lvsa"]) == counted
        assert vars(model).keys() == hooks.keys()
        assert torch.equal(torch.get_rng_state(), state)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        inputs["timestep"] = torch.tensor([timesteps(5)[2]])
        assert close(compiled(**inputs)[0], expected(model, inputs, 2)), "the clock had moved"
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "the compiled graph was lost"


def test_it_uses_no_compile_slot_of_the_model():
    model, inputs = randomise(VideoDiT()), dit_inputs()
    before = cache_entries(VideoDiT.forward)
    for _ in range(12):
        lvsa_compile.explain(model, *inputs, options=PATTERN)
    assert cache_entries(VideoDiT.forward) == before


def test_graph_breaks_are_shown_as_several_graphs_and_leave_the_budget_alone():
    model, inputs = randomise(Breaks()), dit_inputs()
    for _ in range(10):
        report = lvsa_compile.explain(model, *inputs, options=PATTERN)
    assert [site.decision for site in report.sites] == ["sparse", "sparse"]
    assert [len(graph.sites) for graph in report.graphs if graph.sites] == [1, 1]
    assert "graph " in str(report)
    with torch.no_grad():
        torch.compile(model, backend="lvsa", options=EXACT)(*inputs)
    (compiled,) = lvsa_compile.reports()  # the graphs of one forward are one report
    assert [site.decision for site in compiled.sites] == ["sparse", "sparse"]
    assert len(compiled.graphs) >= 2


def test_meta_needs_no_memory_and_names_the_line_that_reads_a_value():
    model, inputs = wan(), wan_inputs()
    assert (
        lvsa_compile.explain(model, **inputs, options=PATTERN, device="meta").sites
        == lvsa_compile.explain(model, **inputs, options=PATTERN).sites
    )
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    with pytest.raises(ExplainError, match=r"stopped at File .*test_explain.py\", line \d+, in forward: .* leave device out"):
        lvsa_compile.explain(Breaks(), *dit_inputs(), options=PATTERN, device="meta")


def test_nearest_miss_comes_first_with_values_line_and_remedy():
    report = lvsa_compile.explain(randomise(VideoDiT()), *dit_inputs())
    assert str(report).splitlines()[1:3] == [
        "  nearest miss: attention: dense, horizon_unknown: VideoDiT is not in the table of training horizons  [video 9×3×4]  "
        "Remedy: Pass options={'reference_frames': N}, N being the latent frames the model was trained on.",
        f"    attention at {report.sites[0].source}",
    ]
    assert "tiny_models.py" in report.sites[0].source
    full = lvsa_compile.explain(wan(), **wan_inputs())
    assert full.nearest_miss.reason == "pattern_full"
    assert "9 latent frames, training horizon 21" in full.nearest_miss.detail


def test_bad_options_are_errors():
    with pytest.raises(OptionError, match="windwo"):
        lvsa_compile.explain(wan(), **wan_inputs(), options={"windwo": 3})


def test_a_report_is_plain_values():
    report = lvsa_compile.explain(wan(), **wan_inputs(), options=PATTERN)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["model"] == "WanTransformer3DModel"
    site = plain["graphs"][0]["sites"][0]
    assert (site["decision"], site["lowering"], site["layout"]) == ("sparse", "cpu", "video 9×3×4")
    assert site["query_shape"] == "[1, 2, 108, 24]"
    assert plain["options"] == PATTERN
    assert set(plain["versions"]) == {"lvsa-compile", "torch", "python"}


def test_the_page_is_one_file_and_escapes_what_it_prints(tmp_path):
    class Evil(VideoDiT):
        pass

    Evil.__name__ = "<script>alert(1)</script>"
    path = tmp_path / "report.html"
    lvsa_compile.explain(randomise(Evil()), *dit_inputs(), options=PATTERN).to_html(str(path))
    text = path.read_text()
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.feed(text)
    assert tags.count("script") == 2  # the pattern's data and the slider
    assert "&lt;script&gt;" in text
    assert "http" not in text
    assert "alert(1)</script>" not in text
    assert "video 9×3×4" in text


def command(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run([FIRST / "lvsa", *arguments], capture_output=True, text=True, check=check)


@pytest.mark.process
def test_the_explain_command(tmp_path):
    model = tmp_path / "model.py"
    model.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom tiny_models import wan, wan_inputs\n"
        "def build():\n    return wan(), wan_inputs()\n"
    )
    page = tmp_path / "report.html"
    run = command("explain", str(model), "-o", "reference_frames=4", "-o", "window=1", "--html", str(page))
    assert "2 of 4 attention sites sparse" in run.stdout
    assert page.exists()
    plain = json.loads(CliRunner().invoke(app, ["explain", f"{model}:build", "--json", "--device", "meta"]).stdout)
    assert plain["graphs"][0]["sites"][0]["reason"] == "pattern_full"
    wrong = command("explain", str(model), "-o", "windwo=1", check=False)
    assert wrong.returncode == 2
    assert (
        wrong.stderr.strip().splitlines()[-1] == "lvsa: option windwo=1: neither lvsa nor Inductor has this option. Did you mean 'window'?"
    )
    missing = CliRunner().invoke(app, ["explain", f"{model}:other"])
    assert "has no function 'other'" in " ".join(missing.output.replace("│", "").split())


@pytest.mark.process
def test_doctor_and_pattern_commands():
    doctor = command("doctor").stdout
    assert torch.__version__ in doctor
    assert "reference" in doctor
    assert "usable" in doctor
    drawn = command("pattern", "--frames", "12", "--window", "1", "--reference-frames", "4").stdout
    assert "step 0: █ anchor, ▒ window, · skipped" in drawn
    assert "   0 █▒▒" in drawn
    assert "step 2" in drawn
    assert command("pattern", "--frames", "0", check=False).stderr.startswith("lvsa: option frames=0: smaller than 1.")


def test_a_model_that_draws_random_numbers_draws_the_same_ones_afterwards():
    class Noisy(VideoDiT):
        def forward(self, latents, timestep, text):
            return super().forward(latents + torch.randn_like(latents), timestep, text)

    model, inputs = randomise(Noisy()), dit_inputs()
    state = torch.get_rng_state()
    lvsa_compile.explain(model, *inputs, options=PATTERN)
    assert torch.equal(torch.get_rng_state(), state)


def test_positional_arguments_are_known_by_the_names_of_the_models_parameters():
    model = randomise(VideoDiT())
    by_place, by_name = (lvsa_compile.explain(model, *dit_inputs(), options=PATTERN), named_explain(model))
    assert by_place.graphs[0].clock == by_name.graphs[0].clock == "value of input 'timestep'"
    assert lvsa_compile.explain(lambda *inputs: model(*inputs), *dit_inputs(), options=PATTERN).sparse_sites


def named_explain(model):
    return lvsa_compile.explain(model, **dict(zip(("latents", "timestep", "text"), dit_inputs(), strict=True)), options=PATTERN)
