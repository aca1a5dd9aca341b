"""``lvsa bisect``: the first attention site whose rewrite moves a model's output by more than a tolerance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.backend import lvsa
from lvsa_compile.errors import BisectError
from lvsa_compile.report.report import Report
from lvsa_compile.report.store import reports


@dataclass(frozen=True)
class Bisection:
    """What was found: ``site`` is the first culprit's name, "" where there is none.

    ``error`` is the largest change of the output with the sites up to it sparse, relative to the largest value, ``error_before`` that
    with the sites before it; without a culprit ``error`` is that of all ``sites``.
    """

    sites: int
    number: int
    site: str
    source: str
    error: float
    error_before: float
    runs: int


def bisect(
    model: Callable[..., Any],
    inputs: Mapping[str, Any],
    tolerance: float,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Bisection:
    """Compiles the model with none, all and some of its sites sparse, halving, until one site is left.

    The sites are taken in the model's order (``max_sites``).  It is assumed that the output has moved beyond the tolerance with more
    sites if it has with fewer; what is returned was measured on both sides of the site.

    Args:
        model: a module or function.
        inputs: its keyword arguments for one forward.
        tolerance: the largest change to accept, relative to the largest value of the output.
        options: of the backend; ``max_sites`` is what is varied.
        say: is told of each run.

    Raises:
        BisectError: the tolerance is not positive, ``max_sites`` is given, or no site is sparse.
    """
    if not tolerance > 0.0:
        raise BisectError("tolerance", tolerance, "not a positive number", "Give how much the output may move, such as 0.05.")
    if options and "max_sites" in options:
        raise BisectError("max_sites", options["max_sites"], "this is what bisecting varies", "Leave it out.")
    found: dict[int, float] = {}

    def run(sites: int | None) -> tuple[Tensor, Report]:
        given = {**(options or {}), **({} if sites is None else {"max_sites": sites})}
        compiled = compat.compiled_apart(getattr(model, "_orig_mod", model), backend=lvsa, options=given)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            outputs = [leaf for leaf in compat.tree_leaves(compiled(**inputs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return torch.cat([output.double().flatten().cpu() for output in outputs]), reports()[-1]

    everything, report = run(None)
    names = [site for site in report.sites if site.decision == "sparse"]
    if not names:
        raise BisectError("model", report.model or "the model", "no site of it is sparse", "See lvsa explain for why.")
    dense, _ = run(0)

    def moved(sites: int) -> float:
        if sites not in found:
            output = everything if sites == len(names) else run(sites)[0]
            found[sites] = float((output - dense).abs().max() / dense.abs().max())
            say(f"{sites} of {len(names)} sites sparse: the output moves by {found[sites]:.2e}")
        return found[sites]

    found[0] = 0.0
    low, high = 0, len(names)
    if moved(high) <= tolerance:
        return Bisection(len(names), 0, "", "", moved(high), 0.0, 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if moved(middle) <= tolerance else (low, middle)
    culprit = names[high - 1]
    return Bisection(len(names), high, culprit.name, culprit.source, moved(high), moved(low), len(found))
