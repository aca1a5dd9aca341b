"""Packed sequences whose index tensors and coordinates follow the prompt: structure is guarded, so that a few graphs serve all lengths."""

from __future__ import annotations

import contextlib
import itertools

import oracle
import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from minimax_h3 import SOUND as SOUND_OF_H3
from minimax_h3 import minimax_h3, packed
from tiny_models import EXACT, randomise
from torch import nn

import lvsa_compile
from lvsa_compile.axes.algebra import CREATED, Source, axis_of, concat
from lvsa_compile.axes.positions import Relations, RunsAre, boundaries, runs_of
from lvsa_compile.axes.values import Later
from lvsa_compile.layout.packed_grid import GridIs, Stretch

OPTIONS = {**EXACT, "inner": "eager"}
GRID = (9, 3, 4)
VIDEO = 108
SOUND = 6


def index_copied(x, index, new):
    return x.index_copy(1, index, new)


def assigned(x, index, new):
    x = x.clone()
    x[:, index] = new
    return x


def added(x, index, new):
    return x.index_add(1, index, new)


class Packed(nn.Module):
    """Text, sound and video are put where index tensors say; angles come from coordinates, gates from rows of a table of timesteps."""

    def __init__(self, place, take, sound=False, width=16, rows=torch.index_select):
        super().__init__()
        self.words, self.sounds, self.patches = nn.Linear(6, width), nn.Linear(6, width), nn.Linear(8, width)
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.gates, self.back = nn.Linear(1, width), nn.Linear(width, 8)
        self.place, self.take, self.sound, self.width, self.rows = place, take, sound, width, rows

    def forward(self, tokens, text, sound, places, text_at, sound_at, video_at, row, timestep):
        x = tokens.new_zeros(1, places.shape[0], self.width)
        x = self.place(x, text_at, self.words(text))
        if self.sound:
            x = self.place(x, sound_at, self.sounds(sound))
        x = self.place(x, video_at, self.patches(tokens))
        x = x + self.rows(self.gates(timestep[:, None] / 1000), 0, row)
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        turn = torch.cos(places @ torch.tensor([[1.0], [0.7], [0.4]]))[None, None]
        x = x + self.out(F.scaled_dot_product_attention(q * turn, k * turn, v).transpose(1, 2).flatten(2))
        return self.back(self.take(x, video_at))


def inputs_of(words, order="text sound video", grid=GRID, sound=False):
    """The order says which part lies where; a part that is not there has no tokens."""
    draw = torch.Generator().manual_seed(words)
    sizes = {"text": words, "sound": SOUND if sound else 0, "video": VIDEO}
    cube = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij"), -1).reshape(-1, 3)
    at, places, start = {}, [], 0
    for part in order.split():
        size = sizes[part]
        at[part] = torch.arange(start, start + size)
        places.append(cube + start if part == "video" else torch.arange(start, start + size, dtype=torch.float32)[:, None].expand(-1, 3))
        start += size
    row = torch.zeros(start, dtype=torch.long)
    row[at["video"]] = 1
    random = [torch.randn(1, n, width, generator=draw) for n, width in ((VIDEO, 8), (words, 6), (sizes["sound"], 6))]
    return (*random, torch.cat(places), at["text"], at["sound"], at["video"], row, torch.tensor([0.0, 900.0]))


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def expect(compiled, model, inputs, *, prefix, suffix=0, grid=GRID, sparse=True):
    lvsa_compile.reset()
    with torch.no_grad():
        output = compiled(*inputs)
        mask = oracle.token_mask(grid[0], grid[1] * grid[2], 0, reference=4, window=1, prefix=prefix, suffix=suffix)
        with oracle.MaskedAttention(mask if sparse else torch.ones_like(mask)):
            answer = model(*inputs)
    assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())


def selected(x, index):
    return x.index_select(1, index)


def indexed(x, index):
    return x[:, index]


def cast_before(x, index):
    return x.index_select(1, index.int().long())


@pytest.mark.parametrize(("place", "take"), [(index_copied, selected), (assigned, indexed), (added, cast_before)])
@pytest.mark.parametrize(("order", "sound"), [("text video", False), ("text sound video", True), ("video text", False)])
def test_a_few_graphs_serve_prompts_of_all_lengths(place, take, order, sound):
    torch._dynamo.utils.counters.clear()
    model = randomise(Packed(place, take, sound))
    order = order if sound else order + " sound"
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    for words in (5, 7, 3, 12, 36, 108, 2, *range(13, 25), 96):
        before = 0 if order.startswith("video") else words + (SOUND if sound else 0)
        expect(compiled, model, inputs_of(words, order, sound=sound), prefix=before, suffix=words if before == 0 else 0)
    assert graphs() <= 3
    assert "1 of 1 attention sites sparse" in lvsa_compile.reports()[-1].summary


def one_by_one(model, options):
    for blocks in (model.transformer_blocks, model.token_refiner.refiner_blocks):
        for block in blocks:
            block.compile(backend="lvsa", options=options)


def eagerly(model, options):
    lvsa_compile.enable(model, **options)


def test_minimax_h3_compiles_twice_for_prompts_of_all_lengths_and_again_for_another_size():
    torch._dynamo.utils.counters.clear()
    model = randomise(minimax_h3())
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    for words, grid, most in (
        (7, GRID, 1),
        (11, GRID, 2),
        (5, GRID, 2),
        (30, GRID, 2),
        (108, GRID, 2),
        (9, (12, 2, 3), 3),
        (13, (12, 2, 3), 4),
    ):
        lvsa_compile.reset()
        inputs = packed(words, grid)
        with torch.no_grad():
            video, sound = compiled(**inputs)
            before = words + grid[1] * grid[2] + SOUND_OF_H3
            with oracle.MaskedAttention(oracle.token_mask(grid[0], grid[1] * grid[2], 0, reference=4, window=1, prefix=before)):
                answers = model(**inputs)
        for output, answer in zip((video, sound), answers, strict=True):
            assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max())
        assert graphs() <= most


@pytest.mark.parametrize(("way", "dense"), [(lvsa_compile.compile_repeated_blocks, 1), (one_by_one, 2), (eagerly, 1)])
def test_minimax_h3_by_blocks_and_in_eager_code(way, dense):
    torch._dynamo.utils.counters.clear()
    alone, model = randomise(minimax_h3()), randomise(minimax_h3())
    way(model, options=OPTIONS)
    for words in (7, 11, 5):
        lvsa_compile.reset()
        for step, timestep in enumerate((0.9, 0.7, 0.5)):
            inputs, before = packed(words, GRID, timestep), words + GRID[1] * GRID[2] + SOUND_OF_H3
            dense -= 1
            with torch.no_grad():
                found = model(**inputs)
                mask = oracle.token_mask(GRID[0], GRID[1] * GRID[2], step, reference=4, window=1, prefix=before)
                with oracle.MaskedAttention(mask) if dense < 0 else contextlib.nullcontext():
                    answers = alone(**inputs)
            for output, answer in zip(found, answers, strict=True):
                assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max()), (words, step)
    assert graphs() <= 3 + 5, "one for each length, three of the first two forwards, and two of the text"


def rows_by_indexing(table, dim, row):
    return table[row]


def rows_by_gathering(table, dim, row):
    return table.gather(dim, row[:, None].expand(-1, table.shape[1]))


def rows_by_embedding(table, dim, row):
    return F.embedding(row, table)


def rows_along_the_axis(table, dim, row):
    return torch.take_along_dim(table, row[:, None], dim)


def rows_by_choice(table, dim, row):
    return torch.where(row[:, None] == 1, table[1:2], table[:1])


@pytest.mark.parametrize("rows", [rows_by_indexing, rows_by_gathering, rows_by_embedding, rows_along_the_axis, rows_by_choice])
def test_rows_of_a_table_run_along_their_index(rows):
    model = randomise(Packed(index_copied, selected, rows=rows))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    for words in (5, 7):
        expect(compiled, model, inputs_of(words, "text video sound"), prefix=words)
    assert "1 of 1 attention sites sparse" in lvsa_compile.reports()[-1].summary


def permuted(inputs):
    *first, video_at, row, timestep = inputs
    order = torch.randperm(len(video_at), generator=torch.Generator().manual_seed(1))
    return (*first, video_at[order], row, timestep)


def with_text_over_video(inputs):
    tokens, text, sound, places, text_at, *rest = inputs
    return tokens, text, sound, places, text_at + 20, *rest


def with_other_places(inputs):
    tokens, text, sound, places, *rest = inputs
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(1))
    return tokens, text, sound, places[order], *rest


def test_text_that_the_video_overwrites_compiles_anew():
    model = randomise(Packed(index_copied, selected))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    for change in (list, with_text_over_video, list, with_text_over_video):
        for words in (5, 7, 9):
            expect(compiled, model, change(inputs_of(words, "text video sound")), prefix=words)


@pytest.mark.parametrize("change", [permuted, with_other_places])
def test_another_structure_is_never_served_by_the_same_graph(change):
    model = randomise(Packed(index_copied, selected))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    for words in (5, 7, 9):
        expect(compiled, model, inputs_of(words, "text video sound"), prefix=words)
        with torch.no_grad():
            inputs = change(inputs_of(words, "text video sound"))
            output, answer = compiled(*inputs), model(*inputs)
        assert float((output - answer).abs().max()) < 2e-5 * float(answer.abs().max()), "dense, since no frame can be told"
    torch._dynamo.utils.counters.clear()
    for words in (11, 6):
        expect(compiled, model, inputs_of(words, "text video sound"), prefix=words)
    assert graphs() == 0, "and the graph for all lengths is still there"


def narrowed(x, index):
    return x.index_select(1, index.to(torch.uint8).long())


def test_a_cast_that_changes_an_index_is_no_copy():
    model = randomise(Packed(index_copied, narrowed))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    with torch.no_grad():
        for words in (200, 210, 220):
            inputs = inputs_of(words, "text video sound")
            output, dense = compiled(*inputs), model(*inputs)
            with oracle.MaskedAttention(oracle.token_mask(9, 12, 0, reference=4, window=1, prefix=words)):
                sparse = model(*inputs)
            far = min(float((output - answer).abs().max()) for answer in (dense, sparse))
            assert far < 2e-5 * float(dense.abs().max())


@pytest.mark.parametrize("marks", [((0, 1), (6, 0)), ((1, 1), (4, 0)), ((3, 0),)], ids=["tokens", "text", "places"])
@pytest.mark.parametrize("order", ["text video sound", "video text sound"])
def test_marks_are_kept(order, marks):
    """``marks``: which input, and which of its axes, is marked dynamic."""
    model = randomise(Packed(index_copied, selected))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    for words in (5, 7, 9):
        inputs = inputs_of(words, order)
        for position, axis in marks:
            torch._dynamo.maybe_mark_dynamic(inputs[position], axis)
        where = {"prefix": words} if order.startswith("text") else {"prefix": 0, "suffix": words}
        expect(compiled, model, inputs, **where)


def test_a_mark_that_a_relation_would_fix_is_no_error():
    model = randomise(Packed(index_copied, selected))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    for words in (5, 7, 9):
        inputs = inputs_of(words, "text video sound")
        for position, axis in ((0, 1), (6, 0)):
            torch._dynamo.mark_dynamic(inputs[position], axis)
        with torch.no_grad():
            output, dense = compiled(*inputs), model(*inputs)
            with oracle.MaskedAttention(oracle.token_mask(9, 12, 0, reference=4, window=1, prefix=words)):
                sparse = model(*inputs)
        assert min(float((output - answer).abs().max()) for answer in (dense, sparse)) < 2e-5 * float(dense.abs().max())


def test_another_grid_of_as_many_tokens_compiles_anew():
    model = randomise(Packed(index_copied, selected))
    compiled = torch.compile(model, backend="lvsa", options=OPTIONS)
    for words, grid in ((5, GRID), (7, GRID), (8, (12, 3, 3)), (6, GRID), (9, (12, 3, 3)), (10, (6, 3, 6))):
        expect(compiled, model, inputs_of(words, "text video sound", grid), prefix=words, grid=grid)


# --- the symbolic part by itself ----------------------------------------------------------------------------------------------


class Known(Later):
    def __init__(self, values):
        super().__init__(lambda: values, constant=False)
        self.values, self.expected = values.numpy(), []

    def peek(self):
        return self.values

    def rely_on(self, expected):
        self.expected.append(expected)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 4), st.data())
def test_runs_in_symbols_are_the_runs_that_were_read(lengths, which, data):
    """An axis of consecutive parts, some of symbolic length; an index names one part or a stretch of it."""
    symbols = [sympy.Symbol(f"s{i}", positive=True, integer=True) for i in range(len(lengths))]
    numbers = dict(zip(symbols, lengths, strict=True))
    symbolic = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    sizes = [symbol if free else length for symbol, length, free in zip(symbols, lengths, symbolic, strict=True)]
    axis = concat([axis_of(Source(CREATED, str(i), 0, size)) for i, size in enumerate(sizes)])

    def now(size):
        return size if isinstance(size, int) else int(size.subs(numbers))

    which %= len(lengths)
    start = sum(lengths[:which]) + data.draw(st.integers(0, lengths[which] - 1))
    stop = data.draw(st.integers(start + 1, sum(lengths)))
    count = data.draw(st.sampled_from([stop - start, *(s for s in symbols if numbers[s] == stop - start)]))
    known = Known(torch.arange(start, stop))
    found = Relations(now).runs(known, axis, count)
    if found is None:
        assert all(isinstance(size, int) for size in (*boundaries(axis), count))
        return
    assert [(now(a), now(b)) for a, b in found] == [(start, stop)] == runs_of(known.values)
    (expected,) = known.expected
    assert expected.holds(known.values, now)
    assert not expected.holds(known.values + 1, now)


def test_sizes_that_only_run_time_knows_are_no_boundaries():
    s, u, v = (sympy.Symbol(name, positive=True, integer=True) for name in ("s", "u", "v"))
    axis = concat([axis_of(Source(CREATED, str(size), 0, size)) for size in (s, u, 9)])
    relations = Relations(lambda size: size if isinstance(size, int) else int(value) if (value := size.subs({s: 4})).is_number else -1)
    relations.notice(axis, v, v + 9)
    assert not relations.noticed
    assert relations.runs(Known(torch.arange(4, 7)), axis, 3) == [(s, s + 3)]
    assert relations.runs(Known(torch.arange(4, 7)), axis, v) is None
    assert not relations.noticed


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), max_size=8))
def test_runs_name_the_positions_in_order(pieces):
    positions = [position for start, length in pieces for position in range(start, start + length)]
    runs = runs_of(torch.tensor(positions, dtype=torch.long).numpy())
    if len(set(positions)) < len(positions):
        assert runs is None
    else:
        assert [position for start, stop in runs for position in range(start, stop)] == positions
        assert all(a[1] != b[0] for a, b in itertools.pairwise(runs))


def test_structure_that_does_not_hold():
    s = sympy.Symbol("s", positive=True, integer=True)
    cube = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (3, 2, 2)), indexing="ij"), -1).reshape(-1, 3)
    values = torch.cat([torch.zeros(5, 3, dtype=torch.long), cube]).double().numpy()
    grid = GridIs(0, s, 12, (Stretch(12, (3, 2, 2)),))
    assert grid.holds(values, lambda size: 5)
    assert not grid.holds(values, lambda size: 4)
    assert not grid.holds(values[:-1], lambda size: 5), "too few tokens"
    assert not grid.holds(values[::-1].copy(), lambda size: 0)
    runs = RunsAre(((0, s), (s + 3, 9)))
    assert runs.holds(torch.tensor([0, 1, 5, 6, 7, 8]).numpy(), lambda size: 2 if size == s else 5 if size == s + 3 else size)
    assert not runs.holds(torch.tensor([0, 1, 4, 5, 6, 7, 8]).numpy(), lambda size: 2 if size == s else 5 if size == s + 3 else size)
