"""How a lowering is chosen: what it says of itself, a trial, an estimate or a measurement."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from plans import attention_call
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise

import lvsa_compile
from lvsa_compile import FramePattern, compat
from lvsa_compile.errors import LoweringUnavailableError, LvsaWarning
from lvsa_compile.lowering import cpu, dense_merge
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.selection import measure as measured
from lvsa_compile.selection import rates, select
from lvsa_compile.selection import smoke_test as trial
from lvsa_compile.selection.contract import AttentionCall, Lowering

CPU = torch.device("cpu")
LOWERINGS = {lowering.name: lowering for lowering in select.lowerings()}


def call_of(**more) -> AttentionCall:
    span = VideoSpan(0, 30, 12, 4)
    facts = dict(device=CPU, dtype=torch.float32, batch=1, query_heads=2, key_heads=1, head_dim=24, value_dim=24, query=span, key=span)
    return attention_call(**{**facts, "pattern": FramePattern(30), **more})


def lowering(name: str, speedup: float = 1.0, **more) -> Lowering:
    facts = dict(unavailable=lambda device: None, refuses=lambda call: None, speedup=lambda call: speedup)
    return dataclasses.replace(LOWERINGS["reference"], name=name, **{**facts, **more})


@pytest.fixture(autouse=True)
def nothing_tried_or_remembered():
    trial._smoke_test.cache_clear()
    measured._remembered.clear()
    yield
    trial._smoke_test.cache_clear()
    measured._remembered.clear()


@pytest.mark.parametrize(("name", "dtype", "masked"), [
    ("triton", torch.float32, True), ("dense_merge", torch.float32, True), ("dense_merge", torch.bfloat16, False),
])  # fmt: skip
def test_a_trial_runs_the_lowering_and_compares(name, dtype, masked, monkeypatch):
    found = (
        dataclasses.replace(LOWERINGS[name], smoke_test_tokens=(9, 12)) if name == "triton" else LOWERINGS[name]
    )  # its interpreter is slow
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trial._smoke_test(found, CPU, dtype, 2, 24, masked) is None


def test_a_trial_that_fails_or_is_wrong_is_one_warning_and_a_reason():
    def broken(*args, **kwargs):
        raise RuntimeError("out of resource: shared memory\nand more")

    failing = lowering("brittle", body=broken)
    with pytest.warns(
        LvsaWarning, match="lowering 'brittle' is not used on cpu for torch.float32 and head_dim 16: its smoke test failed"
    ) as said:
        reasons = {trial._smoke_test(failing, CPU, torch.float32, 1, 16, False) for _ in range(3)}
    assert reasons == {"its smoke test failed (RuntimeError: out of resource: shared memory)"}
    assert len(said) == 1
    right = LOWERINGS["dense_merge"].body
    wrong = lowering("wrong", body=lambda *args, **kwargs: [t * 1.01 for t in right(*args, **kwargs)])
    with pytest.warns(LvsaWarning):
        assert trial._smoke_test(wrong, CPU, torch.float32, 1, 32, False) == "its smoke test gave a wrong answer (relative error 1.0e-02)"


def test_the_fastest_that_serves_is_chosen_and_the_next_where_its_trial_fails(monkeypatch):
    fast, slow = lowering("fast", 3.0), lowering("slow", 2.0)
    never = lowering("never", 9.0, refuses=lambda call: "it does not like the call")
    monkeypatch.setattr(select, "lowerings", lambda: (slow, never, fast))
    monkeypatch.setattr(select, "smoke_tested", lambda lowering, call: None)
    choice = select.select(call_of())
    assert (choice.lowering.name, choice.passed_over) == ("fast", (("never", "it does not like the call"),))
    monkeypatch.setattr(select, "smoke_tested", lambda lowering, call: "it broke" if lowering.name == "fast" else None)
    choice = select.select(call_of())
    assert (choice.lowering.name, dict(choice.passed_over)["fast"]) == ("slow", "it broke")
    with pytest.raises(LoweringUnavailableError, match="lowering 'fast' cannot be used here: fast: it broke"):
        select.select(call_of(), "fast")


@pytest.mark.parametrize(("target", "graphs", "chosen"), [
    ("cuda:80", False, "triton"), ("cuda:90", False, "dense_merge"), ("cuda:100", False, "dense_merge"), ("cuda:90", True, "triton"),
    ("cuda:89", False, "triton"), ("hip:gfx942", False, "triton"),
])  # fmt: skip
def test_what_is_expected_to_be_fastest_on_parts_that_are_not_here(monkeypatch, target, graphs, chosen):
    everything = [dataclasses.replace(x, unavailable=lambda device: None) for x in select.lowerings() if x.name != "cpu"]
    monkeypatch.setattr(select, "lowerings", lambda: everything)
    monkeypatch.setattr(select, "smoke_tested", lambda lowering, call: None)
    monkeypatch.setattr(rates, "_kind_of", lambda device: rates.nearest(target, rates.KINDS))
    call = call_of(device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=64, value_dim=64, device_only=graphs)
    choice = select.select(call)
    assert choice.lowering.name == chosen
    if graphs:
        assert dict(choice.passed_over)["dense_merge"] == "it plans on the host, which CUDA graphs leave out"


def test_measuring_takes_the_fastest_found_and_remembers_it_beside_inductors_caches(monkeypatch, tmp_path):
    monkeypatch.setattr(compat, "cache_folder", lambda name: tmp_path / name)
    fast, slow, broken = lowering("fast", 1.0), lowering("slow", 5.0), lowering("broken", 9.0)
    asked = []

    def found(lowering, call):
        asked.append(lowering.name)
        if lowering is broken:
            raise RuntimeError("no memory\nat all")
        return {"fast": 0.001, "slow": 0.002}[lowering.name]

    monkeypatch.setattr(measured, "_measure", found)
    monkeypatch.setattr(select, "lowerings", lambda: (slow, broken, fast))
    monkeypatch.setattr(select, "smoke_tested", lambda lowering, call: None)
    choice = select.select(call_of(), measure=True)
    assert (choice.lowering.name, choice.seconds) == ("fast", {"slow": 0.002, "fast": 0.001})
    assert dict(choice.passed_over) == {"broken": "measuring it failed (RuntimeError: no memory)"}
    files = [json.loads(file.read_text()) for file in sorted((tmp_path / "lvsa").iterdir())]
    assert sorted(said["seconds"] for said in files) == [0.001, 0.002]
    assert all(str(torch.__version__).split("+")[0] in said["facts"] for said in files)
    asked.clear()
    measured._remembered.clear()  # another process
    assert select.select(call_of(), measure=True).seconds == choice.seconds
    assert asked == ["broken"]
    select.select(call_of(batch=2), measure=True)
    assert asked[1:] == ["broken", "slow", "fast"]


def test_what_found_no_room_to_be_measured_may_serve_all_the_same(monkeypatch):
    monkeypatch.setattr(select, "lowerings", lambda: (lowering("meaning", 0.0), lowering("fast", 3.0), lowering("faster", 4.0)))
    monkeypatch.setattr(select, "smoke_tested", lambda lowering, call: None)
    monkeypatch.setattr(select, "seconds_of", lambda lowering, call: "measuring it failed (OutOfMemoryError: no room)")
    choice = select.select(call_of(), measure=True)
    assert (choice.lowering.name, choice.seconds) == ("faster", {})
    assert dict(choice.passed_over)["faster"] == "measuring it failed (OutOfMemoryError: no room)"
    monkeypatch.setattr(select, "seconds_of", lambda lowering, call: 0.5 if lowering.name == "fast" else "no room")
    assert select.select(call_of(), measure=True).lowering.name == "fast"


@pytest.mark.inductor
def test_when_slower_dense_goes_by_what_was_measured(monkeypatch):
    from lvsa_compile.passes import decide

    options = {**EXACT, "inner": "inductor", "mode": "max-autotune-no-cudagraphs", "when_slower": "dense"}
    monkeypatch.setattr(select, "seconds_of", lambda lowering, call: 0.5)
    for dense, expected in ((1.0, "sparse"), (0.25, "dense")):
        torch._dynamo.reset()
        monkeypatch.setattr(decide, "seconds_of_dense", lambda call, dense=dense: dense)
        with torch.no_grad():
            torch.compile(randomise(VideoDiT()), backend="lvsa", options=options)(*dit_inputs())
        site = lvsa_compile.reports()[0].sites[0]
        assert site.decision == expected
    assert site.reason == "not_faster"
    assert site.detail == "lowering 'cpu' runs, measured, at 0.50 times the speed of dense attention"


def test_dense_attention_is_measured_under_the_mask_too():
    for masked in (False, True):
        assert 0 < measured.seconds_of_dense(call_of(masked=masked)) < 10


def test_where_nothing_fast_serves_a_warning_says_why(monkeypatch):
    slow = [lowering("broken", 2.0, refuses=lambda call: "it does not like the call"), LOWERINGS["reference"]]
    monkeypatch.setattr(select, "lowerings", lambda: slow)
    with pytest.warns(LvsaWarning) as said, torch.no_grad():
        torch.compile(randomise(VideoDiT()), backend="lvsa", options=EXACT)(*dit_inputs())
    (text,) = {str(warning.message) for warning in said if "by lowering" in str(warning.message)}
    assert text == (
        "lvsa computes sparse attention of VideoDiT by lowering 'reference', right and slow, since "
        "broken: it does not like the call. options={'when_slower': 'dense'} leaves it dense."
    )


def test_where_nothing_at_all_serves_the_site_is_dense_and_says_what_each_lacks(monkeypatch):
    monkeypatch.setattr(select, "lowerings", lambda: [lowering("broken", 2.0, refuses=lambda call: "it does not like the call")])
    with pytest.warns(LvsaWarning, match="no_lowering: .*broken: it does not like the call.*Remedy: The detail says"), torch.no_grad():
        torch.compile(randomise(VideoDiT()), backend="lvsa", options=EXACT)(*dit_inputs())
    (site,) = lvsa_compile.reports()[0].sites
    assert (site.decision, site.reason) == ("dense", "no_lowering")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"facts": "other", "seconds": 1.0}', '{"seconds": "x", "facts": ""}'])
def test_a_cache_file_that_is_not_ours_is_measured_again(monkeypatch, tmp_path, text):
    monkeypatch.setattr(compat, "cache_folder", lambda name: tmp_path)
    monkeypatch.setattr(measured, "_measure", lambda lowering, call: 0.5)
    assert measured.seconds_of(lowering("one"), call_of()) == 0.5
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    measured._remembered.clear()
    assert measured.seconds_of(lowering("one"), call_of()) == 0.5
    assert json.loads(file.read_text())["seconds"] == 0.5


@pytest.mark.inductor
def test_max_autotune_measures_on_the_real_shapes_and_the_report_shows_it(monkeypatch, tmp_path):
    monkeypatch.setattr(compat, "cache_folder", lambda name: tmp_path)
    model, inputs = randomise(VideoDiT()), dit_inputs()
    with torch.no_grad():
        torch.compile(model, backend="lvsa", options={**EXACT, "inner": "inductor", "mode": "max-autotune-no-cudagraphs"})(*inputs)
        torch.compile(model, backend="lvsa", options=EXACT)(*inputs)
    measuring, plain = lvsa_compile.reports()
    assert plain.sparse_sites[0].seconds == {}
    for site in measuring.sparse_sites:
        assert set(site.seconds) == {"cpu", "dense_merge"}
        assert site.lowering == min(site.seconds, key=site.seconds.get)
        assert f"measured: {site.lowering} " in str(site)
        assert dict(site.passed_over)["flex"] == "it runs on cuda, not on cpu"
    assert measuring.to_dict()["graphs"][0]["sites"][0]["seconds"] == dict(measuring.sparse_sites[0].seconds)


def test_no_estimate_is_contradicted_by_what_was_measured():
    """By more than half as much again, on any kind of CPU, in any dtype, by any lowering meant for speed."""
    kinds = json.loads((Path(__file__).parent.parent / "benchmarks/results/cpu_rates.json").read_text())["kinds"]
    assert kinds.keys() == {"plain", "avx2", "avx512", "amx"}
    for kind, measured_there in kinds.items():
        threads, rows = measured_there["machine"]["threads"], [row for row in measured_there["rows"] if row["lowering"] != "reference"]
        assert {row["lowering"] for row in rows} == {"cpu", "dense_merge"}
        for row in rows:
            pattern = FramePattern(row["frames"], reference_frames=row["reference"])
            flops = 4.0 * row["heads"] * (row["frames"] * row["tokens"]) ** 2 * row["head_dim"]
            parts = 2 * (pattern.interval or 1) if row["lowering"] == "dense_merge" else 1
            here = kind, row["dtype"]
            own = {"cpu": cpu.CPU_RATES, "dense_merge": dense_merge.CPU_RATES}[row["lowering"]]
            expected = rates.cpu_speedup(rates.CPU[here], own[here], flops, pattern.density, parts, threads)
            found = row["dense_seconds"] / row["seconds"]
            assert 1 / 1.5 < expected / found < 1.5, (kind, row, expected, found)
