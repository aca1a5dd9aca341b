from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch may do: kernels run on the CPU, program by program
os.environ["TORCH_DYNAMO_RUN_GC_AFTER_COMPILE"] = "0"  # looking for garbage after each compile would take a tenth of the time
os.environ.pop("LVSA_OPTIONS", None)  # tests state the options they mean

import gc

import pytest
import torch
import torch._dynamo
from hypothesis import settings

from lvsa_compile import registry
from lvsa_compile.selection.cpu_kind import KINDS, VARIABLE, cpu_kind

torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # it flushes the CPU's caches at each compile, only to tell a time
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_finish(session):
    """What was imported by now lives as long as the process: without looking at it each time, garbage is found in a third less time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_generate_tests(metafunc):
    """Tests of the CPU's kernel run under each kind of CPU that this machine can play."""
    if metafunc.definition.get_closest_marker("kernel"):
        metafunc.fixturenames.append("played_cpu")
        metafunc.parametrize("played_cpu", KINDS[: KINDS.index(cpu_kind()) + 1], indirect=True)


@pytest.fixture
def played_cpu(request, monkeypatch):
    """The kind of CPU that is played."""
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


@pytest.fixture(autouse=True)
def fresh_torch():
    """No compiled graph, report or random state of another test; Dynamo is reset where a test used it."""
    torch.manual_seed(0)
    yield
    if torch._dynamo.utils.counters:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    if any(registry._here.values()):  # policies and lowerings that a script of a test or a document registered
        for registered in registry._here.values():
            registered.clear()
        registry.registered.cache_clear()
