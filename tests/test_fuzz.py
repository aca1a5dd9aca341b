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
    torch._dynamo.reset()
    model, inputs = randomise(RandomDiT(recipe), recipe.seed), inputs_of(recipe)
    options = {**PATTERN, "inner": "eager"}
    by_others = {"in place": in_place, "by forward": by_forward}.get(recipe.graphs.partition(",")[0])
    if recipe.graphs == "regional" and recipe.blocks > 1:
        compiled = lvsa_compile.compile_repeated_blocks(model, options=options)
    elif by_others is not None:
        compiled = by_others(model, backend="lvsa", options=options)
    else:  # what comes across a break without following the code there, which test_watching has
        compiled = torch.compile(lvsa_compile.undo(model), backend="lvsa", options=options)
    with torch.inference_mode() if "inference" in recipe.graphs else torch.no_grad():
        for _ in range(2 if by_others is not None else 0):  # what only the outputs show is known from the third forward on
            compiled(*inputs)
        lvsa_compile.reset()
        for step in range(2):
            arguments = (inputs[0], inputs[1] - 50 * step, *inputs[2:])
            output = flat(compiled(*arguments))
            report = lvsa_compile.reports()[-1]
            assert by_others is not None or len(lvsa_compile.reports()) == 1
            sites = report.sites
            model.sparse, model.step = [site.decision == "sparse" for site in sites], step
            with torch.compiler.set_stance("force_eager"):
                answer = flat(model(*arguments))
            truths, model.sparse = model.calls, None
            assert len(truths) == len(sites), (len(truths), sites)
            for truth, site in zip(truths, sites, strict=True):
                assert truth.layout is not None or site.decision != "sparse", f"rewritten though no video: {site}"
                if truth.layout is not None and site.decision != "sparse":
                    seen[f"dense: {site.reason}"] += 1
                    why = SPARSE_OR_WHY.get(site.reason, lambda r: False)
                    assert why(recipe), f"left dense for no true reason: {site}"
                else:
                    seen[site.decision if truth.layout else f"decoy: {site.reason}"] += 1
            error = float((output - answer).abs().max()) / float(answer.abs().max())
            assert error < 3e-4, f"wrong at step {step}: {error:.1e} {[str(site) for site in sites]}"


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


@pytest.mark.skipif(not MODELS, reason="make fuzz runs it")
@settings(max_examples=max(MODELS, 1), deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(recipes)
def test_random_models(recipe):
    check(recipe)


@pytest.fixture(scope="module", autouse=True)
def tell():
    yield
    if MODELS:
        print("\n" + "\n".join(f"{count:6d}  {what}" for what, count in seen.most_common()))
