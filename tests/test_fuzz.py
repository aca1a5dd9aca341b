"""Random video DiTs against ground truth by construction: not one wrong rewrite, and a dense video site needs a true reason.

``make test`` draws a small fixed sample; ``make fuzz`` draws FUZZ=500 new ones.
"""

from __future__ import annotations

import collections
import dataclasses
import os

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from random_dits import PATTERN, RandomDiT, Recipe, inputs_of, recipes
from test_watching import by_forward, in_place
from tiny_models import randomise

import lvsa_compile
from lvsa_compile.watching.watch import Forward

MODELS = int(os.environ.get("FUZZ", "0"))
seen: collections.Counter[str] = collections.Counter()
SPARSE_OR_WHY = {  # reasons a site over the target video may be left dense for, and when they are true
    "no_grid": lambda r: r.packed and (r.graphs == "breaks" or not shows_grid(r)),
    "first_forward": lambda r: r.packed and not shows_grid(r),
    "graph_break": lambda r: r.packed and r.graphs == "breaks",
    "not_video": lambda r: r.packed and not shows_grid(r),
    "layout_unknown": lambda r: r.packed and r.decoy == "flipped rows",
    "form_not_rewritten": lambda r: (r.mask == "outer product" or r.write != "no") and r.form in ("matmul", "einsum", "bmm", "baddbmm"),
    "mask_not_expressible": lambda r: r.mask != "none" and r.write != "no",
}


def shows_grid(recipe: Recipe) -> bool:
    """Whether anything in a packed model tells its grid."""
    rope = recipe.rope != "none" and _is_wide(recipe) and recipe.form != "multihead"
    counts = rope and recipe.rope != "input" and recipe.latent != "packed coordinates"
    return recipe.latent == "packed ints" or counts or (rope and recipe.latent == "packed coordinates")


def _is_wide(recipe: Recipe) -> bool:
    return 12 // recipe.heads >= 2


def flat(output) -> torch.Tensor:
    return torch.cat([t.flatten() for t in (output if isinstance(output, list) else [output])])


def check(recipe: Recipe) -> None:
    model, compiled, others = started(recipe)
    inputs = inputs_of(recipe)
    for step in range(2):
        forward = (inputs[0], inputs[1] - 50 * step, *inputs[2:])
        with surroundings(recipe):
            for _ in range(2 if others and not step else 0):  # what only the outputs show is known from the third forward on
                compiled(*inputs)
            if not step:
                lvsa_compile.reset()
            output = flat(compiled(*forward))
            assert others or len(lvsa_compile.reports()) == 1
            compare(recipe, model, forward, step, output, lvsa_compile.reports()[-1].sites)


def check_sizes(recipe: Recipe, dynamic: bool | None) -> None:
    """Three sizes of the video and two lengths of the text, one after the other, with one compiled model."""
    recipe = recipe if recipe.graphs == "whole" else dataclasses.replace(recipe, blocks=1)  # all attention is in one graph
    model, compiled, others = started(recipe, dynamic=dynamic)
    frames, rows, columns = recipe.grid
    with torch._dynamo.config.patch(recompile_limit=64):
        for grid, words in ((recipe.grid, 5), ((frames + 1, rows + 1, columns), 5), ((frames, columns + 1, rows), 8), (recipe.grid, 8)):
            inputs = inputs_of(dataclasses.replace(recipe, grid=grid), words)
            with surroundings(recipe):
                for _ in range(2 if others else 0):
                    compiled(*inputs)
                lvsa_compile.reset()
                for report in lvsa_compile.reports():
                    report.receipt(clear=True)
                output = flat(compiled(*inputs))
                graphs = [graph for report in lvsa_compile.reports() for graph in report.graphs if graph.sites]
                (ran,) = [graph for graph in graphs if graph.calls.read()[0]]
                compare(recipe, model, inputs, 0, output, ran.sites, f"{grid}, {words} words, dynamic={dynamic}")


def started(recipe: Recipe, **settings):
    """A model of a recipe, the same compiled, and whether by blocks that something else compiled."""
    torch._dynamo.reset()
    model, options = randomise(RandomDiT(recipe), recipe.seed), {**PATTERN, "inner": "eager"}
    by_others = {"in place": in_place, "by forward": by_forward}.get(recipe.graphs.partition(",")[0])
    if recipe.graphs == "regional" and recipe.blocks > 1:
        compiled = lvsa_compile.compile_repeated_blocks(model, options=options, **settings)
    elif by_others is not None:
        compiled = by_others(model, backend="lvsa", options=options, **settings)
    else:  # what comes across a break without following the code there, which test_watching has
        compiled = torch.compile(lvsa_compile.undo(model), backend="lvsa", options=options, **settings)
    return model, compiled, by_others is not None


def surroundings(recipe: Recipe):
    return torch.inference_mode() if "inference" in recipe.graphs else torch.no_grad()


def compare(recipe: Recipe, model: RandomDiT, inputs: tuple, step: int, output: torch.Tensor, sites, where: str = "") -> None:
    """Compares an output with that of the masked model, and every decision with the truth."""
    model.sparse, model.step = [site.decision == "sparse" for site in sites], step
    with torch.compiler.set_stance("force_eager"):
        answer = flat(model(*inputs))
    truths, model.sparse = model.calls, None
    assert len(truths) == len(sites), (len(truths), sites)
    for truth, site in zip(truths, sites, strict=True):
        assert truth.layout is not None or site.decision != "sparse", f"rewritten though no video: {site} {where}"
        if truth.layout is not None and site.decision != "sparse":
            seen[f"dense: {site.reason}"] += 1
            why = SPARSE_OR_WHY.get(site.reason, lambda r: False)
            assert why(recipe), f"left dense for no true reason: {site} {where}"
        else:
            seen[site.decision if truth.layout else f"decoy: {site.reason}"] += 1
    error = float((output - answer).abs().max()) / float(answer.abs().max())
    assert error < 3e-4, f"wrong at step {step}: {error:.1e} {[str(site) for site in sites]} {where}"


IN_EAGER_CODE = {
    **SPARSE_OR_WHY,
    "mask_not_expressible": lambda r: r.mask in ("outer product", "frame causal") or r.write != "no",  # no mask is taken apart
    "layout_unknown": lambda r: r.rope == "in place" or r.write != "no",  # views of views that nobody holds any more
}


class Decisions:
    """Which calls of attention were computed sparse, in order."""

    def __init__(self, monkeypatch) -> None:
        attend = Forward._attend

        def noting(forward, func, args, kwargs):
            found = attend(forward, func, args, kwargs)
            self.sparse.append(found is not None)
            return found

        self.sparse: list[bool] = []
        monkeypatch.setattr(Forward, "_attend", noting)


def check_enabled(recipe: Recipe) -> None:
    """Nothing is compiled: each call of attention over the video is sparse where it runs, or dense for a true reason."""
    torch._dynamo.reset()
    recipe = dataclasses.replace(recipe, form=recipe.form if recipe.form.startswith("sdpa") else "sdpa")
    alone, model = (randomise(RandomDiT(recipe), recipe.seed) for _ in range(2))
    inputs = inputs_of(recipe)
    lvsa_compile.enable(model, **PATTERN)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode() if "inference" in recipe.graphs else torch.no_grad():
        decisions = Decisions(patch)
        for _ in range(2):  # what only the outputs show is known from the third forward on
            model(*inputs)
        lvsa_compile.reset()
        for step in range(2):
            arguments = (inputs[0], inputs[1] - 50 * step, *inputs[2:])
            decisions.sparse.clear()
            output = flat(model(*arguments))
            alone.sparse, alone.step = list(decisions.sparse), step
            answer = flat(alone(*arguments))
            assert len(alone.calls) == len(decisions.sparse)
            reasons = {site.reason for report in lvsa_compile.reports() for site in report.sites if site.decision != "sparse"}
            for truth, sparse in zip(alone.calls, decisions.sparse, strict=True):
                assert truth.layout is not None or not sparse, "rewritten though no video"
                if truth.layout is not None and not sparse:
                    assert any(IN_EAGER_CODE.get(reason, lambda r: False)(recipe) for reason in reasons), reasons
                seen[f"eager: {'sparse' if sparse else 'dense' if truth.layout else 'decoy'}"] += 1
            assert float((output - answer).abs().max() / answer.abs().max()) < 3e-4, step


PIECES = Recipe(
    latent="packed ints", patch="conv3d", projection="separate", form="matmul", rope="table", order="text video", mask="outer product",
    write="no", decoy="none", output="reshape", grid=(6, 2, 2), batch=1, heads=1, blocks=1, modulation="none", graphs="breaks", seed=0,
)  # fmt: skip
"""Its second graph hands on a packed video whose counts a third graph must see, and holds no attention."""

COUNTS = dataclasses.replace(
    PIECES, latent="packed counts", form="sdpa", order="video", mask="none", graphs="by forward", rope="table", heads=2
)
"""Its blocks get the grid from eager code by a rope table of two axes, and by nothing else."""


@example(COUNTS)
@example(PIECES)
@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes)
def test_a_sample_of_random_models(recipe):
    check(recipe)


@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes)
def test_a_sample_of_random_models_in_eager_code(recipe):
    check_enabled(recipe)


@pytest.mark.skipif(not MODELS, reason="make fuzz runs it")
@settings(max_examples=max(MODELS, 1), deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(recipes)
def test_random_models_in_eager_code(recipe):
    check_enabled(recipe)


MASK_BY_ANOTHER_NAME = dataclasses.replace(
    PIECES, latent="BFCHW", patch="linear", form="baddbmm", order="video", mask="frame causal", output="einops", grid=(6, 3, 2), seed=1
)
"""At the second size the scores and their mask, made from the grid, have sizes in other symbols, which only guards say are equal."""


@example(MASK_BY_ANOTHER_NAME, None)
@settings(max_examples=3, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes, st.sampled_from([None, True]))
@pytest.mark.slow
def test_a_sample_of_random_models_of_several_sizes(recipe, dynamic):
    check_sizes(recipe, dynamic)


@pytest.mark.skipif(not MODELS, reason="make fuzz runs it")
@settings(max_examples=max(MODELS, 1), deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(recipes)
def test_random_models(recipe):
    check(recipe)


@pytest.mark.skipif(not MODELS, reason="make fuzz runs it")
@settings(max_examples=max(MODELS, 1), deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(recipes, st.sampled_from([None, True]))
def test_random_models_of_several_sizes(recipe, dynamic):
    check_sizes(recipe, dynamic)


@pytest.fixture(scope="module", autouse=True)
def tell():
    yield
    if MODELS:
        print("\n" + "\n".join(f"{count:6d}  {what}" for what, count in seen.most_common()))
