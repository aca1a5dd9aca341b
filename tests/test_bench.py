"""``lvsa bench``: its arithmetic against known answers, its contenders against attention by definition, its page against its results."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import oracle
import pytest
import torch
from typer.testing import CliRunner

from lvsa_compile.bench import attention_sites, measuring, plot, results, tables, video_model
from lvsa_compile.bench.attention_sites import Measured, Site
from lvsa_compile.bench.measuring import Seconds
from lvsa_compile.cli import app
from lvsa_compile.errors import BenchError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SITE = Site(13, 7, 4, head_dim=16, reference=5, batch=2, key_heads=2, prefix=3, suffix=6, padded=2)


def test_ratios_are_of_the_medians_that_stand_beside_them():
    mine, theirs = Seconds((1.0, 10.0, 100.0)), Seconds((3.0, 20.0, 300.0))
    assert mine.times_faster_than(theirs) == 2.0
    assert mine.median == 10.0
    assert Seconds((1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx(2 / 3)
    assert Seconds((2.0,)).spread == 0


def test_contenders_run_in_turn_in_both_orders(monkeypatch):
    ran = []
    found = measuring.in_turn({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, rounds=2, device=CPU)
    assert ran[:4] == list("aabb")  # each warmed up and tried once
    measured = "".join(ran[4:])
    repeats = measured.index("b")
    assert measured.startswith("a" * repeats + "b")
    assert measured.endswith("a")
    assert len(found["a"].rounds) == len(found["b"].rounds) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_a_run_holds_at_once():
    torch.ones(1000)

    def run():
        for _ in range(3):
            torch.ones(32 * 2**20 // 4)

    least = min(measuring.peak_bytes(run, CPU) for _ in range(5))  # a process gives memory back when it likes
    assert 30 * 2**20 < least < 36 * 2**20


def test_density_and_contenders_are_those_of_the_mask():
    site = Measured(SITE, CPU)
    mask = oracle.token_mask(13, 7, site.phase, prefix=3, suffix=6, reference=5)
    assert site.density == pytest.approx(mask.double().mean().item())
    added = torch.zeros(1, 1, 1, SITE.span.length).masked_fill(torch.arange(SITE.span.length) >= SITE.span.length - 2, float("-inf"))
    sparse, _ = oracle.dense(site.query, site.key, site.value, mask, added=added)
    dense, _ = oracle.dense(site.query, site.key, site.value, torch.ones_like(mask), added=added)
    with torch.no_grad():
        for output in (site.gathered(), site.flex(), site.lowered("cpu")(), site.lowered("dense_merge")(), site.lowered("reference")()):
            assert (output.double() - sparse).abs().max() < 1e-5
            assert site.worst_error(output, sparse=True) < 1e-5
            assert site.worst_error(output, sparse=False) > 0.01
        assert (site.dense().double() - dense).abs().max() < 1e-5
        assert site.worst_error(site.dense(), sparse=False) < 1e-5


def test_one_wrong_row_is_an_error():
    site = Measured(SITE, CPU)
    output = site.lowered("cpu")()
    output[1, 3, 50] *= 1.01
    assert site.worst_error(output, sparse=True) > 1e-4


def test_the_sweep_covers_what_it_says():
    sites = attention_sites.sweep()
    assert len({dataclasses.astuple(site) for site in sites}) == 40
    for name, low, high in (("frames", 9, 161), ("tokens_per_frame", 16, 400), ("heads", 1, 16)):
        assert (min(getattr(s, name) for s in sites), max(getattr(s, name) for s in sites)) == (low, high)


def test_the_bound_of_a_model_counts_what_attention_and_the_rest_take():
    model = video_model.wan_shaped()
    assert video_model.flop_bound(model, 21, 1.0) == 1.0
    tokens, attention = 42 * 96, 4 * (42 * 96) ** 2 * 512 * 2
    assert attention / (1 - 1 / video_model.flop_bound(model, 42, 0.0)) > attention
    linear = 2 * tokens * 2 * (6 * 512 * 512 + 2 * 512 * 2944)  # without the text's keys, the patches and the head: 2 % of it
    assert video_model.flop_bound(model, 42, 0.0) == pytest.approx((attention + linear) / linear, rel=0.06)


def test_the_exponent_of_growth():
    frames = [42, 84, 126, 252]
    assert results.exponent(frames, [3e-4 * n**1.25 for n in frames]) == pytest.approx(1.25)


def test_the_summary_says_the_worst():
    row = dict(chosen=True, dtype="float32", temporaries=0.5, frames=21)
    found = results.summary({
        "sites": [row | dict(share=0.9), row | dict(share=0.4), row | dict(share=0.1, chosen=False)],
        "variants": [row | dict(share=0.8, kind="plain", temporaries=0.7), row | dict(share=0.6, kind="batch 2")],
        "sweep": [row | dict(speedup=2.0), row | dict(speedup=0.8)],
    })  # fmt: skip
    assert found == {
        "share of the bound, float32, geometric mean": 0.6,
        "share of the bound, float32, least": 0.4,
        "share of the bound against the plain case, batch 2, least": 0.75,
        "seconds over dense, worst of the sweep": 1.25,
        "temporaries over q + k + v + o, most": 0.7,
    }


def test_the_command_prints_json_and_nothing_else_on_stdout(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")  # by which the other tests make Triton's kernels run here, slowly
    path = tmp_path / "found.json"
    run = CliRunner().invoke(app, ["bench", "sites", "growth", "--quick", "--rounds", "1", "--json", "--output", str(path)])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found == json.loads(path.read_text())
    assert [row["contender"] for row in found["sites"]] == [
        "dense SDPA",
        "FlexAttention",
        "gather per frame",
        "lvsa cpu",
        "lvsa dense_merge",
    ]
    assert all(row["worst_error"] < 1e-5 for row in found["sites"])
    assert {"machine", "versions", "commands", "summary"} < set(found)
    assert "sites 1/1: 25 frames × 8 tokens" in run.stderr


def test_parts_measured_later_join_those_of_a_file_of_the_same_machine(tmp_path):
    path = tmp_path / "found.json"
    facts = {"machine": {"device": "cpu", "load before": 0.1}, "versions": {"torch": "2.13"}}
    growth = [dict(chosen=True, frames=n, seconds=n**2.0) for n in (42, 84, 126)]
    later = facts | {"commands": ["second"], "growth": growth, "summary": {}}
    assert results.added_to(path, later) is later
    path.write_text(
        json.dumps(facts | {"machine": {"device": "cpu", "load before": 2}, "commands": ["first"], "sweep": [dict(chosen=True, speedup=2)]})
    )
    both = results.added_to(path, later)
    assert both["commands"] == ["first", "second"]
    assert both["summary"] == {"seconds over dense, worst of the sweep": 0.5, "exponent of seconds over frames, a site": 2.0}
    path.write_text(json.dumps(facts | {"versions": {"torch": "2.11"}, "commands": []}))
    with pytest.raises(
        BenchError, match=r"bench --output: .*found.json was measured elsewhere: versions {'torch': '2.11'}. Name another file"
    ):
        results.added_to(path, later)


def test_results_as_a_table():
    row = dict(frames=41, tokens_per_frame=240, heads=4, head_dim=128, reference=33, kind="batch 2", dtype="float32", contender="lvsa cpu")
    row |= dict(seconds=0.5, spread=0.02, speedup=2.0, bound=2.5, share=0.8, peak_bytes=3 * 2**20, temporaries=0.5, worst_error=1e-6)
    (shown,) = tables.tables({"sites": [row]})
    assert shown.title == "One attention site, every way of computing it: 41 × 240, 4×128, horizon 33, batch 2, float32"
    assert shown.to_markdown().splitlines()[2] == "| lvsa cpu | 500 ms | 2% | 2.00× | 2.50× | 80% | 3 MiB | 0.50× | 1.0e-06 |"
    assert [tables.seconds(s) for s in (12.3456, 0.0123, 5.2e-5, None)] == ["12.3 s", "12.3 ms", "52 µs", "–"]


@pytest.mark.parametrize(("arguments", "text"), [
    (["bench", "site"], "bench site: no such part. Name some of: sites, variants, sweep, growth, model, blocks, policies, watching, "
     "overheads."),
    (["bench", "overheads", "--plot", "x.svg"], "bench plot: the part 'model' is not among the parts. Add model to the parts."),
])  # fmt: skip
def test_what_cannot_be_measured_is_said_before_anything_is(arguments, text):
    run = CliRunner().invoke(app, arguments)
    assert isinstance(run.exception, BenchError)
    assert str(run.exception) == text


def test_a_folder_that_does_not_exist_is_named_before_anything_is_measured():
    run = CliRunner().invoke(app, ["bench", "--output", "/nowhere/found.json"])
    assert run.exit_code == 2
    assert "'/nowhere/found.json' is in a folder that does not exist. Make '/nowhere' first." in " ".join(
        run.output.replace("│", " ").split()
    )


def test_what_is_not_installed_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BenchError, match=r"bench model: needs diffusers. Run `pip install diffusers`, or name other parts"):
        video_model.wan_shaped()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchError, match=r"bench plot: needs matplotlib. Run `pip install lvsa-compile\[bench\]`, or leave --plot away."):
        plot.plot({"model": [{}]}, tmp_path / "x.svg")


def test_the_document_and_its_pictures_are_those_of_the_results():
    writer = runpy.run_path(str(ROOT / "docs/write_performance.py"))
    assert (ROOT / "docs/performance.md").read_text() == writer["performance_page"](), "run python docs/write_performance.py"
    for path in writer["RESULTS"].glob("*.json"):
        found = json.loads(path.read_text())
        if "model" in found:
            assert plot.digest(found) in writer["_picture"](path).read_text(), "run python docs/write_performance.py"
