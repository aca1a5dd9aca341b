from __future__ import annotations

import functools
import itertools
import math
import pickle
import queue
import threading
import warnings

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EXACT, VideoDiT, dit_inputs, randomise

import lvsa_compile
from lvsa_compile.errors import StepError
from lvsa_compile.forward.clock import Clock, clock_of
from lvsa_compile.forward.explicit_step import explicit_steps

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


# --- what values cannot tell, and what threads and sizes can ---------------------------------------------------------------------


def told(clock, calls):
    """Steps of calls, each a timestep or a pair of timestep and size, and whether the clock had doubts."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = []
        for call in calls:
            value, size = call if isinstance(call, tuple) else (call, None)
            clock.tick(value if isinstance(value, torch.Tensor) else torch.tensor([float(value)]), size)
            found.append(int(clock.phase(10_000, CPU)))
    messages = [str(w.message) for w in heard if w.category is lvsa_compile.LvsaWarning]
    assert len(messages) <= 1, "once"
    assert all("`with lvsa_compile.step(i):`" in text and "attach(pipe)" in text for text in messages)
    return found, bool(messages)


@pytest.mark.parametrize(
    ("calls", "steps"),
    [
        ([999, 900, 950, 800, 850, 700, 750, 600], [0, 1, 2, 3, 4, 5, 6, 7]),  # noise is added before each step
        ([999, 900, 800, 999, 700, 900, 600, 800], None),  # requests in turns: nobody can tell
        ([500, 999, 900, 800, 700], [0, 1, 1, 2, 3]),  # a warm-up call, seen when the schedule falls
    ],
)
def test_what_nobody_can_tell_is_a_warning(calls, steps):
    found, doubts = told(Clock(), calls)
    assert doubts
    assert steps is None or found == steps


def test_frames_that_move_on_while_the_largest_timestep_stays_are_a_warning():
    """Diffusion forcing, queues of frames: one frame after the other falls, the last stays at the beginning."""
    frames = [torch.tensor([[900.0 - 100 * max(0, call - frame) for frame in range(8)]]) for call in range(4)]
    assert told(Clock(), frames)[1]


@st.composite
def schedules(draw):
    """A schedule as samplers have them: falling or rising, from 1000 or from 1, dense at one end or even."""
    count, power = draw(st.integers(3, 30)), draw(st.sampled_from([0.5, 1.0, 2.0]))
    top = draw(st.sampled_from([1000.0, 999.0, 1.0]))
    values = [top * (1 - (i / count) ** power) for i in range(count)]
    return values[::-1] if draw(st.booleans()) else values


@st.composite
def turns(draw):
    """Calls as pairs of a timestep and the step that it belongs to: guidance, skipped steps, videos that are broken off, two requests."""
    values = draw(schedules())
    requests, every = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 3]))
    queues = []
    for _ in range(requests):
        calls = []
        for _ in range(draw(st.integers(1, 2))):  # videos
            kept = values[::every]  # a cache skips some steps
            kept = kept[: draw(st.integers(2, len(kept)))] if len(kept) > 2 and draw(st.booleans()) else kept
            calls.append([(value, step) for step, value in enumerate(kept)])
        queues.append([each for video in calls for each in video])
    guidance, mixed = draw(st.integers(1, 2)), []
    while any(queues):
        queue = draw(st.sampled_from([q for q in queues if q]))
        mixed += [queue.pop(0)] * guidance
    return mixed


@settings(max_examples=300)
@given(turns())
def test_steps_are_right_or_warned_of(calls):
    found, doubts = told(Clock(), [value for value, _ in calls])
    assert doubts or found == [step for _, step in calls], (calls, found)


def test_a_step_that_is_said_leaves_no_doubt():
    clock = Clock()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, value in enumerate([999, 900, 950, 800, 850]):
            with lvsa_compile.step(number, of=5):
                clock.tick(torch.tensor([float(value)]))
                assert int(clock.phase(100, CPU)) == number


class Callers:
    """Threads that live at the same time and are told to call one after the other."""

    def __init__(self, clock, names):
        self.clock = clock
        self.asked = {name: queue.Queue() for name in names}
        self.answers = queue.Queue()
        for name in names:
            threading.Thread(target=self.serve, args=(name,), daemon=True).start()

    def serve(self, name):
        while True:
            value = self.asked[name].get()
            self.clock.tick(torch.tensor([float(value)]))
            self.answers.put(int(self.clock.phase(10_000, CPU)))

    def call(self, name, value):
        self.asked[name].put(value)
        return self.answers.get(timeout=20)


def test_two_threads_have_two_videos():
    callers = Callers(Clock(), "AB")
    values = {"A": iter([999, 900, 800, 700]), "B": iter([999, 950, 850, 700])}
    steps = {"A": [], "B": []}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in "AABABABB":
            steps[name].append(callers.call(name, next(values[name])))
    assert steps == {"A": [0, 1, 2, 3], "B": [0, 1, 2, 3]}


@settings(max_examples=30)
@given(threads=st.lists(st.sampled_from("ABCD"), min_size=6, max_size=24))
def test_a_video_whose_steps_run_on_any_thread_is_one_video(threads):
    """As in servers that hand each step to whichever worker is free; two videos, one after the other."""
    callers = Callers(Clock(), "ABCD")
    steps = 6
    found = [callers.call(name, 999 - 90 * (call % steps)) for call, name in enumerate(threads)]
    assert found == [call % steps for call in range(len(threads))]


@pytest.mark.parametrize("first", [None, (9, 12)])
def test_a_call_that_does_not_show_the_size_belongs_to_the_video_of_its_thread(first):
    """As where a forward is one graph for some calls, and for others several, of which the first gets the timestep alone."""
    clock, other = Clock(), (9, 12) if first is None else None
    calls = [(999, first), (999, other), (900, first), (900, other), (800, other), (700, first), (700, other)]
    assert steps_in(clock, calls) == [0, 0, 1, 1, 2, 3, 3]


def steps_in(clock, calls):
    found = []
    for value, size in calls:
        clock.tick(torch.tensor([float(value)]), size)
        found.append(int(clock.phase(10_000, CPU)))
    return found


def test_videos_of_two_sizes_in_turns_are_two_videos():
    calls = [(999, "small"), (999, "large"), (900, "small"), (900, "large"), (800, "large"), (800, "small")]
    assert told(Clock(), calls) == ([0, 0, 1, 1, 2, 2], False)


def schedulers():
    """All of diffusers, but for one that goes back to paint anew."""
    import diffusers

    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and name != "RePaintScheduler"]
    return [getattr(diffusers, name) for name in names]


def set_timesteps(scheduler, count):
    """Whether a scheduler has timesteps of its own, given what video pipelines give it."""
    for more in ({}, {"mu": 1.0}, {"sigmas": [float(n) for n in torch.linspace(1, 1 / count, count)], "mu": 1.0}):
        try:
            scheduler.set_timesteps(count, **more)
        except (TypeError, ValueError, ImportError, AttributeError, NotImplementedError, AssertionError, IndexError, KeyError):
            continue
        values = getattr(scheduler, "timesteps", None)
        if isinstance(values, torch.Tensor) and values.dim() == 1 and all(map(math.isfinite, values.tolist())) and len(values) > 1:
            return True
    return False


@pytest.mark.parametrize(
    "variant", [{}, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {"use_karras_sigmas": True}, {"shift": 5.0}]
)
def test_no_scheduler_of_a_video_pipeline_raises_a_doubt(variant):
    """Two videos with guidance, then one that begins in the middle, as video-to-video does; few steps and many."""
    smoke_tested = 0
    for kind in schedulers():
        try:
            scheduler = kind(**variant)
        except (TypeError, ValueError, NotImplementedError, ImportError, AttributeError):
            continue
        for count in (4, 10, 50):
            if not set_timesteps(scheduler, count):
                continue
            values = [float(t) for t in scheduler.timesteps]
            clock = Clock()
            for begin in (0, 0, len(values) * 2 // 5 if values[0] > values[-1] else 0):
                found, doubts = told(clock, [value for value in values[begin:] for _ in range(2)])
                runs = [number for number, _ in itertools.groupby(values[begin:])]
                assert not doubts, (kind, variant, count, values)
                assert list(dict.fromkeys(found)) == list(range(len(runs))), (kind, variant, count, values)
            smoke_tested += 1
    assert smoke_tested > 10, smoke_tested


@pytest.mark.parametrize("number", [float, int])
def test_timesteps_that_are_python_numbers(number):
    class Numbers(VideoDiT):
        def forward(self, latents, timestep, text):
            return super().forward(latents, torch.full((1,), float(timestep)), text)

    model, (latents, _, text) = randomise(Numbers()), dit_inputs()
    compiled = torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"})
    with torch.no_grad():
        for step, value in enumerate((900, 800, 700)):
            output = compiled(latents, number(value), text)
            with oracle.MaskedAttention(oracle.token_mask(9, 12, step, reference=4, window=1)):
                answer = model(latents, number(value), text)
            assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())


def test_the_size_of_a_batch_is_no_timestep():
    """Dynamo gives symbolic sizes as inputs of their own, named by the tensor whose size they are."""
    model = randomise(VideoDiT())
    compiled = torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"}, dynamic=True)
    with torch.no_grad():
        for step, batch in enumerate((2, 3, 4)):
            inputs = dit_inputs(batch=batch, timestep=900.0 - 100 * step)
            output = compiled(*inputs)
            with oracle.MaskedAttention(oracle.token_mask(9, 12, step, reference=4, window=1)):
                answer = model(*inputs)
            assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())
    assert lvsa_compile.reports()[0].graphs[0].clock == "value of input 'timestep'"


@pytest.mark.parametrize("calls", [1, 2], ids=["once", "with guidance"])
@pytest.mark.parametrize("taken", ["loop", "index", "unbind"])
@pytest.mark.parametrize("options", [{}, {"dense_steps": 1}, {"rotate": False}], ids=["", "dense first", "still"])
def test_each_of_several_steps_in_one_graph_has_its_own_anchors(calls, taken, options):
    """A loop over a few denoising steps, compiled as one function, and a second video."""
    model, (latents, _, text) = randomise(VideoDiT()), dit_inputs()
    times = torch.tensor([900.0, 700.0, 500.0])

    def sample(latents, times):
        steps = times if taken == "loop" else times.unbind() if taken == "unbind" else [times[0], times[1], times[2]]
        for time in steps:
            for _ in range(calls):
                latents = latents - 0.1 * model(latents, time.expand(1), text)
        return latents

    compiled = torch.compile(sample, backend="lvsa", options={**EXACT, "inner": "eager", **options})
    for _ in range(2):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            output = compiled(latents, times)
            answer = latents
            for step, time in enumerate(times):
                for _ in range(calls):
                    if step < options.get("dense_steps", 0):
                        answer = answer - 0.1 * model(answer, time.expand(1), text)
                        continue
                    mask = oracle.token_mask(9, 12, 0 if options.get("rotate") is False else step, reference=4, window=1)
                    with oracle.MaskedAttention(mask):
                        answer = answer - 0.1 * model(answer, time.expand(1), text)
        assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())
    (graph,) = lvsa_compile.reports()[0].graphs
    assert options.get("rotate") is False or "6 calls, timesteps from 500 to 900, 5 moves, 2 videos begun" in graph.clock_saw


def test_several_steps_in_one_graph_whose_timesteps_are_arguments():
    model, (latents, _, text) = randomise(VideoDiT()), dit_inputs()

    def sample(latents, last, first):
        latents = latents - 0.1 * model(latents, first, text)
        return latents - 0.1 * model(latents, last, text)

    with torch.no_grad():
        output = torch.compile(sample, backend="lvsa", options={**EXACT, "inner": "eager"})(
            latents, torch.tensor([500.0]), torch.tensor([900.0])
        )
        answer = latents
        for step, value in enumerate((900.0, 500.0)):
            with oracle.MaskedAttention(oracle.token_mask(9, 12, step, reference=4, window=1)):
                answer = answer - 0.1 * model(answer, torch.tensor([value]), text)
    assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())


def test_a_step_said_around_several_is_a_warning():
    model, (latents, _, text) = randomise(VideoDiT()), dit_inputs()

    def sample(latents, times):
        for time in times:
            latents = latents - 0.1 * model(latents, time.expand(1), text)
        return latents

    with lvsa_compile.step(0), torch.no_grad(), pytest.warns(lvsa_compile.LvsaWarning, match="several denoising steps in one graph"):
        torch.compile(sample, backend="lvsa", options={**EXACT, "inner": "eager"})(latents, torch.tensor([900.0, 700.0, 500.0]))


def test_two_elements_of_a_timestep_that_are_no_steps():
    """A model that embeds the timesteps of video and sound, of which it gets two in one tensor."""

    class Two(VideoDiT):
        def forward(self, latents, timestep, text):
            return super().forward(latents, timestep[0:1], text * timestep[1].sin())

    model, (latents, _, text) = randomise(Two()), dit_inputs()
    compiled = torch.compile(model, backend="lvsa", options={**EXACT, "inner": "eager"})
    for step, value in enumerate((900.0, 800.0)):
        with torch.no_grad():
            output = compiled(latents, torch.tensor([value, value / 2]), text)
            with oracle.MaskedAttention(oracle.token_mask(9, 12, step, reference=4, window=1)):
                answer = model(latents, torch.tensor([value, value / 2]), text)
        assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())


@pytest.mark.parametrize("of", [5, 0, 2.5, True])
def test_a_number_of_steps_that_does_not_reach_the_step_is_an_error(of):
    with pytest.raises(StepError) as raised:
        lvsa_compile.step(5, of=of)
    assert str(raised.value) == f"step(5, of={of!r}): of is how many steps the video has, a whole number above 5. Give it, or leave it out."
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_the_number_of_steps_is_known_within_its_context():
    assert explicit_steps() is None
    with lvsa_compile.step(2, of=8):
        assert explicit_steps() == 8
        with lvsa_compile.step(3):
            assert explicit_steps() is None


# --- whose clock it is ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["module", "function", "closure"])
def test_parameters_replaced_inside_a_video_leave_the_step(how):
    """As ``load_state_dict(assign=True)`` does for an adapter that is merged between two steps."""
    model = randomise(VideoDiT())
    if how == "module":
        run = torch.compile(model, backend="lvsa", options=EXACT)
    elif how == "function":
        compiled = torch.compile(lambda called, *inputs: called(*inputs), backend="lvsa", options=EXACT)
        run = functools.partial(compiled, model)
    else:
        run = torch.compile(lambda *inputs: model(*inputs), backend="lvsa", options=EXACT)
    for step, value in enumerate((900.0, 800.0, 700.0, 600.0)):
        if step == 2:
            model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        with torch.no_grad():
            output = run(*dit_inputs(timestep=value))
            with oracle.MaskedAttention(oracle.token_mask(9, 12, step, reference=4, window=1)):
                answer = model(*dit_inputs(timestep=value))
        assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max()), step


def test_two_models_of_one_compiled_function_keep_their_own_steps():
    models = [randomise(VideoDiT(), seed) for seed in (1, 2)]
    compiled = torch.compile(lambda called, *inputs: called(*inputs), backend="lvsa", options=EXACT)
    for step, value in enumerate((900.0, 800.0, 700.0)):
        for model in models[: 1 + (step < 2)]:
            with torch.no_grad():
                output = compiled(model, *dit_inputs(timestep=value))
                with oracle.MaskedAttention(oracle.token_mask(9, 12, step, reference=4, window=1)):
                    answer = model(*dit_inputs(timestep=value))
            assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max()), step


def test_the_report_says_what_the_clock_saw():
    model = randomise(VideoDiT())
    compiled = torch.compile(model, backend="lvsa", options=EXACT)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in (900.0, 900.0, 800.0, 850.0, 700.0, 900.0):
            compiled(*dit_inputs(timestep=value))
        with lvsa_compile.step(1, of=2):
            compiled(*dit_inputs(timestep=800.0))
    (graph,) = lvsa_compile.reports()[0].graphs
    assert graph.clock_saw == (
        "7 calls, timesteps from 700 to 900, 5 moves, 2 videos begun, 1 moves that do not tell the step; "
        "in 1 calls lvsa_compile.step(i) said the step",
    )
    assert f"denoising step: value of input 'timestep'; {graph.clock_saw[0]}" in str(lvsa_compile.reports()[0])
