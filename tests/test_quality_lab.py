"""The quality lab: its physics against the scenes it draws, its methods against their definitions, its page against its results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing.pool
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors import safe_open

pytestmark = pytest.mark.lab

ROOT = Path(__file__).parent.parent
LAB = ROOT / "examples/quality_lab"
sys.path.insert(0, str(LAB))

import methods  # noqa: E402
import model  # noqa: E402
import run  # noqa: E402
import scenes  # noqa: E402
import summary  # noqa: E402
import train  # noqa: E402
from physics import physics_of  # noqa: E402

from lvsa_compile.options import parse_options  # noqa: E402

WRITER = runpy.run_path(str(ROOT / "docs/write_quality.py"))
RESULTS = json.loads((LAB / "results.json").read_text())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(2, 120))
def test_scenes_keep_to_the_box_and_lose_nothing(seed, frames):
    scene = scenes.random_scene(np.random.default_rng(seed))
    centres = scene.centres(frames)
    assert centres.min() >= scene.radius - 1e-9
    assert centres.max() <= scenes.SIZE - scene.radius + 1e-9
    long = scene.centres(4000)
    steps = np.abs(np.diff(long, axis=0))
    assert np.median(steps[:, 0]) == pytest.approx(abs(scene.velocity[0]), abs=1e-6)
    if scene.motion == "falls":
        bend = np.diff(long[:, 1], 2)
        assert np.median(bend) == pytest.approx(scenes.GRAVITY, abs=1e-6)
        assert np.ptp(long[-1000:, 1]) == pytest.approx(scene.drop, abs=0.3)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_physics_is_that_of_the_scene(seed):
    scene = scenes.random_scene(np.random.default_rng(seed))
    centres = scene.centres(48)
    found = physics_of(scene.frames(48), scene.colour)
    steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    assert found.speed == pytest.approx(steps.mean(), abs=0.05)
    assert found.late_speed == pytest.approx(steps[-11:].mean(), abs=0.08)
    assert found.frozen <= (steps < 0.4).mean()
    assert (found.jumps, found.seen, found.alone, found.coloured) == (0, 1, 1, 1)
    assert found.size < 0.03
    gained = np.linalg.norm(centres[4:] - centres[:-4], axis=1) / 4
    assert found.net_speed == pytest.approx(gained.mean(), abs=0.05)
    assert found.acceleration == pytest.approx(np.median(np.linalg.norm(np.diff(centres, n=2, axis=0), axis=1)), abs=0.2)


def test_what_goes_wrong_is_counted():
    scene = scenes.random_scene(np.random.default_rng(3), ("red", "disc", "floats"))
    good = scene.frames(40)
    frozen = good[[min(place, 19) for place in range(40)]]
    assert physics_of(frozen, "red").frozen == pytest.approx(20 / 39, abs=0.03)
    assert physics_of(frozen, "red").late_speed == 0
    other = dataclasses.replace(scene, position=(13.0, 3.0)).frames(40)
    assert 0 < physics_of(np.where(np.arange(40)[:, None, None, None] % 10 == 0, other, good), "red").jumps < 0.3
    assert physics_of(good, "blue").coloured == 0
    double = np.maximum(good, np.roll(good, 8, 3))
    assert physics_of(double, "red").alone < 0.6
    assert physics_of(good * np.linspace(1, 0.5, 40, dtype=np.float32)[:, None, None, None], "red").size > 0.15
    gone = physics_of(np.zeros_like(good), "red")
    assert (gone.speed, gone.net_speed, gone.frozen, gone.jumps, gone.seen, gone.alone) == (0, 0, 1, 0, 0, 0)
    blinking = good.copy()
    blinking[::4] = 0
    assert physics_of(blinking, "red").seen == pytest.approx(0.75)
    assert physics_of(blinking, "red").jumps == 0
    trembling = np.stack([good[20 + place % 2] for place in range(40)])
    assert physics_of(trembling, "red").speed > 0.8
    assert physics_of(trembling, "red").net_speed < 0.05
    assert physics_of(trembling, "red").acceleration > 3 * physics_of(good, "red").acceleration
    assert physics_of(scene.frames(96), "red").turns > 1


def small_wan():
    torch.manual_seed(0)
    wan = model.new_model()
    with torch.no_grad():
        for name, parameter in wan.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=torch.Generator().manual_seed(len(name)))
    return wan.eval()


def outputs(wan, frames):
    text = scenes.text_of([("red", "disc", "floats")])
    with torch.no_grad():
        return wan(model.noise_of([1], frames), torch.tensor([500.0]), text, return_dict=False)[0]


def test_ultravico_is_its_definition():
    """Against a plain loop over queries and keys."""
    attn = small_wan().blocks[0].attn1
    frames, width = 18, 128
    tokens = frames * methods.TOKENS_PER_FRAME
    hidden = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0))
    angles = torch.zeros(1, tokens, 1, 32)
    turn = (torch.ones_like(angles), angles)
    with torch.no_grad():
        attn.set_processor(methods.UltraViCo())
        found = attn(hidden, None, None, turn)[0]
        query, key, value = attn.norm_q(attn.to_q(hidden))[0], attn.norm_k(attn.to_k(hidden))[0], attn.to_v(hidden)[0]
        horizon = model.HORIZON * methods.TOKENS_PER_FRAME
        for place in (3, 20, 200, tokens - 1):
            parts = []
            for head in range(4):
                at = slice(32 * head, 32 * head + 32)
                scores = []
                for other in range(tokens):
                    score = float(query[place, at] @ key[other, at]) / math.sqrt(32)
                    if abs(place - other) > horizon / 2 and score >= 0:
                        score *= 0.9
                    if place < methods.TOKENS_PER_FRAME and other >= horizon:
                        score = -1e4
                    scores.append(score)
                parts.append(torch.tensor(scores).softmax(0) @ value[:, at])
            assert torch.allclose(found[place], attn.to_out[0](torch.cat(parts)), atol=1e-4)


def test_undampened_ultravico_is_attention():
    wan, frames = small_wan(), model.HORIZON
    plain = outputs(wan, frames)
    for block in wan.blocks:
        block.attn1.set_processor(methods.UltraViCo(factor=1.0))
    assert torch.allclose(outputs(wan, frames), plain, atol=1e-4)


def test_riflex_changes_one_frequency_and_nothing_at_the_horizon():
    plain, same, longer = small_wan(), small_wan(), small_wan()
    methods.riflex(same, model.HORIZON)
    assert torch.allclose(same.rope.freqs_cos, plain.rope.freqs_cos, atol=1e-6)
    methods.riflex(longer, 64)
    differs = (longer.rope.freqs_cos - plain.rope.freqs_cos).abs().amax(0) > 1e-4
    assert differs.nonzero().flatten().tolist() == [0, 1]  # the period of 2π is nearer to 16 than 29
    assert torch.allclose(longer.rope.freqs_cos[:, 0], torch.cos(0.9 * 2 * math.pi / 64 * torch.arange(256.0)), atol=1e-5)
    assert torch.equal(longer.rope.freqs_cos[:, 2:], plain.rope.freqs_cos[:, 2:])
    following = small_wan()
    methods.riflex(following, 64, further=1)
    differs = (following.rope.freqs_cos - plain.rope.freqs_cos).abs().amax(0) > 1e-4
    assert differs.nonzero().flatten().tolist() == [2, 3]


def test_every_way_attends_to_as_many_frames():
    for method in (*methods.METHODS, *methods.TRADE):
        if method.sparse and method.name != "lvsa unexpanded":
            for frames in (32, 64, 96):
                pattern = parse_options(method.options_for(frames)).chosen_policy.pattern(frames, methods.BUDGET)
                counts = [len(pattern.attended(frame, phase)) for frame in range(frames) for phase in range(pattern.phases)]
                assert methods.BUDGET - 2 <= np.mean(counts) <= methods.BUDGET + 3, (method.name, frames, np.mean(counts))
                assert method.interval(frames) == (pattern.interval or None)


def test_training_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    monkeypatch.setattr(train, "BATCH", 2)
    train.train(tmp_path / "whole.safetensors", 0, 4, False, 100)
    calls = {"batches": 0}
    batch_of = train.batch_of

    def interrupted(seed, step):
        calls["batches"] += 1
        if calls["batches"] == 4:
            raise KeyboardInterrupt
        return batch_of(seed, step)

    monkeypatch.setattr(train, "batch_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path / "parts.safetensors", 0, 4, False, 100)
    assert not (tmp_path / "parts.safetensors").exists()
    with pytest.raises(SystemExit, match=r"is of another training: seed 0, 4 steps\. Remove it, or give another --out"):
        train.train(tmp_path / "parts.safetensors", 1, 4, False, 100)
    train.train(tmp_path / "parts.safetensors", 0, 4, False, 100)
    assert calls["batches"] == 4 + 2
    whole, parts = (model.load(tmp_path / f"{name}.safetensors").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not (tmp_path / "parts.state").exists()


class ThreadsForProcesses:
    """What the lab asks of a way to start processes, with threads, which start at once."""

    Pool = staticmethod(multiprocessing.pool.ThreadPool)


def test_the_lab_runs_and_keeps_its_videos(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "generate", lambda compiled, captions, noise: model.generate(compiled, captions, noise, steps=2))
    monkeypatch.setattr(run.multiprocessing, "get_context", lambda kind: ThreadsForProcesses)
    todo = [(methods.METHODS[0], 2), (methods.METHODS[1], 2)]
    found = run.run(model.CHECKPOINT, [0, 1], todo, tmp_path, "by a test")
    assert [(r["method"], r["multiple"]) for r in found["runs"]] == [("truth", 2), ("dense", 2), ("lvsa", 2)]
    truth, dense, sparse = found["runs"]
    assert (dense["density"], dense["sparse_sites"], dense["interval"]) == (1.0, 0, None)
    assert sparse["sparse_sites"] == 4
    assert 0.4 < sparse["density"] < 0.7
    assert truth["videos"][0]["frozen"] < 0.1
    assert {"speed", "vqeval_loop", "vqeval_dynamics"} <= set(sparse["videos"][1])
    for found_run in found["runs"]:
        found_run["multiple"] = 4
    console = Console(width=120, record=True)
    console.print(run.shown(found))
    speed = summary.difference(found, "lvsa", "dense", 4, "net_speed")
    assert f"{speed.value:+.3f} ({speed.low:+.3f} to {speed.high:+.3f})" in console.export_text()
    monkeypatch.setattr(run, "videos_of", lambda *_: (np.zeros((2, 1)), {"made": "anew"}))
    assert run.kept(methods.METHODS[1], 32, [0, 1], model.CHECKPOINT, tmp_path)[0].shape == (2, 32, 3, 16, 16)
    assert run.kept(methods.METHODS[1], 32, [0, 2], model.CHECKPOINT, tmp_path)[1] == {"made": "anew"}
    monkeypatch.setattr(run, "source_stamp", lambda: "another version of the package")
    assert run.kept(methods.METHODS[1], 32, [0, 1], model.CHECKPOINT, tmp_path)[1] == {"made": "anew"}


@pytest.mark.parametrize(("arguments", "text"), [
    (["--seeds", "1"], "--seeds 1: an interval needs at least 2"),
    (["--checkpoint", "nowhere"], "nowhere: there is no such file; examples/quality_lab/train.py writes one"),
])  # fmt: skip
def test_bad_arguments_are_named(arguments, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit):
        run.main()
    assert text in capsys.readouterr().err


def test_a_seed_gives_the_same_noise_in_any_batch():
    assert torch.equal(model.noise_of([5, 7], 8)[1], model.noise_of([7], 8)[0])


def test_differences_are_paired_and_their_intervals_known():
    def results(shift):
        values = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        videos = lambda some: [{"speed": value} for value in some]  # noqa: E731
        mine = [value + shift + 0.01 * place for place, value in enumerate(values)]
        return {"runs": [{"method": "a", "multiple": 4, "videos": videos(mine)}, {"method": "b", "multiple": 4, "videos": videos(values)}]}

    found = summary.difference(results(0.5), "a", "b", 4, "speed")
    assert found.value == pytest.approx(0.525)
    assert 0.5 <= found.low < found.value < found.high <= 0.55  # seed by seed, whatever the spread over seeds
    assert found.clear
    assert not summary.mean_of(results(-2.5), "a", 4, "speed").clear
    with pytest.raises(KeyError):
        summary.mean_of(results(0), "c", 4, "speed")


def test_the_page_and_its_pictures_are_what_the_results_say():
    remedy = "run python docs/write_quality.py"
    assert (ROOT / "docs/quality.md").read_text() == WRITER["page"](RESULTS), remedy
    assert (ROOT / "docs/pictures/quality_videos.svg").read_text() == WRITER["videos_picture"](RESULTS), remedy
    assert WRITER["digest"](RESULTS) in (ROOT / "docs/pictures/quality_lengths.svg").read_text(), remedy


def test_the_results_are_of_the_committed_checkpoint():
    assert RESULTS["checkpoint"] == hashlib.sha256(model.CHECKPOINT.read_bytes()).hexdigest()
    assert model.CHECKPOINT.stat().st_size < 5_000_000
    with safe_open(model.CHECKPOINT, "pt") as held:
        assert held.metadata()["made"].startswith("python examples/quality_lab/train.py --seed 0")
    assert len(RESULTS["seeds"]) >= 32


def test_what_the_page_says_follows_the_numbers():
    """With LVSA and dense attention exchanged, the page says the opposite."""
    other = {"dense": "lvsa", "lvsa": "dense"}
    turned = json.loads(json.dumps(RESULTS))
    for found in turned["runs"]:
        if found["multiple"] > 1:
            found["method"] = other.get(found["method"], found["method"])
    here, there = ("\n".join(WRITER["findings"](results)) for results in (RESULTS, turned))
    speed = summary.difference(RESULTS, "lvsa", "dense", 4, "net_speed").value
    assert f"At 4×, LVSA minus dense attention: net speed {speed:+.2f}" in here
    assert f"At 4×, LVSA minus dense attention: net speed {-speed:+.2f}" in there
    fixed = json.loads(json.dumps(RESULTS))
    for found in fixed["runs"]:
        if found["method"] == "lvsa fixed":
            found["videos"] = next(r["videos"] for r in RESULTS["runs"] if (r["method"], r["multiple"]) == ("lvsa", found["multiple"]))
    assert "Anchors that rotate, beside anchors that stay: no clear difference." in WRITER["findings"](fixed)
    fixed["checkpoint"] = "of another"
    with pytest.raises(ValueError, match=r"is of other weights than shapes\.safetensors"):
        WRITER["page"](fixed)


def test_what_the_page_says_in_words_holds():
    """Each sentence of docs/quality.md that no number stands beside."""
    longer, all_of_them = (3, 4, 6), (2, 3, 4, 6)

    def less(method, other, measure, multiples):
        return all(summary.difference(RESULTS, method, other, multiple, measure).high < 0 for multiple in multiples)

    def mean(method, multiple, measure):
        return summary.mean_of(RESULTS, method, multiple, measure)

    horizon = {name: mean("dense", 1, name) for name in ("net_speed", "acceleration", "jumps")}
    assert less("dense", "lvsa", "net_speed", longer)
    assert less("lvsa", "dense", "frozen", longer)
    density = {found["multiple"]: found["density"] for found in RESULTS["runs"] if found["method"] == "lvsa"}
    assert (round(density[3], 2), round(density[6], 2)) == (0.37, 0.18)
    assert all(mean("lvsa", n, "net_speed").high < horizon["net_speed"].low for n in longer)
    assert less("dense", "lvsa", "acceleration", longer)
    assert less("dense", "lvsa", "jumps", (4, 6))
    assert all(mean("lvsa", n, name).value < horizon[name].value for n in longer for name in ("acceleration", "jumps"))
    assert less("truth", "lvsa", "turns", longer)
    assert less("lvsa", "window only", "net_speed", longer)
    assert less("lvsa", "window only", "jumps", longer)
    assert less("dense", "anchors only", "frozen", longer)
    for better in ("window 1", "window 6"):
        assert less("lvsa", better, "net_speed", (4, 6))
    assert less("lvsa", "lvsa fixed", "acceleration", all_of_them)
    assert less("lvsa", "lvsa fixed", "jumps", (4, 6))
    assert less("lvsa", "lvsa fixed", "net_speed", (6,))
    assert less("lvsa fixed", "lvsa", "alone", (6,))
    assert less("lvsa fixed", "lvsa", "coloured", (6,))
    for measure in ("net_speed", "frozen", "jumps"):
        assert all(abs(summary.difference(RESULTS, "lvsa", "lvsa unexpanded", n, measure).value) < 0.015 for n in all_of_them)
    assert not any(summary.difference(RESULTS, "ultravico", "lvsa", n, "net_speed").clear for n in (2, 3))
    assert less("ultravico", "lvsa", "net_speed", (4, 6))
    assert less("ultravico", "lvsa", "jumps", (4, 6))
    for way in ("riflex", "riflex, next"):
        assert less(way, "dense", "net_speed", all_of_them)
    assert horizon["net_speed"].high < mean("truth", 1, "net_speed").low
    assert horizon["acceleration"].low > 5 * mean("truth", 1, "acceleration").high
    assert horizon["jumps"].low > 0.01
    assert less("dense", "lvsa", "vqeval_loop", longer)
    assert less("truth", "lvsa", "vqeval_loop", longer)
    frozen = {found["method"]: mean(found["method"], 4, "frozen").value for found in RESULTS["runs"] if found["multiple"] == 4}
    loops = sorted((mean(name, 4, "vqeval_loop").value, name) for name in frozen)
    assert max(frozen, key=frozen.get) == "riflex, next"
    assert "riflex, next" in [name for _, name in loops[-4:]]


def test_another_training_says_the_same_where_the_page_says_so():
    def sign(results, method, other, multiple, measure):
        mean = summary.difference(results, method, other, multiple, measure)
        return (mean.value > 0) - (mean.value < 0), mean.clear

    again = RESULTS["again"]
    assert again["checkpoint"] != RESULTS["checkpoint"]
    assert again["seeds"] == RESULTS["seeds"]
    for multiple in (4, 6):
        for measure in ("net_speed", "frozen", "jumps"):
            assert sign(again, "lvsa", "dense", multiple, measure) == sign(RESULTS, "lvsa", "dense", multiple, measure)
            for method in ("lvsa fixed", "window only"):
                (way, clear), (here, sure) = (sign(results, method, "lvsa", multiple, measure) for results in (again, RESULTS))
                assert way == here or not (clear and sure), (method, multiple, measure)
    for measure in ("alone", "coloured"):
        assert sign(again, "lvsa", "lvsa fixed", 6, measure) == sign(RESULTS, "lvsa", "lvsa fixed", 6, measure) == (1, True)


def test_the_readmes_figures_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    for method, multiple in (("truth", 4), ("dense", 4), ("lvsa", 4), ("window only", 4), ("dense", 1)):
        speed, frozen, jumps = (summary.mean_of(RESULTS, method, multiple, name).value for name in ("net_speed", "frozen", "jumps"))
        name = {"lvsa": "LVSA", "window only": "a window alone"}.get(method, method) + (", at the horizon" if multiple == 1 else "")
        assert f"| {name} | {speed:.2f} | {100 * frozen:.1f} % | {100 * jumps:.1f} % |" in text, (name, speed, frozen, jumps)
