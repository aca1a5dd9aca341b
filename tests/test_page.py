"""The report's page: what it says, that it escapes, that it stays small, and that it works in a browser where there is one."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from plans import plan
from tiny_models import PATTERN, VideoDiT, dit_inputs, wan, wan_inputs

import lvsa_compile
from lvsa_compile import FramePattern
from lvsa_compile.passes.compilation import TrailStep
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.report.page import page
from lvsa_compile.report.records import GraphReport, SiteReport
from lvsa_compile.report.report import Report

LINE = 'File "/a/long/path/to/some/models/transformer_of_video.py", line 310'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Shuffled(VideoDiT):
    """An op nobody knows stands between the latent and attention."""

    def __init__(self):
        super().__init__(lambda model, tokens, grid, text: self.attend(tokens))

    def attend(self, tokens):
        tokens = tokens[:, torch.sort(tokens[0, :, 0]).indices]
        heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def sparse_site(name: str = "blocks.0.attn1", **more) -> SiteReport:
    pattern = FramePattern(25, 2, 1, 9)
    facts = dict(density=pattern.density, lowering="cpu", layout="video 25×4×6 | text 7", query_shape="[1, 2, 607, 24]", flops=1e12)
    parts = (("video", "video 25×4×6", 600), ("other", "text 7", 7))
    trail = (TrailStep("hidden_states", "[1, 4, 25, 8, 12]", "model.py:1"), TrailStep("conv3d", "[1, 48, 25, 4, 6]", "model.py:2"))
    span = VideoSpan(0, 25, 24, 7)
    return SiteReport(name, "sparse", **{**facts, "plan": plan(pattern, span, span), "segments": parts, "trail": trail, **more})


def report_of(*sites: SiteReport, **more) -> Report:
    return Report("Model", (GraphReport("0/0", sites, "value of input 'timestep'"),), horizon="9 latent frames (option)", **more)


def data_of(text: str):
    return json.loads(re.search(r'id="patterns">(.*?)</script>', text, re.DOTALL)[1])


def test_a_model_that_works():
    report = lvsa_compile.explain(wan(), options=PATTERN, **wan_inputs())
    text = html.unescape(page(report))
    assert report.summary in text
    assert "Nearest miss" not in text
    assert "value of input 'timestep'" in text
    assert all(site.name in text for site in report.sites[:2])
    assert "blocks.0-1 (2 blocks)" in text
    assert "hidden_states" in text
    assert "conv3d" in text
    for said in dict.fromkeys(f"<code>{name}</code></td><td>{why}" for site in report.sparse_sites for name, why in site.passed_over):
        assert said in text


def test_the_data_of_the_slider_are_the_pattern():
    pattern = FramePattern(25, 2, 1, 9)
    (view,) = data_of(page(report_of(sparse_site(), sparse_site("blocks.1.attn1"))))
    assert view["title"] == "Frame pattern of 2 sites"
    assert len(view["phases"]) == pattern.phases > 1
    for phase, (anchors, windows) in enumerate(view["phases"]):
        assert set(anchors) == set(pattern.anchors(phase))
        for frame, ((low, high),) in enumerate(windows):
            assert set(anchors) | set(range(low, high + 1)) == set(pattern.attended(frame, phase))
    span = VideoSpan(0, 25, 24, 7)
    (still,) = data_of(page(report_of(sparse_site(plan=plan(pattern, span, span, rotate=False)))))
    assert len(still["phases"]) == 1
    for rotate, turns in ((True, "step"), ("layer", "layer"), ("both", "step + layer")):
        (view,) = data_of(page(report_of(sparse_site(plan=plan(pattern, span, span, rotate=rotate)))))
        assert (view["turns"], len(view["phases"])) == (turns, pattern.phases)


def test_a_model_at_its_horizon_says_what_to_do():
    report = lvsa_compile.explain(wan(), options={**PATTERN, "reference_frames": 50}, **wan_inputs())
    text = html.unescape(page(report))
    assert f"Nothing is sparse at this length: {report.nearest_miss.name}" in text
    assert "pattern_full" in text
    assert f"What to do:</b> {report.nearest_miss.remedy}" in text
    assert data_of(text) == []


def test_an_op_that_nobody_knows_is_marked_on_the_trail_with_its_line():
    latents, timestep, text = dit_inputs()
    report = lvsa_compile.explain(Shuffled(), latents=latents, timestep=timestep, text=text, options=PATTERN)
    (site,) = report.sites
    assert site.reason == "layout_unknown"
    assert site.trail[0].op == "latents"
    assert site.trail[-1].lost
    assert "test_page.py" in site.trail[-1].source
    shown = html.unescape(page(report))
    assert site.trail[-1].source in shown
    assert f"<details open><summary><h3>{site.name}: layout_unknown</h3>" in shown


def test_everything_printed_is_escaped():
    evil = "</script><script>alert(1)</script>"
    site = sparse_site(evil, detail=evil, layout=evil, source=evil, segments=(("video", evil, 5),), trail=(TrailStep(evil, evil, evil),))
    dense = dataclasses.replace(site, decision="dense", reason=evil, remedy=evil, plan=None)
    text = page(dataclasses.replace(report_of(site, dense, options={evil: evil}), model=evil, horizon=evil))
    assert evil not in text
    assert text.count("<script") == 2


@pytest.mark.parametrize(("layers", "most"), [(40, 2**20), (2000, 3 * 2**20)])
def test_it_stays_small(layers, most):
    sites = [
        sparse_site(f"blocks.{n}.attn1", source='File "/a/long/path/to/some/models/transformer_of_video.py", line 310')
        for n in range(layers)
    ]
    sites += [SiteReport(f"blocks.{n}.attn2", "dense", "cross_attention", "query video 25×4×6, key text 7") for n in range(layers)]
    text = page(report_of(*sites))
    assert len(text.encode()) < most
    assert text.count("<details") == 2, "blocks that are alike are one"
    assert f"blocks.0-{layers - 1} ({layers} blocks)" in text
    other = [dataclasses.replace(site, lowering=f"lowering{n}") for n, site in enumerate(sites[:layers])]
    text = page(report_of(*other))
    assert len(text.encode()) < most
    assert text.count("<details") == layers + 1


def test_queries_and_keys_are_drawn_to_one_scale_where_they_differ():
    same = page(report_of(sparse_site()))
    assert "queries and keys, 607 tokens" in same
    text = page(report_of(sparse_site(key_segments=(("other", "text 300", 300), ("video", "video 25×4×6", 600)))))
    assert re.findall(r"(queries|keys), (\d+) tokens", text) == [("queries", "607"), ("keys", "900")]
    assert re.findall(r"width:([\d.]+)%", text)[-2:] == ["67.44", "100.0"]


def test_what_is_expected_and_what_was_measured():
    text = html.unescape(page(report_of(sparse_site(expected=2.5), sparse_site("b", seconds={"cpu": 0.5, "dense": 1.0}))))
    assert "2.5×, expected" in text
    assert "2×, measured" in text
    assert "dense 1e+03 ms" in text


def test_a_report_without_sites():
    assert "No attention was found." in page(Report("", ()))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("sites", [1, 80, 4000])
def test_in_a_browser_the_slider_moves_the_anchors_and_nothing_fails(tmp_path, sites):
    probe = """<script>
      const failures = [];
      addEventListener("error", event => failures.push(event.message));
      addEventListener("load", () => {
        const canvas = document.querySelector("canvas"), slider = document.querySelector("input");
        const column = x => [...canvas.getContext("2d").getImageData(x, 0, 1, 1).data].join();
        const seen = [0, 1].map(step => { slider.value = step; slider.dispatchEvent(new Event("input")); return column(step + 3); });
        document.querySelector("button").click();
        setTimeout(() => {
          const wide = document.documentElement.scrollWidth > innerWidth;
          const output = document.querySelector("output").value;
          const controls = [...document.querySelectorAll("button, input, summary, .wide")];
          const reached = controls.every(control => {
            if (!control.checkVisibility()) return true;
            control.focus();
            return document.activeElement === control && control.tabIndex === 0;
          });
          const named = controls.every(c => c.textContent.trim() || c.labels?.length || c.ariaLabel);
          document.body.dataset.seen = JSON.stringify({failures, seen, value: slider.value, wide, output, reached, named});
        }, 600);
      });
    </script>"""
    text = page(report_of(*(sparse_site(f"blocks.{n}.attn1") for n in range(sites))))
    file = tmp_path / "page.html"
    file.write_text(text.replace("<style>", probe + "<style>", 1))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=390,800", "--virtual-time-budget=3000", "--dump-dom", file.as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', shown.stdout)[1]))
    assert seen["failures"] == []
    assert not seen["wide"], "the page is wider than a phone"
    assert seen["reached"], "every control can be reached by keyboard"
    assert seen["named"], "every control has a name"
    anchor = FramePattern(25, 2, 1, 9)
    colours = {step: 3 + step in anchor.anchors(step) for step in (0, 1)}
    assert (seen["seen"][0] == seen["seen"][1]) == (colours[0] == colours[1])
    assert int(seen["value"]) >= 2, "playing moves it on"
    assert seen["output"] == seen["value"]
