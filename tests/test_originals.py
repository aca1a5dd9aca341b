"""Structures of original repositories: sparse and exact as a whole, by blocks and in eager code, for two sizes and two videos each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from original_models import (
    BothDirections,
    FramesAmongThemselves,
    FramesLast,
    IdsColumnByColumn,
    InTwoParts,
    KeptKeys,
    ListOfLatents,
    Model,
    PartOfTheFrames,
    Permuted,
    TokensFirst,
    TurnedAround,
    by_sequences,
    ends_of,
    joined,
    joined_with_zeros,
    padded,
    places,
    written,
)
from test_watching import in_place
from tiny_models import PATTERN, randomise

import lvsa_compile
from lvsa_compile.patterns import library_ops

OPTIONS = {**PATTERN, "inner": "eager"}
GRIDS = ((9, 3, 4), (12, 2, 3))
TIMES = (999.0, 900.0, 800.0)


def whole(model, **settings):
    return torch.compile(model, backend="lvsa", options=OPTIONS, **settings)


def of_any_size(model):
    return whole(model, dynamic=True)


def by_blocks(model):
    return in_place(model, backend="lvsa", options=OPTIONS)


def eager(model):
    return lvsa_compile.enable(model, **OPTIONS)


WAYS = (whole, of_any_size, by_blocks, eager)
EACH_WAY = [pytest.param(way, marks=[pytest.mark.slow] * (way is of_any_size), id=way.__name__) for way in WAYS]


def compiled_by(way, model):
    compiled = way(model)
    return model if compiled is None else compiled


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def latents(grid, time, batch=1):
    drawn = torch.Generator().manual_seed(int(time) + grid[0])
    return torch.randn(batch, 4, grid[0], 2 * grid[1], 2 * grid[2], generator=drawn)


def plain(grid, time, batch=1):
    return latents(grid, time, batch), torch.full((batch,), time)


def frames_last(grid, time, batch=1):
    return latents(grid, time, batch).movedim(2, -1).contiguous(), torch.full((batch,), time)


def in_a_list(grid, time, batch=1):
    return list(latents(grid, time, batch)), torch.full((batch,), time), math.prod(grid)


def with_a_time_per_token(grid, time, batch=1):
    return list(latents(grid, time, batch)), torch.full((batch, math.prod(grid)), time), math.prod(grid)


def with_text(grid, time, batch=1):
    return latents(grid, time, batch), torch.full((batch,), time), torch.ones(batch, 5, 16)


def packed(grid, time, batch=1):
    tokens = latents(grid, time, batch).unflatten(3, (-1, 2)).unflatten(5, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
    return tokens, torch.full((batch,), time), torch.ones(batch, 5, 16), places(*grid).repeat(batch, 1, 1)


def flat(output):
    return torch.cat([each.flatten() for each in (output if isinstance(output, list) else [output])])


def told(output, twin, inputs, grid, prefix):
    """Which step's mask the output is of, or "dense"."""
    answers = {"dense": flat(twin(*inputs))}
    for step in range(oracle.interval(grid[0], 1, 1, 4)):
        with oracle.MaskedAttention(oracle.token_mask(grid[0], grid[1] * grid[2], step, prefix=prefix, reference=4, window=1)) as masked:
            answers[step] = flat(twin(*inputs))
        assert masked.calls == 2
    return nearest(output, answers)


def nearest(output, answers):
    """The one answer that an output is, up to rounding."""
    apart = {name: float((flat(output) - answer).abs().max() / answer.abs().max()) for name, answer in answers.items()}
    (found,) = [name for name, far in apart.items() if far < 1e-4]
    return found


def twins(make):
    return randomise(make()), randomise(make())


def expect_sparse(make, inputs, way, twin=None, prefix=0, dense_first=0, **given):
    model, twin = randomise(make()), randomise((twin or make)())
    compiled = compiled_by(way, model)
    for grid in GRIDS:
        found = [told(compiled(*inputs(grid, time, **given)), twin, inputs(grid, time, **given), grid, prefix) for time in TIMES * 2]
        begins = dense_first if grid is GRIDS[0] else 0
        assert found[begins:] == [0, 1, 2, 0, 1, 2][begins:], found
        lvsa_compile.reset()
    lvsa_compile.undo(model)


@dataclasses.dataclass(frozen=True)
class Structure:
    """A structure that is sparse; ``seen`` says where, ``dense_first`` how many forwards are dense at first, way by way."""

    what: str
    seen: str
    make: Callable[[], torch.nn.Module]
    inputs: Callable[..., tuple]
    prefix: int = 0
    batch: int = 1
    dense_first: tuple[int, ...] = (0, 0, 1, 0)


_PART = "a residual for all frames but the first: "
_CONTINUED = "image-to-video, continuation"
_OWN = (1, 1, 1, 0)  # Dynamo gives the model's own function up
STRUCTURES = (
    Structure("latents `[B, C, H, W, F]`, patches not in time", "", FramesLast, frames_last),
    Structure("tokens `[S, B, C]`", "", TokensFirst, plain),
    Structure(_PART + "`x + cat([zeros, part])`", _CONTINUED, lambda: PartOfTheFrames(joined_with_zeros), plain),
    Structure(_PART + "`x + pad(part)`", _CONTINUED, lambda: PartOfTheFrames(padded), plain),
    Structure(_PART + "`x[:, n:] += part`", _CONTINUED, lambda: PartOfTheFrames(written), plain),
    Structure(_PART + "`cat([x[:, :n], x[:, n:] + part])`", _CONTINUED, lambda: PartOfTheFrames(joined), plain),
    Structure(
        "a list of latents, complex rope sample by sample over `grids.tolist()`", "Wan, SkyReels-V2", ListOfLatents, in_a_list,
        batch=2, dense_first=_OWN,
    ),
    Structure("the same, a timestep per token", "Wan 2.2 TI2V", ListOfLatents, with_a_time_per_token, dense_first=_OWN),
    Structure("`ids[..., i]` column by column, ids made in the model", "Open-Sora 2", IdsColumnByColumn, with_text, prefix=5),
    Structure(
        "`ids[..., i]` column by column, tokens and ids as inputs", "Open-Sora 2", lambda: IdsColumnByColumn(packed=True), packed,
        prefix=5, dense_first=(0, 0, 2, 0),
    ),
    Structure("recurrences over tokens, and over tokens turned around and back", "SANA-WM", BothDirections, plain),
    Structure(
        "the same, with a graph break where they are turned around", "", lambda: BothDirections(torch._dynamo.graph_break), plain,
        dense_first=_OWN,
    ),
)  # fmt: skip
FORMS = (
    ("`flash_attn_varlen_func`, one sequence per sample", "Wan, SkyReels, HunyuanVideo, Mochi", "sparse"),
    ("the same, keys cut by `u[:n]` for each sample", "Wan", "sparse"),
    ("`torch.nn.attention.varlen`, xformers' `flash_fwd`, one sequence per sample", "", "sparse; whole and eager tried"),
    ("`sdpa_kernel([FLASH_ATTENTION])` around the model", "", "sparse; whole and eager tried"),
    (
        "the same, text after the video, the rest of each sample a sequence of padding (`cu_seqlens` of a text mask)",
        "HunyuanVideo",
        "sparse",
    ),
    ("sequences whose lengths may differ, of other kinds", "", "dense: `form_not_rewritten`"),
    ("SageAttention: query and key in whole numbers", "", "dense: `form_not_rewritten`, which names the op"),
    ("conditioning frames attend each other, the rest attends all: the pattern over the rest", "LongCat", "sparse (0, 0, 1, 0)"),
    (
        "keys that earlier calls kept, and after them those of this call's frames (`cat` or written): the former are all attended",
        "Self-Forcing", "sparse (0, 0, 1, 1)",
    ),
    ("attention over all frames, computed for some of the queries, then for the others", "", "dense: `frames_not_contiguous`"),
    ("frames in reverse around the model", "SANA-WM", "dense: `layout_unknown`"),
    ("a product with a matrix that permutes frames", "", "dense: `no_grid`"),
    ("an op without a fake kernel, in eager code", "", "dense: `layout_unknown`, which names the op"),
)  # fmt: skip
"""What else was tried, where it is seen, and the result; each is a test of this file or of ``test_padded_sequences.py``."""


@pytest.mark.parametrize("way", EACH_WAY)
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.what)
def test_structures(structure, way):
    given = {"prefix": structure.prefix, "batch": structure.batch, "dense_first": structure.dense_first[WAYS.index(way)]}
    expect_sparse(structure.make, structure.inputs, way, **given)


def test_every_way_takes_the_same_step_for_a_model_whose_own_function_runs_in_eager_code():
    """Its first forward is dense where Dynamo gives the function up; the clock counts it all the same."""
    model, twin = randomise(ListOfLatents()), randomise(ListOfLatents())
    compiled = whole(model)
    grid = GRIDS[0]
    with pytest.warns(lvsa_compile.LvsaWarning, match="graph_break.* Call the model again: the next forward is followed"):
        assert told(compiled(*in_a_list(grid, TIMES[0])), twin, in_a_list(grid, TIMES[0]), grid, 0) == "dense"
    assert [told(compiled(*in_a_list(grid, time)), twin, in_a_list(grid, time), grid, 0) for time in TIMES[1:]] == [1, 2]
    assert lvsa_compile.reports()[-1].sparse_sites


# --- attention over sequences one after the other --------------------------------------------------------------------------------


def one_after_the_other(query, key, value, query_ends, key_ends, scale):
    """By the definition: each sequence attends its own keys."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    starts = zip(query_ends.tolist(), query_ends.tolist()[1:], key_ends.tolist(), key_ends.tolist()[1:], strict=False)
    parts = []
    for q0, q1, k0, k1 in starts:
        weights = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1]) * scale
        parts.append(torch.einsum("hqk,khd->qhd", weights.softmax(-1), value[k0:k1]))
    return torch.cat(parts)


FLASH_ATTN = (
    "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left=-1, SymInt window_size_right=-1,"
    " float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None,"
    " Tensor? seqused_k=None, bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)"
)
XFORMERS = (
    "flash_fwd(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, float p, float softmax_scale, bool is_causal, SymInt window_left, SymInt window_right, bool return_softmax,"
    " Tensor? block_tables) -> (Tensor, Tensor, Tensor)"
)


@pytest.fixture(scope="module")
def flash_attn():
    library = torch.library.Library("flash_attn", "FRAGMENT")
    library.define(FLASH_ATTN)

    def body(q, k, v, query_ends, key_ends, most_q, most_k, dropout, scale, causal, *rest, **more):
        output = one_after_the_other(q, k, v, query_ends, key_ends, scale)
        return output, q.new_zeros(q.shape[1], q.shape[0]), q.new_zeros(0), q.new_zeros(2)

    def fake(q, *rest, **more):
        return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0]), q.new_empty(0), q.new_empty(2)

    library.impl("_flash_attn_varlen_forward", body, "CompositeExplicitAutograd")
    torch.library.register_fake("flash_attn::_flash_attn_varlen_forward", fake, lib=library)

    def attend(q, k, v, query_ends, key_ends, most_q, most_k, scale, **more):
        function = torch.ops.flash_attn._flash_attn_varlen_forward
        return function(q, k, v, query_ends, key_ends, most_q, most_k, 0.0, scale, False, **more)[0]

    yield attend
    library._destroy()


@pytest.fixture(scope="module")
def xformers():
    library = torch.library.Library("xformers_flash", "FRAGMENT")
    library.define(XFORMERS)

    def body(q, k, v, query_ends, key_ends, used, most_q, most_k, dropout, scale, *rest):
        return one_after_the_other(q, k, v, query_ends, key_ends, scale), q.new_zeros(q.shape[1], q.shape[0]), q.new_zeros(2)

    def fake(q, *rest):
        return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0]), q.new_empty(2)

    library.impl("flash_fwd", body, "CompositeExplicitAutograd")
    torch.library.register_fake("xformers_flash::flash_fwd", fake, lib=library)

    def attend(q, k, v, query_ends, key_ends, most_q, most_k, scale):
        return torch.ops.xformers_flash.flash_fwd(
            q, k, v, query_ends, key_ends, None, most_q, most_k, 0.0, scale, False, -1, -1, False, None
        )[0]

    yield attend
    library._destroy()


@pytest.fixture(scope="module")
def of_torch():
    import torch.nn.attention.varlen

    library = torch.library.Library("torch_attn", "IMPL")

    def body(q, k, v, query_ends, key_ends, most_q, most_k, is_causal=False, scale=None, *rest, **more):
        return one_after_the_other(q, k, v, query_ends, key_ends, scale), q.new_zeros(q.shape[1], q.shape[0]), q.new_zeros(2)

    library.impl("_varlen_attn", body, "CPU")

    def attend(q, k, v, query_ends, key_ends, most_q, most_k, scale):
        return torch.ops.torch_attn._varlen_attn(q, k, v, query_ends, key_ends, most_q, most_k, scale=scale)[0]

    yield attend
    library._destroy()


@pytest.mark.parametrize("way", EACH_WAY)
@pytest.mark.parametrize("cut_keys", [False, True])
def test_one_sequence_per_sample(cut_keys, way, flash_attn):
    def make():
        return ListOfLatents(by_sequences(flash_attn, cut_keys))

    expect_sparse(make, in_a_list, way, twin=ListOfLatents, dense_first=2 if way is not eager else 0, batch=2)


@pytest.mark.parametrize("library", ["xformers", "of_torch"])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_sequence_per_sample_of_other_libraries(library, batch, request):
    class Given(Model):
        def run(self, x, grid):
            lengths = torch.full((x.shape[0],), x.shape[1])
            for block in self.blocks:
                x = block(x, lengths)
            return x

    attend = by_sequences(request.getfixturevalue(library), cut_keys=False)
    for way in (whole, eager):
        expect_sparse(lambda: Given(attend=attend), plain, way, twin=Model, batch=batch)


class Sequences(Model):
    """Each sample is sequences of such ``lengths``, made of its number of tokens; a call names the ``longest``."""

    def __init__(self, attend, lengths, longest=max, **more):
        super().__init__()
        self.attend, self.lengths, self.longest, self.more = attend, lengths, longest, more

    def run(self, x, grid):
        lengths = self.lengths(x.shape[1])
        ends, most = ends_of(torch.tensor(lengths * x.shape[0], dtype=torch.int32)), self.longest(lengths)
        for block in self.blocks:
            query, key, value = (t.flatten(0, 1) for t in block.heads(x))
            attended = self.attend(query, key, value, ends, ends, most, most, query.shape[-1] ** -0.5, **self.more)
            x = x + block.out(attended.unflatten(0, x.shape[:2]).flatten(2))
        return x


def halves(tokens):
    return [tokens // 2] * 2


def expect_dense(make, way, reason, detail, inputs=plain):
    model, twin = randomise(make()), randomise(make())
    compiled = compiled_by(way, model)
    before = len(lvsa_compile.reports())
    for time in TIMES:
        assert torch.equal(compiled(*inputs(GRIDS[0], time)), twin(*inputs(GRIDS[0], time)))
    sites = [site for report in lvsa_compile.reports()[before:] for site in report.sites]
    assert {site.reason for site in sites} - {"first_forward"} == {reason}, sites
    assert all(detail in site.detail for site in sites if site.reason == reason), sites
    lvsa_compile.undo(model)


@pytest.mark.parametrize("way", [whole, eager])
def test_sequences_that_are_not_samples_stay_as_they_are(way, flash_attn):
    lengths = "flash_attn._flash_attn_varlen_forward with sequences whose lengths may differ"
    cut_apart = ("layout_unknown", "after view") if way is whole else ("frames_not_contiguous", "54 tokens")  # in the middle of a frame
    expect_dense(lambda: Sequences(flash_attn, halves), way, *cut_apart)
    expect_dense(lambda: Sequences(flash_attn, lambda n: [n], lambda _: 109), way, "form_not_rewritten", lengths)
    cut = "sequences told by their ends that cut the video of a sample apart or join two samples"
    expect_dense(lambda: Sequences(flash_attn, lambda n: [n - 5, 5], sum), way, "form_not_rewritten", cut)
    expect_dense(lambda: Sequences(flash_attn, halves, softcap=30.0), way, "form_not_rewritten", "with softcap=30.0")


@pytest.mark.parametrize(
    ("keys", "given", "detail"),
    [
        ((108, 2, 8), {"cu_seqlens_k": (2,), "max_seqlen_k": 108}, "with sequences whose lengths may differ"),  # under queries by sample
        ((1, 108, 2, 8), {"softmax_scale": ()}, "with a scale that is computed"),
    ],
)
def test_calls_that_are_not_plain_attention(keys, given, detail):
    def flash_attn_func(q, k, v, softmax_scale=None, cu_seqlens_k=None, max_seqlen_k=None):
        raise NotImplementedError

    flash_attn_func.__module__ = "flash_attn_interface"
    graph = torch.fx.Graph()

    def tensor(name, shape):
        node = graph.placeholder(name)
        node.meta["example_value"] = torch.empty(shape)
        return node

    first = [tensor(name, shape) for name, shape in (("q", (1, 108, 2, 8)), ("k", keys), ("v", keys))]
    more = {name: tensor(name, each) if isinstance(each, tuple) else each for name, each in given.items()}
    node = graph.call_function(flash_attn_func, tuple(first), more)
    node.meta["example_value"] = torch.empty(1, 108, 2, 8)
    assert library_ops.match(node).miss.detail == f"flash_attn_interface.flash_attn_func {detail}"


@pytest.mark.parametrize("way", [whole, eager])
def test_structures_that_stay_dense(way):
    expect_dense(InTwoParts, way, "frames_not_contiguous", "latent frames of latents, from frame")
    expect_dense(TurnedAround, way, "layout_unknown", "after flip")


def told_by_pattern(output, twin, inputs, grid, given=0, suffix=0):
    """As ``told``, where the twin masks by its attribute ``pattern``: that of all frames but those ``given``, and of tokens after them."""
    answers, generated = {}, grid[0] - given
    for step in ("dense", *range(oracle.interval(generated, 1, 1, 4))):
        mask = None if step == "dense" else oracle.token_mask(generated, grid[1] * grid[2], step, suffix=suffix, reference=4, window=1)
        twin.pattern = mask
        answers[step] = flat(twin(*inputs))
    return nearest(output, answers)


def expect_sparse_under(way, model, twin, inputs, given=0, suffix=0, dense_first=0):
    """Sparse by the pattern that ``twin`` masks by, at each step of two videos of two sizes; gives the sites of the reports."""
    compiled = compiled_by(way, model)
    before = len(lvsa_compile.reports())
    for grid in GRIDS:
        found = [told_by_pattern(compiled(*inputs(grid, time)), twin, inputs(grid, time), grid, given, suffix) for time in TIMES * 2]
        begins = dense_first if grid is GRIDS[0] else 0
        assert found[begins:] == [0, 1, 2, 0, 1, 2][begins:], found
    lvsa_compile.undo(model)
    return [site for report in lvsa_compile.reports()[before:] for site in report.sites]


@pytest.mark.parametrize("way", EACH_WAY)
def test_a_video_that_is_continued(way):
    """The given frames attend each other, and all of the rest attends them."""
    sites = expect_sparse_under(way, *twins(FramesAmongThemselves), plain, given=2, dense_first=way is by_blocks)
    dense = {site.detail for site in sites if site.reason == "frames_not_contiguous"}
    assert dense == {"2 latent frames of latents, from frame 0 on, are not all of the video's"}


def with_kept_keys(grid, time):
    drawn = torch.Generator().manual_seed(int(time))
    kept = [[torch.randn(1, 2, 2 * grid[1] * grid[2], 8, generator=drawn) for _ in range(2)] for _ in range(2)]
    return *plain(grid, time), kept


@pytest.mark.parametrize("way", EACH_WAY)
@pytest.mark.parametrize("written", [False, True])
def test_keys_that_earlier_calls_kept(written, way):
    """All frames of this call attend them."""
    expect_sparse_under(way, *twins(lambda: KeptKeys(written)), with_kept_keys, dense_first=way in (by_blocks, eager))


def test_a_matrix_that_permutes_frames():
    expect_dense(Permuted, whole, "no_grid", "no input of this graph shows a video grid")


def test_an_op_of_a_host_that_no_fake_tensor_can_run():
    library = torch.library.Library("host_without_fakes", "FRAGMENT")
    library.define("norm(Tensor x) -> Tensor")
    library.impl("norm", lambda x: F.layer_norm(x, x.shape[-1:]), "CPU")

    class Normed(Model):
        def run(self, x, grid):
            return super().run(torch.ops.host_without_fakes.norm(x), grid)

    expect_dense(Normed, eager, "layout_unknown", "after host_without_fakes.norm")
    library._destroy()


def test_an_op_of_a_host_with_a_name_of_torch():
    library = torch.library.Library("host_with_own_meaning", "FRAGMENT")
    library.define("clone(Tensor x) -> Tensor")
    library.impl("clone", lambda x: x.flip(1), "CPU")
    torch.library.register_fake("host_with_own_meaning::clone", torch.empty_like, lib=library)

    class Cloned(Model):
        def run(self, x, grid):
            return torch.ops.host_with_own_meaning.clone(super().run(torch.ops.host_with_own_meaning.clone(x), grid))

    for way in (whole, eager):
        expect_dense(Cloned, way, "layout_unknown", "after host_with_own_meaning.clone")
    library._destroy()


SAGE = (
    "qk_int8_sv_f16_accum_f16_attn(Tensor query, Tensor key, Tensor value, Tensor(a!) output, Tensor query_scale, Tensor key_scale,"
    " int tensor_layout, int is_causal, int qk_quant_gran, float sm_scale, int return_lse) -> Tensor"
)


@pytest.fixture
def sage():
    """Attention of query and key in whole numbers, each head with its own scale."""
    library = torch.library.Library("sageattention", "FRAGMENT")
    library.define(SAGE)

    def body(q, k, v, output, q_scale, k_scale, layout, causal, kind, scale, log_sum_exp):
        weights = ((q.float() * q_scale) @ (k.float() * k_scale).mT * scale).softmax(-1)
        output.copy_(weights @ v)
        return v.new_zeros(0)

    library.impl("qk_int8_sv_f16_accum_f16_attn", body, "CPU")
    fake = lambda q, *rest: q.new_empty(0, dtype=torch.float32)  # noqa: E731
    torch.library.register_fake("sageattention::qk_int8_sv_f16_accum_f16_attn", fake, lib=library)

    def attend(query, key, value, lengths):
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        scales = [t.abs().amax((2, 3), keepdim=True) / 127 for t in (query, key)]
        whole = [(t / scale).round().to(torch.int8) for t, scale in zip((query, key), scales, strict=True)]
        output = torch.empty_like(query)
        torch.ops.sageattention.qk_int8_sv_f16_accum_f16_attn(*whole, value, output, *scales, 1, 0, 2, query.shape[-1] ** -0.5, 0)
        return output.transpose(1, 2)

    yield attend
    library._destroy()


@pytest.mark.parametrize("way", [whole, of_any_size, by_blocks])
def test_quantised_attention_is_named(way, sage):
    expect_dense(lambda: Model(attend=sage), way, "form_not_rewritten", "sageattention.qk_int8_sv_f16_accum_f16_attn is used here")


def test_quantised_attention_in_eager_code_is_named(sage):
    model, twin = randomise(Model(attend=sage)), randomise(Model(attend=sage))
    with pytest.warns(lvsa_compile.LvsaWarning, match=r"Ops of other libraries ran: sageattention.qk_int8_sv_f16_accum_f16_attn\.$"):
        assert torch.equal(eager(model)(*plain(GRIDS[0], TIMES[0])), twin(*plain(GRIDS[0], TIMES[0])))


def test_a_context_that_allows_one_kernel():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    class Chosen(Model):
        def forward(self, latents, timestep):
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
                return super().forward(latents, timestep)

    for way in (whole, eager):
        expect_sparse(Chosen, plain, way, twin=Model)
