from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lvsa_compile
from lvsa_compile.clock import Clock, clock_of
from lvsa_compile.errors import StepError

CPU = torch.device("cpu")


def steps_of(clock: Clock, values) -> list[int]:
    found = []
    for value in values:
        clock.tick(value if isinstance(value, torch.Tensor) else torch.tensor([float(value)]))
        found.append(int(clock.phase(10_000, CPU)))
    return found


@given(
    values=st.lists(st.integers(1, 10**6), min_size=2, max_size=30, unique=True),
    calls=st.lists(st.integers(1, 4), min_size=30, max_size=30),
    videos=st.integers(1, 3),
    ascending=st.booleans(),
)
def test_a_step_is_a_new_value_however_often_it_is_called(values, calls, videos, ascending):
    values = sorted((v / 1000 for v in values), reverse=not ascending)
    values = [v for i, v in enumerate(values) if i == 0 or torch.tensor(v) != torch.tensor(values[i - 1])]
    schedule = [(step, v) for step, v in enumerate(values) for _ in range(calls[step])] * videos
    if len(values) > 1:
        assert steps_of(Clock(), [v for _, v in schedule]) == [step for step, _ in schedule]


def test_the_largest_value_counts_where_conditioned_frames_carry_zero():
    def per_token(value):
        timestep = torch.full((2, 12), float(value))
        timestep[:, :4] = 0
        return timestep

    assert steps_of(Clock(), [per_token(v) for v in (900, 900, 700, 500, 900, 700)]) == [0, 0, 1, 2, 0, 1]


def test_integer_timesteps_and_scalars():
    assert steps_of(Clock(), [torch.tensor([999]), torch.tensor([980]), torch.tensor(960)]) == [0, 1, 2]


def test_a_new_video_after_an_interrupted_one():
    assert steps_of(Clock(), [999, 900, 800, 999, 900]) == [0, 1, 2, 0, 1]
    assert steps_of(Clock(), [999, 999, 900]) == [0, 0, 1]


def test_reset_begins_a_new_video_whatever_the_timestep():
    clock = clock_of(torch.nn.Parameter(torch.zeros(1)))
    assert steps_of(clock, [999, 900, 800]) == [0, 1, 2]
    lvsa_compile.reset()
    assert steps_of(clock, [700, 600]) == [0, 1]


def test_phase_is_the_step_modulo_the_phases_in_one_lasting_tensor():
    clock = Clock()
    tensors, values = set(), []
    for value in range(1000, 993, -1):
        clock.tick(torch.tensor([value]))
        phase = clock.phase(3, CPU)
        tensors.add(phase.data_ptr())
        values.append(int(phase))
    assert values == [0, 1, 2, 0, 1, 2, 0]
    assert len(tensors) == 1
    assert phase.dtype == torch.int32


def test_explicit_step_wins_and_ends_with_its_context():
    clock = Clock()
    clock.tick(torch.tensor([999.0]))
    with lvsa_compile.step(7):
        assert int(clock.phase(5, CPU)) == 2
        with lvsa_compile.step(3):
            assert int(clock.phase(5, CPU)) == 3
        assert int(clock.phase(5, CPU)) == 2
    assert int(clock.phase(5, CPU)) == 0


def test_explicit_steps_of_two_threads_do_not_meet():
    clock, seen, barrier = Clock(), {}, threading.Barrier(2)

    def sample(index: int) -> None:
        with lvsa_compile.step(index):
            barrier.wait()
            phase = clock.phase(10, CPU)
            barrier.wait()
            seen[index] = int(phase)

    threads = [threading.Thread(target=sample, args=(i,)) for i in (2, 5)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert seen == {2: 2, 5: 5}


def test_works_in_and_out_of_inference_mode():
    clock = Clock()
    with torch.inference_mode():
        clock.tick(torch.tensor([999.0]))
        clock.phase(3, CPU)
    clock.tick(torch.tensor([900.0]))
    with torch.inference_mode():
        clock.tick(torch.tensor([800.0]))
        assert int(clock.phase(3, CPU)) == 2


@pytest.mark.parametrize("index", [-1, 1.5, True, None])
def test_a_step_that_is_no_index_is_an_error(index):
    with pytest.raises(StepError) as raised:
        lvsa_compile.step(index)
    assert str(raised.value) == f"step({index!r}): a denoising step is a whole number from 0. Pass the index of the step, not its timestep."


def test_a_phase_is_filled_once_per_step_however_many_graphs_ask(monkeypatch):
    clock = Clock()
    filled = []
    remainder = torch.remainder
    monkeypatch.setattr(torch, "remainder", lambda *args: filled.append(args) or remainder(*args))
    for timestep, expected in ((900.0, 0), (800.0, 1), (800.0, 1), (700.0, 2)):
        clock.tick(torch.tensor([timestep]))
        assert [int(clock.phase(3, torch.device("cpu"))) for _ in range(5)] == [expected] * 5
    assert len(filled) == 4
    with lvsa_compile.step(1):
        assert int(clock.phase(3, torch.device("cpu"))) == 1
    assert int(clock.phase(3, torch.device("cpu"))) == 2
    clock.reset()
    assert int(clock.phase(3, torch.device("cpu"))) == 0
