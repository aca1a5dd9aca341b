"""Forwards that are followed while they run: blocks compiled in any way are sparse and exact, and nothing else is different."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import pickle
import threading
import warnings

import pytest
import torch
from accelerate.utils import compile_regions
from hypothesis import given, settings
from hypothesis import strategies as st
from test_graph_breaks import close, masked
from test_regional import Block, Stack, one_after_the_other, with_text
from tiny_models import PATTERN, VideoDiT, dit_inputs, randomise, timesteps, wan, wan_inputs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lvsa_compile
from lvsa_compile import compat
from lvsa_compile.axes.algebra import INPUT, Concat, Source, axis_of
from lvsa_compile.axes.tracker import AxisTracker
from lvsa_compile.watching.eager_tracker import EagerTracker
from lvsa_compile.watching.memory import Memory
from lvsa_compile.watching.watch import watch_of

EAGER = {**PATTERN, "inner": "eager"}


def in_place(model, **settings):
    for block in model.blocks:
        block.compile(**settings)
    return model


def in_the_list(model, **settings):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, **settings)
    return model


def by_forward(model, **settings):
    for block in model.blocks:
        block.forward = torch.compile(block.forward, **settings)
    return model


def by_partial(model, **settings):
    for block in model.blocks:
        block.forward = functools.partial(torch.compile(block.forward, **settings))
    return model


def by_accelerate(model, **settings):
    return compile_regions(model, **settings)


WAYS = {"in place": in_place, "in the list": in_the_list, "by forward": by_forward, "by partial": by_partial, "accelerate": by_accelerate}


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def modes():
    return torch._C._len_torch_dispatch_stack()


def exact_from_the_second_call(model, alone, steps=4, videos=2, **around):
    """Calls a model through some videos; the very first forward may be dense."""
    for video in range(videos):
        for step, value in enumerate(timesteps(steps)):
            inputs = dit_inputs(timestep=value)
            with torch.no_grad():
                output = model(*inputs)
            first = video == step == 0
            assert close(output, masked(alone, inputs, step, **around)) or (first and close(output, alone(*inputs))), (video, step)
            assert modes() == 0


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_blocks_compiled_by_others_are_sparse_from_the_second_call_on(way, dynamic):
    alone, model = randomise(Stack()), way(randomise(Stack()), backend="lvsa", options=EAGER, dynamic=dynamic)
    kinds = 2 if way is by_accelerate else 1  # accelerate compiles what is around the blocks, too
    exact_from_the_second_call(model, alone, steps=1, videos=1)
    exact_from_the_second_call(model, alone)
    sites = [site for report in lvsa_compile.reports() for site in report.sites]
    assert [site.decision for site in sites if "blocks" in site.name] == ["dense", "sparse"]
    assert graphs() <= 2 * (4 if way is by_accelerate else kinds)


def test_no_further_graph_in_fifty_steps():
    alone, model = randomise(Stack()), in_place(randomise(Stack()), backend="lvsa", options=EAGER)
    exact_from_the_second_call(model, alone, steps=2, videos=1)
    exact_from_the_second_call(model, alone, steps=50, videos=1)
    assert graphs() == 2


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_the_way_of_diffusers(dynamic):
    alone, model = wan(num_layers=3), wan(num_layers=3)
    model.compile_repeated_blocks(backend="lvsa", options=EAGER, dynamic=dynamic)
    for video in range(2):
        for step, value in enumerate(timesteps(3)):
            inputs = wan_inputs(timestep=value)
            with torch.inference_mode(video == 1), torch.no_grad():
                output = model(**inputs)[0]
                if video or step:
                    assert close(output, masked(lambda i=inputs: alone(**i)[0], (), step)), (video, step)
    assert graphs() <= 2 + 1  # inference tensors are another kind


def test_the_first_forward_is_dense_and_says_so_and_no_warning_speaks_of_it():
    model = in_place(randomise(Stack()), backend="lvsa", options=EAGER)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", lvsa_compile.LvsaWarning)
        model(*dit_inputs())
        (site,) = lvsa_compile.reports()[0].sites
        model(*dit_inputs())
    assert (site.decision, site.reason, site.detail) == ("dense", "first_forward", "blocks.0 of Stack")
    assert site.remedy.startswith("Nothing to do: call the model again.")
    assert [report.model for report in lvsa_compile.reports()] == ["Stack", "Stack"]
    assert lvsa_compile.reports()[1].sites[0].name == "blocks.*.attention"


class Other(Block):
    """A second kind of block."""


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, latents, timestep, text):
        return self.model(latents, timestep, text)


class ListOfItsOwn(nn.ModuleList):
    pass


def test_two_kinds_of_blocks_in_a_list_of_its_own_with_a_model_around():
    class Two(Stack):
        def __init__(self):
            super().__init__()
            self.blocks = ListOfItsOwn([Block(), Other(), Block(), Other()])

    alone, model = randomise(Two()), randomise(Two())
    in_the_list(model, backend="lvsa", options=EAGER)
    exact_from_the_second_call(Around(model), alone)
    assert graphs() == 4


def test_a_whole_model_in_a_wrapper_is_left_as_it_is():
    alone, model = randomise(Stack()), randomise(Stack())
    around = Around(torch.compile(model, backend="lvsa", options=EAGER))
    inputs = dit_inputs()
    with torch.no_grad():
        assert close(around(*inputs), masked(alone, inputs))
    assert watch_of(around) is watch_of(model) is watch_of(around.model) is None


def test_inference_mode_first():
    alone, model = randomise(Stack(with_text)), in_place(randomise(Stack(with_text)), backend="lvsa", options=EAGER)
    with torch.inference_mode():
        model(*dit_inputs())
        lvsa_compile.reset()
        for step, value in enumerate(timesteps(3)):
            inputs = dit_inputs(timestep=value)
            assert close(model(*inputs), masked(alone, inputs, step, prefix=7)), step


@pytest.mark.parametrize("backend", ["inductor", "aot_eager", "eager"])
def test_no_op_inside_a_graph_of_another_backend_is_looked_at(backend, monkeypatch):
    class Wide(Block):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(16, 37), nn.GELU(), nn.Linear(37, 16))

    seen = []
    note = EagerTracker.note

    def noting(self, func, args, kwargs, result):
        seen.append(tuple(result.shape) if isinstance(result, torch.Tensor) else ())
        note(self, func, args, kwargs, result)

    monkeypatch.setattr(EagerTracker, "note", noting)
    model = randomise(Stack())
    model.blocks[1] = randomise(Wide())
    model.blocks[0].compile(backend="lvsa", options=EAGER)
    model.blocks[1].compile(backend=backend)
    with torch.no_grad():
        for _ in range(3):
            model(*dit_inputs())
        assert seen  # what nobody compiled
        assert [shape for shape in seen if 37 in shape] == []
        monkeypatch.setattr(compat, "in_compiled_graph", lambda end: False)
        model(*dit_inputs())
    assert [shape for shape in seen if 37 in shape]


def test_what_another_backend_returns_is_not_taken_for_the_video():
    """The tokens come out of a graph nobody could look into, in another order."""

    class Turns(Block):
        def forward(self, tokens, text=None):
            return tokens.flip(1) * 1.0

    model, alone = (randomise(Stack(block=Block)) for _ in range(2))
    for each in (model, alone):
        each.blocks[0] = randomise(Turns())
    model.blocks[0].compile(backend="aot_eager")
    model.blocks[1].compile(backend="lvsa", options=EAGER)
    model.blocks[2].compile(backend="lvsa", options=EAGER)
    inputs = dit_inputs()
    with torch.no_grad():
        for _ in range(3):
            assert close(model(*inputs), alone(*inputs))


class Stop(BaseException):
    pass


class Interruptible(Stack):
    stop: BaseException | None = None

    def forward(self, latents, timestep, text):
        tokens = super().forward(latents, timestep, text)
        if self.stop is not None:
            raise self.stop
        return tokens


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt(), Stop(), GeneratorExit()])
def test_a_forward_that_ends_by_an_exception_leaves_nothing_behind(error):
    alone, model = randomise(Stack()), in_place(randomise(Interruptible()), backend="lvsa", options=EAGER)
    others, other = randomise(Stack(), 3), in_place(randomise(Stack(), 3), backend="lvsa", options=EAGER)
    with torch.no_grad():
        for stop in (error, None, error):
            model.stop = stop
            with contextlib.suppress(type(error)):
                model(*dit_inputs())
            assert modes() == 0
        model.stop = None
        lvsa_compile.reset()
        exact_from_the_second_call(model, alone, steps=2, videos=1)
        exact_from_the_second_call(other, others, steps=2, videos=2)


def test_a_thread_that_ends_by_an_exception():
    alone, model = randomise(Stack()), in_place(randomise(Interruptible()), backend="lvsa", options=EAGER)
    with torch.no_grad():
        model(*dit_inputs())
    model.stop = Stop()
    left = []

    def run():
        with contextlib.suppress(Stop), torch.no_grad():
            model(*dit_inputs())
        left.append(modes())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    model.stop = None
    lvsa_compile.reset()
    assert left == [0]
    exact_from_the_second_call(model, alone, steps=2, videos=1)


class Seen(TorchDispatchMode):
    """A mode of the user's that does not keep Dynamo from compiling."""

    def __init__(self):
        super().__init__()
        self.ops = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        return func(*args, **(kwargs or {}))


class Within(Stack):
    """Enters a mode of its own, and leaves it in the middle of the forward."""

    def __init__(self):
        super().__init__(self.run)
        self.seen = Seen()

    @staticmethod
    def run(model, tokens, grid, text):
        with model.seen:
            tokens = model.blocks[0](tokens)
        for block in model.blocks[1:]:
            tokens = block(tokens)
        return tokens


def test_modes_of_others_stay_and_see_what_they_saw():
    alone, model = randomise(Within()), in_place(randomise(Within()), backend="lvsa", options=EAGER)
    inputs = dit_inputs()
    around, plain = Seen(), Seen()
    with torch.no_grad():
        model(*inputs)
        lvsa_compile.reset()
        with around:
            output = model(*inputs)
            assert modes() == 1
        with plain:
            answer = alone(*inputs)
    assert modes() == 0
    assert close(output, masked(alone, inputs))
    assert model.seen.ops > 0
    assert around.ops > 0
    assert not close(output, answer)


def test_under_a_mode_that_keeps_dynamo_from_compiling():
    alone, model = randomise(Stack()), in_place(randomise(Stack()), backend="lvsa", options={**EAGER, "eager_attention": False})
    inputs = dit_inputs()
    with torch.no_grad():
        for _ in range(2):
            model(*inputs)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), FlopCounterMode(display=False) as ours:
            dense = model(*inputs)
        with context(), FlopCounterMode(display=False) as plain:
            alone(*inputs)
        assert ours.get_total_flops() == plain.get_total_flops() > 0
        assert close(dense, alone(*inputs))


def test_under_a_function_mode_of_the_users():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    alone, model = randomise(Stack()), in_place(randomise(Stack()), backend="lvsa", options=EAGER)
    inputs = dit_inputs()
    with torch.no_grad():
        for _ in range(3):
            with Mode():
                output = model(*inputs)
    assert close(output, masked(alone, inputs))


def test_two_threads_with_a_model_each_and_two_models_in_turns():
    alone = [randomise(Stack(), seed) for seed in (1, 2)]
    models = [in_place(randomise(Stack(), seed), backend="lvsa", options=EAGER) for seed in (1, 2)]
    errors = []
    for model in models:  # while one thread compiles, Dynamo lets the others run eagerly
        with torch.no_grad():
            for _ in range(2):
                model(*dit_inputs())
    lvsa_compile.reset()

    def run(number):
        try:
            exact_from_the_second_call(models[number], alone[number], steps=3)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert errors == []
    lvsa_compile.reset()
    for step, value in enumerate(timesteps(3)):
        inputs = dit_inputs(timestep=value)
        for model, plain in zip(models, alone, strict=True):
            with torch.no_grad():
                assert close(model(*inputs), masked(plain, inputs, step)), step


def test_a_model_that_calls_itself():
    class Twice(Stack):
        depth = 1

        def forward(self, latents, timestep, text):
            if self.depth:
                self.depth -= 1
                latents = latents + 0.1 * self(latents, timestep, text)
                self.depth += 1
            return super().forward(latents, timestep, text)

    alone, model = randomise(Twice()), in_place(randomise(Twice()), backend="lvsa", options=EAGER)
    exact_from_the_second_call(model, alone, steps=3, videos=2)


def test_undo_and_copies():
    alone, model = wan(), wan()
    model.compile_repeated_blocks(backend="lvsa", options=EAGER)
    inputs = wan_inputs()
    with torch.no_grad():
        dense = model(**inputs)[0]
        sparse = model(**inputs)[0]
        assert not close(sparse, dense)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert watch_of(copied) is None
            assert close(copied(**inputs)[0], dense)
        torch.save(model.state_dict(), io.BytesIO())
        assert lvsa_compile.undo(model) is model
        assert watch_of(model) is None
        assert [close(model(**inputs)[0], dense) for _ in range(3)] == [True] * 3
        assert watch_of(model) is None  # nor does the next compile bring it back
        lvsa_compile.compile_repeated_blocks(model, options=EAGER)
        lvsa_compile.reset()
        assert close(model(**inputs)[0], masked(lambda: alone(**inputs)[0], ()))
        lvsa_compile.undo(model)
        assert all("_compiled_call_impl" not in vars(module) for module in model.modules())


def test_save_pretrained_of_a_followed_model(tmp_path):
    model = wan()
    model.compile_repeated_blocks(backend="lvsa", options=EAGER)
    inputs = wan_inputs()
    with torch.no_grad():
        dense = model(**inputs)[0]
        model(**inputs)
        model.save_pretrained(tmp_path)
        assert close(type(model).from_pretrained(tmp_path).eval()(**inputs)[0], dense)


def test_what_undo_takes():
    with pytest.raises(lvsa_compile.LvsaError) as error:
        lvsa_compile.undo("pipe")
    assert str(error.value) == (
        "undo(model=str): neither a module nor an object that holds one whose forward gets a timestep. "
        "Give the transformer, such as pipe.transformer."
    )


def flipped(module, args, output=None):
    return (args[0].flip(1), *args[1:]) if output is None else output.flip(1)


@pytest.mark.parametrize("where", ["before a block", "after a block", "inside the model"])
def test_what_turns_frames_around_is_dense(where):
    def turn(model):
        if where == "before a block":
            model.blocks[1].register_forward_pre_hook(flipped)
        elif where == "after a block":
            model.blocks[0].register_forward_hook(flipped)
        else:
            model.patch.register_forward_hook(lambda module, args, output: output.flip(2))
        return model

    alone, model = turn(randomise(Stack())), turn(randomise(Stack()))
    for i, block in enumerate(model.blocks):
        options = {**EAGER, "eager_attention": False}
        block.forward = torch.compile(block.forward, backend="lvsa", options=options) if i else block.forward
    inputs = dit_inputs()
    with torch.no_grad():
        for _ in range(3):
            assert close(model(*inputs), alone(*inputs))


@torch._dynamo.disable
def turn_in_place(tokens):
    tokens.copy_(tokens.flip(1))


def test_a_write_that_shows_no_op():
    """Compiled code of another backend turns the tokens around in their own memory."""

    def run(model, tokens, grid, text):
        model.turn(tokens)
        return one_after_the_other(model, tokens, grid, text)

    alone, model = randomise(Stack(run)), randomise(Stack(run))
    alone.turn, model.turn = turn_in_place, torch.compile(lambda tokens: tokens.copy_(tokens.flip(1)), backend="aot_eager")
    in_place(model, backend="lvsa", options=EAGER)
    inputs = dit_inputs()
    with torch.no_grad():
        for _ in range(3):
            assert close(model(*inputs), alone(*inputs))


class Continues(VideoDiT):
    """Attends over a history and the video that is generated, and returns the latter; or the former."""

    returned = 1

    def __init__(self, block=Block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, latents, timestep, history):
        sides = [self.patch(side) for side in (history, latents)]
        tokens = torch.cat([side.flatten(2).transpose(1, 2) for side in sides], 1)
        for block in self.blocks:
            tokens = block(tokens)
        first = sides[0].shape[2:].numel()
        tokens = self.unpatch(tokens[:, first:] if self.returned else tokens[:, :first])
        frames, rows, columns = sides[self.returned].shape[2:]
        grid = tokens.view(tokens.shape[0], frames, rows, columns, -1, 2, 2)
        return grid.permute(0, 4, 1, 2, 5, 3, 6).reshape(tokens.shape[0], -1, frames, 2 * rows, 2 * columns)


def history_inputs(value=900.0):
    latents, timestep, _ = dit_inputs(timestep=value)
    return latents, timestep, torch.randn((*latents.shape[:2], 2, 6, 8), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("way", ["in place", "repeated blocks"])
def test_of_several_videos_none_is_sparse_before_an_output_has_shown_which_is_generated(way):
    alone, model = randomise(Continues()), randomise(Continues())
    if way == "in place":
        in_place(model, backend="lvsa", options=EAGER)
        with torch.no_grad():
            model(*history_inputs())
    else:
        lvsa_compile.compile_repeated_blocks(model, options=EAGER)
    with torch.no_grad():
        assert close(model(*history_inputs()), alone(*history_inputs()))
    lvsa_compile.reset()
    for step, value in enumerate(timesteps(4)):
        inputs = history_inputs(value)
        with torch.no_grad():
            assert close(model(*inputs), masked(alone, inputs, step, prefix=24)), step
    assert graphs() == (2 if way == "in place" else 1)


def test_another_video_than_was_followed_is_dense_and_warned_of():
    alone, model = randomise(Continues()), in_place(randomise(Continues()), backend="lvsa", options=EAGER)
    alone.returned = model.returned = 0
    inputs = history_inputs()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            assert close(model(*inputs), alone(*inputs))  # two frames are no more than the horizon
        model.returned = alone.returned = 1
        for _ in range(3):
            assert close(model(*inputs), alone(*inputs))
    said = [str(each.message) for each in caught if issubclass(each.category, lvsa_compile.LvsaWarning)]
    assert any("forwards of one size return different videos: history, then latents" in words for words in said), said


class Unpacks(VideoDiT):
    """Packed tokens, whose grid only the output shows."""

    def __init__(self):
        super().__init__()
        self.enter, self.blocks = nn.Linear(16, 16), nn.ModuleList(Block() for _ in range(2))
        self.leave = nn.Linear(16, 16)

    def forward(self, hidden_states, timestep, sizes):
        tokens = self.enter(hidden_states)
        for block in self.blocks:
            tokens = block(tokens)
        frames, rows, columns = sizes
        return self.leave(tokens).unflatten(1, (frames, rows, columns))


def test_packed_tokens_whose_grid_the_output_shows():
    alone, model = randomise(Unpacks()), in_place(randomise(Unpacks()), backend="lvsa", options=EAGER)
    tokens = torch.randn(1, 108, 16)
    with torch.no_grad():
        for _ in range(2):
            assert close(model(tokens, torch.tensor([900.0]), (9, 3, 4)), alone(tokens, torch.tensor([900.0]), (9, 3, 4)))
        lvsa_compile.reset()
        for step, value in enumerate(timesteps(3)):
            inputs = (tokens, torch.tensor([value]), (9, 3, 4))
            assert close(model(*inputs), masked(alone, inputs, step)), step
    assert graphs() == 2


@pytest.mark.slow
def test_nothing_grows_over_a_thousand_forwards():
    model = randomise(Stack(with_text))
    model.block = with_text
    lvsa_compile.compile_repeated_blocks(model, options=EAGER)
    latents, _, text = dit_inputs()

    def run(times):
        with torch.no_grad():
            for i in range(times):
                model(latents, torch.tensor([900.0 - i % 50]), text)
        gc.collect()
        memory = watch_of(model).memory
        return len(memory.found), len(memory._axes), len(watch_of(model).sizes), len(gc.get_objects())

    run(60)
    before = run(20)
    after = run(1000)
    assert after[:3] == before[:3]
    assert after[3] - before[3] < 200


def test_a_value_is_read_once_per_size(monkeypatch):
    class Chosen(Stack):
        def __init__(self):
            super().__init__(self.run)
            self.register_buffer("order", torch.arange(108), persistent=False)

        @staticmethod
        def run(model, tokens, grid, text):
            return one_after_the_other(model, tokens[:, model.order], grid, text)

    from lvsa_compile.watching.eager_tracker import _ReadValues

    reads = []
    of = _ReadValues.of
    monkeypatch.setattr(_ReadValues, "of", lambda self, tensor: reads.append(tensor.shape) or of(self, tensor))
    alone, model = randomise(Chosen()), randomise(Chosen())
    lvsa_compile.compile_repeated_blocks(model, options=EAGER)
    with torch.no_grad():
        for step, value in enumerate(timesteps(5)):
            inputs = dit_inputs(timestep=value)
            assert close(model(*inputs), masked(alone, inputs, step))
        assert len(reads) == 1
        for each in (alone, model):
            each.order.copy_(each.order.flip(0))
        assert close(model(*inputs), alone(*inputs))
        assert len(reads) == 2


OPS = {  # of a tensor [2, 6, 4, 8] and back to one
    "permute": lambda x: x.permute(0, 2, 1, 3),
    "flatten and back": lambda x: x.flatten(1, 2).unflatten(1, x.shape[1:3]),
    "chunks": lambda x: torch.cat(x.chunk(2, 1), 1),
    "halves swapped": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "a part": lambda x: torch.cat([x[:, :2], x[:, 2:]], 1),
    "flip": lambda x: x.flip(1),
    "linear": lambda x: torch.nn.functional.linear(x, torch.ones(x.shape[-1], x.shape[-1])),
    "norm": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
    "added in place": lambda x: x.clone().add_(1.0),
    "written to a view": lambda x: _written(x),
    "stack": lambda x: torch.stack(list(x.unbind(1)), 1),
    "index": lambda x: x[:, torch.arange(x.shape[1])],
    "reversed by index": lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "transposed": lambda x: x.transpose(1, 2).contiguous(),
    "rolled": lambda x: x.roll(1, 2),
    "a table": lambda x: x * torch.arange(float(x.shape[1]))[None, :, None, None].cos(),
}


def _written(x):
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2]
    out[..., 1::2] = -x[..., 1::2]
    return out


def shown(axes):
    """What axes say of inputs and counts, whatever the nodes are called."""

    def of(factor):
        if isinstance(factor, Concat):
            return tuple(tuple(map(of, part)) for part in factor.parts)
        digits = {
            (d.source.kind, d.source.axis, d.size, d.stride, d.start) for d in factor.digits if d.source.kind in ("input", "arange", "lost")
        }
        return factor.size, frozenset(digits)

    return tuple(tuple(map(of, axis)) for axis in axes)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=6), st.booleans())
def test_eager_code_is_followed_as_a_graph_is(names, inference):
    """One tracker, two drivers: on fakes without memory, and on the real tensors of eager code, twice by one memory."""

    def run(x):
        for name in names:
            x = OPS[name](x)
        return x

    def own(x):
        return tuple(axis_of(Source(INPUT, "x", i, size, "x", 4)) for i, size in enumerate(x.shape))

    graph, fake_mode = AxisTracker(), FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode, torch.no_grad():
        x = torch.empty(2, 6, 4, 8)
        graph.set_axes(x, own(x))
        with graph:
            graph.node_name = "node"
            expected = shown(graph.axes_of(run(x)))
    memory = Memory()
    for _ in range(2):
        with torch.inference_mode(inference), torch.no_grad():
            tracker, x = EagerTracker(memory, run.__code__.replace(co_name="nobody")), torch.randn(2, 6, 4, 8)
            tracker.set_axes(x, own(x))
            with compat.mode_on(tracker):
                output = run(x)
            assert shown(tracker.axes_of(output)) == expected


@pytest.mark.parametrize("inference", [False, True])
def test_a_tensor_that_an_op_returns_as_it_came_is_no_view_of_itself(inference):
    def run():
        memory = Memory()
        for _ in range(2):  # found out, and remembered
            tracker = EagerTracker(memory, run.__code__)
            with compat.mode_on(tracker):
                mask = torch.zeros(2, 3, 4)
                assert mask.to(mask.dtype) is mask
                assert tracker.made_of(mask)[0] is None
                assert tracker.made_of(mask[:, :2])[0] is mask
                mask.index_fill_(-1, torch.tensor([1, 2]), 1.0)

    with torch.inference_mode(inference):
        run()
