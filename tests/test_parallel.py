"""Models spread over several processes (gloo, on the CPU), each compared with one process by itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

pytestmark = pytest.mark.process

HERE = Path(__file__).parent
NAMES = {
    2: [
        "ulysses-whole",
        "ulysses-regional",
        "ring-regional",
        "tensor parallel-whole",
        "tensor parallel-regional",
        "fully sharded-whole",
        "fully sharded-regional",
    ],
    4: ["ulysses-whole", "ulysses-regional", "replicated and sharded-regional"],
}


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """What one group of processes gave, by their number; it serves all workers of the test run."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def of(world: int) -> dict[str, dict]:
        file = shared / f"parallel-{world}.json"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                file.write_text(json.dumps(run_processes(world)))
        return json.loads(file.read_text())

    return of


def run_processes(world: int) -> dict[str, dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    commands = [[sys.executable, str(HERE / "parallel_runs.py"), str(rank), str(world), port, *NAMES[world]] for rank in range(world)]
    processes = [subprocess.Popen(c, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        output, error = processes[0].communicate(timeout=400)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 0, error[-3000:]
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize(
    ("world", "name"),
    [
        pytest.param(world, name, marks=[pytest.mark.slow] * (world > 2))
        for world, names in NAMES.items()
        for name in names
        if not name.startswith("ring") and name != "fully sharded-whole"
    ],
)
def test_sparse_and_equal_to_one_process(results, world, name):
    result = results(world)[name]
    assert result["from sparse"] < 1e-5
    assert result["from dense"] > 1e-2
    assert result["recompiled"] == 0
    assert any(decision == "sparse" for _, decision, _, _ in result["sites"])
    assert {reason for _, _, reason, _ in result["sites"]} <= {"", "cross_attention"}


def test_ring_attention_is_dense_and_says_what_is_sparse(results):
    result = results(2)["ring-regional"]
    assert result["from dense"] < 1e-5
    _, decision, reason, remedy = result["sites"][0]
    assert (decision, reason) == ("dense", "frames_not_contiguous")
    assert "Ulysses shows it the whole: ContextParallelConfig(ulysses_degree=...)" in remedy


def test_fully_sharded_as_a_whole_is_sparse_from_the_second_forward_on(results):
    """The hooks of FSDP run between graphs, in code that Dynamo leaves alone."""
    result = results(2)["fully sharded-whole"]
    assert result["from sparse"] < 1e-5
    assert result["from dense"] > 1e-2
    assert {reason for _, _, reason, _ in result["sites"]} <= {"", "cross_attention", "graph_break"}
