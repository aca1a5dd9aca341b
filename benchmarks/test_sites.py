"""Single sites under pytest-benchmark: ``pytest benchmarks --benchmark-group-by=param:site``; ``lvsa bench`` sets them side by side."""

from __future__ import annotations

import pytest
import torch

from lvsa_compile.bench.attention_sites import MAIN, VARIANTS, Measured
from lvsa_compile.selection.select import lowerings

SITES = {f"{s.frames}x{s.tokens_per_frame}x{s.heads}-{s.dtype}-{s.kind}".replace(" ", "-"): s for s in (*MAIN, *VARIANTS[1:])}
OURS = [f"lvsa {lowering.name}" for lowering in lowerings() if lowering.name != "reference" and lowering.op == "attention"]


@pytest.mark.parametrize("contender", ["dense SDPA", "FlexAttention", "gather per frame", *OURS])
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_site(benchmark, site: str, contender: str) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    measured = Measured(SITES[site], device)
    if contender.startswith("lvsa "):
        lowering = next(lowering for lowering in lowerings() if f"lvsa {lowering.name}" == contender)
        refusal = lowering.refusal(measured.call)
        if refusal:
            pytest.skip(refusal)
        run = measured.lowered(lowering.name)
    else:
        run = {"dense SDPA": measured.dense, "gather per frame": measured.gathered}.get(contender) or measured.flex

    def once() -> None:
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize()

    benchmark.pedantic(once, rounds=5, warmup_rounds=1)
