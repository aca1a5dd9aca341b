"""torch's own caches: a second process hits them, still rotates, and another version of this package misses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import lvsa_compile.backend as backend
import oracle
from tiny_models import PATTERN, VideoDiT, dit_inputs, randomise, timesteps
import lvsa_compile
if len(sys.argv) > 2:
    backend.source_stamp = lambda: sys.argv[2]
model, (latents, _, text) = randomise(VideoDiT()), dit_inputs()
right = []
with torch.no_grad():
    compiled = torch.compile(model, backend="lvsa", options=PATTERN)
    for step in range(4):
        inputs = latents, torch.tensor([timesteps(8)[step]]), text
        with oracle.MaskedAttention(oracle.token_mask(9, 12, step, reference=4, window=1)):
            answer = model(*inputs)
        right.append(bool((compiled(*inputs) - answer).abs().max() < 1e-4 * answer.abs().max()))
counters = torch._dynamo.utils.counters
print(json.dumps({"right": right, "sparse": len(lvsa_compile.reports()[0].sparse_sites),
                  "autograd": dict(counters["aot_autograd"]), "fxgraph": dict(counters["inductor"])}))
"""


def run(cache: Path, *arguments: str) -> dict:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.process
@pytest.mark.inductor
@pytest.mark.slow
def test_a_second_process_hits_the_cache_and_another_version_does_not(tmp_path):
    first, second, other = run(tmp_path), run(tmp_path), run(tmp_path, "another version")
    for found in (first, second, other):
        assert found["right"] == [True] * 4
        assert found["sparse"] == 1
    assert second["autograd"].get("autograd_cache_hit") == 1, second
    assert "autograd_cache_hit" not in other["autograd"], other
    assert "autograd_cache_hit" not in first["autograd"], first
