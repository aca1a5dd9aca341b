"""The lowerings for Ascend NPUs over stand-ins of torch_npu's ops (``ascend/kernels.py``), against masked attention by its definition."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import PATTERN, VideoDiT, dit_inputs, randomise, timesteps, wan, wan_inputs

import lvsa_compile
from lvsa_compile import FramePattern
from lvsa_compile.errors import OptionError
from lvsa_compile.lowering.ascend import block_sparse as ascend_block_sparse
from lvsa_compile.lowering.ascend import gather as ascend_gather
from lvsa_compile.lowering.ascend import ops as ascend_ops
from lvsa_compile.lowering.ascend import paged as ascend_paged
from lvsa_compile.lowering.ascend.pages import PAGE, PageLayout, frame_slots
from lvsa_compile.options import parse_options
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.selection import select
from lvsa_compile.selection import smoke_test as trial
from lvsa_compile.selection.contract import AttentionCall

sys.path.insert(0, str(Path(__file__).parent / "ascend"))
import kernels
from plans import attention_call

CPU = torch.device("cpu")
LOWERINGS = {
    name: dataclasses.replace(module.LOWERING, unavailable=lambda device: None)
    for name, module in (("paged", ascend_paged), ("gather", ascend_gather), ("block_sparse", ascend_block_sparse))
}
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


@pytest.fixture(autouse=True, scope="module")
def emulated():
    kernels.install()


def call_of(
    pattern, query, key=None, dtype=torch.float16, heads=2, key_heads=2, head_dim=16, value_dim=0, batch=1, **more
) -> AttentionCall:
    return attention_call(CPU, dtype, batch, heads, key_heads, head_dim, value_dim or head_dim, query, key or query, pattern, **more)


def tensors(call: AttentionCall, large: float = 1.0) -> list[torch.Tensor]:
    sizes = [
        (call.batch, call.query.length, call.query_heads, call.head_dim),
        (call.batch, call.key.length, call.key_heads, call.head_dim),
        (call.batch, call.key.length, call.key_heads, call.value_dim),
    ]
    return [(torch.randn(size) * large).to(call.dtype).transpose(1, 2) for size in sizes]


def expected(call: AttentionCall, step: int, query, key, value, scale=None, key_mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    """By the definition, in float64; queries and keys may have different text."""
    pattern = call.plan.frames
    mask = torch.ones(call.query.length, call.key.length, dtype=torch.bool)
    for frame in range(pattern.frames):
        keep = oracle.attended(pattern.frames, pattern.window, pattern.first_frames, pattern.interval, step, frame, pattern.expand_window)
        first = call.query.prefix + frame * call.query.tokens_per_frame
        rows = slice(first, first + call.query.tokens_per_frame)
        for other in set(range(pattern.frames)) - keep:
            at = call.key.prefix + other * call.key.tokens_per_frame
            mask[rows, at : at + call.key.tokens_per_frame] = False
    added = None
    if key_mask is not None:
        added = torch.zeros(key_mask.shape).masked_fill(~key_mask, -torch.inf) if key_mask.dtype == torch.bool else key_mask
    return oracle.dense(query, key, value, mask, scale, added)


def check(name: str, call: AttentionCall, steps, scale=None, key_mask=None, large: float = 1.0) -> None:
    lowering = LOWERINGS[name]
    assert lowering.refusal(call) is None
    run = lowering.on_device(call)
    query, key, value = tensors(call, large)
    for step in steps:
        phase = torch.tensor(step % call.plan.table.rows, dtype=torch.int32)
        output, log_sum_exp = run(query, key, value, phase, scale=scale, key_mask=key_mask)
        wanted, wanted_lse = expected(call, step, query, key, value, scale, key_mask)
        assert output.shape == wanted.shape
        assert output.dtype == call.dtype
        assert float((output - wanted).abs().max() / wanted.abs().max()) < TOLERANCE[call.dtype]
        assert torch.allclose(log_sum_exp.double(), wanted_lse.double(), atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize("name", ["paged", "gather"])
@settings(max_examples=16)
@given(
    frames=st.integers(3, 10),
    tokens=st.sampled_from([2, 5, 100, 128, 130, 256]),
    around=st.sampled_from([(0, 0), (7, 0), (0, 5), (130, 3), (0, 256), (1, 127)]),
    window=st.integers(0, 2),
    first=st.integers(1, 2),
    reference=st.integers(2, 6),
    expand=st.booleans(),
    group=st.sampled_from([1, 2]),
    batch=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([8, 16, 24]),
    scale=st.sampled_from([None, 0.3, -0.2, 0.01]),
    masked=st.booleans(),
    step=st.integers(0, 9),
)
def test_it_is_masked_attention(
    name, frames, tokens, around, window, first, reference, expand, group, batch, head_dim, scale, masked, step
):
    pattern = FramePattern(frames, window, first, reference, expand_window=expand)
    span = VideoSpan(around[0], frames, tokens, around[1])
    call = call_of(pattern, span, heads=2, key_heads=2 // group, head_dim=head_dim, batch=batch, masked=masked)
    key_mask = None
    if masked:
        key_mask = torch.rand(batch, 1, 1, span.length) < 0.8
        key_mask[..., around[0]] = True
    check(name, call, [step], scale, key_mask)


@pytest.mark.parametrize("name", ["paged", "gather"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_phase_large_scores_and_values_of_another_width(name, dtype):
    pattern, span = FramePattern(11, 1, 1, 4), VideoSpan(0, 11, 130, 9)
    assert frame_slots(pattern, pattern.phases).some_empty, "a phase attends fewer frames"
    check(name, call_of(pattern, span, dtype=dtype), range(pattern.phases), large=3.0)
    check(name, call_of(pattern, span, dtype=dtype, head_dim=16, value_dim=32), [0])
    check(name, call_of(pattern, VideoSpan(0, 11, 130, 0), VideoSpan(9, 11, 130, 0), dtype=dtype), [1])


def test_a_float_mask_is_added_to_the_scores_in_float32():
    """Of which a bfloat16 alone would keep eight bits."""
    pattern, span = FramePattern(9, 1, 1, 4), VideoSpan(0, 9, 12, 7)
    mask = torch.randn(1, 2, 1, span.length) * 10
    mask[..., 3] = -torch.inf
    mask[..., 5] = -1e4
    given = call_of(pattern, span, dtype=torch.bfloat16, masked=True)
    for scale in (None, 0.05):
        check("paged", given, [2], scale, mask)
        columns = ascend_ops._added(mask, torch.empty(1, span.length, 2, 16, dtype=torch.bfloat16), 0.5, -6e4)
        finite = mask[0, :, 0].isfinite()
        assert torch.allclose((columns.float().sum(3) * 0.5)[0].T[finite], mask[0, :, 0][finite], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("tokens", "prefix", "suffix"), [(128, 0, 0), (256, 128, 20), (128, 256, 1)])
def test_blocks_of_whole_frames(tokens, prefix, suffix):
    pattern, span = FramePattern(9, 1, 1, 4), VideoSpan(prefix, 9, tokens, suffix)
    check("block_sparse", call_of(pattern, span, head_dim=64, heads=2, key_heads=1, batch=2), [0, 3])


@pytest.mark.parametrize("name", LOWERINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_it_passes_the_trial_that_it_meets_on_an_npu(name, masked):
    if masked and name == "block_sparse":
        pytest.skip("it refuses masks")
    assert trial._error(LOWERINGS[name], CPU, torch.float16, 2, 64, masked) < 2e-3


def test_the_trial_of_pages_needs_shared_ones():
    """As a model's does: fewer pages than all sequences together use."""
    pattern = trial._POLICY.pattern(trial._FRAMES, trial._HORIZON.frames)
    tokens, text = LOWERINGS["paged"].smoke_test_tokens
    layout = PageLayout(frame_slots(pattern, pattern.phases), tokens, text)
    assert layout.full
    assert layout.around_full
    assert layout.tail
    assert layout.pages < pattern.frames * -(-layout.keys // PAGE)


@pytest.mark.parametrize("name", ["paged", "gather"])
def test_rows_without_keys_are_zero(name):
    pattern, span = FramePattern(9, 1, 1, 4), VideoSpan(0, 9, 12, 7)
    call = call_of(pattern, span, batch=2, masked=True)
    run = LOWERINGS[name].on_device(call)
    mask = torch.ones(2, 1, 1, span.length, dtype=torch.bool)
    mask[0] = False
    mask[1, ..., :] = False
    mask[1, ..., 7 * 12 : 8 * 12] = True  # a frame that not every frame attends
    query, key, value = tensors(call)
    output, log_sum_exp = run(query, key, value, torch.tensor(0, dtype=torch.int32), key_mask=mask)
    wanted, wanted_lse = expected(call, 0, query, key, value, None, mask)
    assert (output[0] == 0).all()
    assert torch.equal(log_sum_exp == -torch.inf, wanted_lse == -torch.inf)
    assert float((output - wanted).abs().max()) < 2e-3


@pytest.mark.parametrize("scale", [0.0, 1e-8, -1e-5, 50.0])
@pytest.mark.parametrize("masked", [False, True])
def test_any_scale(scale, masked):
    pattern, span = FramePattern(11, 1, 1, 4), VideoSpan(0, 11, 12, 7)
    mask = torch.rand(1, 1, 1, span.length) < 0.8
    check("paged", call_of(pattern, span, masked=masked), [0, 5], scale, mask if masked else None)


def test_one_compile_serves_any_batch(monkeypatch):
    """Dynamo makes the batch symbolic at its second size."""
    monkeypatch.setattr(select, "lowerings", lambda: (LOWERINGS["paged"],))
    model = wan(num_layers=1).to(torch.bfloat16)
    compiled = torch.compile(model, backend="lvsa", options={**PATTERN, "inner": "eager"})
    for batch in (1, 2, 3, 4, 2):
        given = {
            key: value.to(torch.bfloat16) if key != "timestep" and isinstance(value, torch.Tensor) else value
            for key, value in wan_inputs(batch=batch).items()
        }
        with torch.no_grad():
            with oracle.MaskedAttention(oracle.token_mask(9, 12, 0, window=1, reference=4)):
                wanted = model(**given)[0].float()
            found = compiled(**given)[0].float()
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-2


def test_gathering_keeps_to_its_bound_and_chunks_change_nothing(monkeypatch):
    pattern, span = FramePattern(9, 1, 1, 4), VideoSpan(0, 9, 12, 7)
    given = call_of(pattern, span, batch=2)
    whole = ascend_gather.GatheredAttention(given, frame_slots(pattern, pattern.phases))
    assert whole.frames_at_a_time >= 9
    monkeypatch.setattr(ascend_gather, "_MOST_BYTES", 60_000)
    assert 1 < whole.frames_at_a_time < 9
    kernels.calls.clear()
    check("gather", given, [4])
    assert len(kernels.calls) == -(-9 // whole.frames_at_a_time) + 1  # and one for the text
    keys = whole.slots.slots * 12 + 7
    assert whole.frames_at_a_time * 2 * 2 * keys * 32 * 2 <= 60_000


def test_pages_hold_all_keys_of_a_frame_in_order_and_share_what_frames_share():
    """Oracle: following the table through numbered pages gives the token numbers that the pattern says."""
    pattern, tokens, around = FramePattern(7, 1, 1, 3), 300, 140
    slots = frame_slots(pattern, pattern.phases)
    layout = PageLayout(slots, tokens, around)
    assert (layout.full, layout.around_full, layout.tail_tokens) == (2, 1, slots.slots * 44 + 12)
    table = torch.tensor(layout.table())
    assert table.shape == (pattern.phases, 7, slots.slots * 2 + 1 + layout.tail)
    assert int(table.max()) == layout.pages - 1
    for phase in range(pattern.phases):
        for frame in range(7):
            row = table[phase, frame].tolist()
            shown = [page // 2 for page in row[: 2 * slots.slots : 2] if page < 14]
            assert shown == pattern.attended(frame, phase)
            assert row[2 * slots.slots] == 14, "the text's page"
    assert layout.keys <= table.shape[2] * PAGE


SPAN = VideoSpan(0, 9, 12, 0)
PLAIN = dict(
    device=CPU, dtype=torch.float16, batch=1, query_heads=2, key_heads=2, head_dim=16, value_dim=16, query=SPAN, key=SPAN,
    pattern=FramePattern(9, 1, 1, 4),
)  # fmt: skip


@pytest.mark.parametrize(("name", "change", "text"), [
    ("paged", dict(dtype=torch.float32), "torch_npu's fused attention takes bfloat16 and float16, not torch.float32"),
    ("paged", dict(dense_steps=1), "dense_steps makes a step that attends everything, and its shapes are those of the sparse steps"),
    ("gather", dict(allowed=(((0, 108),),) * 9), "a constant mask leaves frames keys of their own, its tables hold whole frames"),
    ("gather", dict(head_dim=512, value_dim=512), "torch_npu's fused attention takes head dims up to 512, not 528"),
    ("paged", dict(query_heads=512, key_heads=512), "torch_npu's fused attention takes 256 heads, 64 to a key head, not 512"),
    ("paged", dict(batch=10_000), "torch_npu's fused attention takes batches up to 65536, not 10000 of 9 frames"),
    ("gather", dict(key=VideoSpan(1, 9, 12, 0, free_start=True)), "its tables want numbers of tokens that are known when it is compiled"),
    ("paged", dict(query=VideoSpan(0, 9, 12, 0, open_ended=True)), "its tables want numbers of tokens that are known when it is compiled"),
    ("paged", dict(masked=True, mask_heads=4, query_heads=4), "its keys have 2 heads, the mask 4"),
    ("gather", dict(query=VideoSpan(0, 9, 1, 0)), "frames of one token go to another kernel of torch_npu"),
    ("block_sparse", dict(compiler="torchair"), "torchair may have no converter for npu_block_sparse_attention"),
    ("block_sparse", dict(masked=True), "npu_block_sparse_attention takes no key mask"),
    ("block_sparse", dict(), "npu_block_sparse_attention takes equal head dims of 64 or 128, not 16 and 16"),
    ("block_sparse", dict(head_dim=64, value_dim=64), "a latent frame has 12 tokens after 0 others, which are not blocks of 128"),
])  # fmt: skip
def test_what_it_refuses_says_why(name, change, text):
    given = attention_call(**{**PLAIN, **change})
    assert LOWERINGS[name].refusal(given) == text


def test_what_knows_only_its_own_ops_leaves_ours_alone():
    given = call_of(FramePattern(9, 1, 1, 4), VideoSpan(0, 9, 12, 0), compiler="torchair")
    reference = next(found for found in select.lowerings() if found.name == "reference")
    assert reference.refusal(given) == "torchair compiles the graph and knows no ops of this package"
    assert LOWERINGS["paged"].refusal(given) is None


def test_a_device_that_is_no_npu():
    assert ascend_ops.why_no_npu(CPU) == "it runs on npu, not on cpu"


@pytest.mark.parametrize("name", ["paged", "gather"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_model_compiles_to_the_ops_and_turns_with_the_steps(name, inner, monkeypatch):
    """No recompile over the steps, and nothing but torch_npu's op in the place of attention."""
    monkeypatch.setattr(select, "lowerings", lambda: (LOWERINGS[name],))
    seen = []

    def record(graph_module, example_inputs):
        seen.append([str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"])
        backend = torch._dynamo.lookup_backend("aot_eager")
        return graph_module.forward if inner == "eager" else backend(graph_module, example_inputs)

    model = wan(num_layers=2).to(torch.bfloat16)
    compiled = torch.compile(model, backend="lvsa", options={**PATTERN, "inner": record})
    for step, timestep in enumerate(timesteps(3)):
        given = {
            key: value.to(torch.bfloat16) if key != "timestep" and isinstance(value, torch.Tensor) else value
            for key, value in wan_inputs(timestep=timestep).items()
        }
        with torch.no_grad():
            mode = oracle.MaskedAttention(oracle.token_mask(9, 12, step, window=1, reference=4))
            with mode:
                wanted = model(**given)[0].float()
            kernels.calls.clear()
            found = compiled(**given)[0].float()
        assert kernels.calls == ["npu_fused_infer_attention_score"] * 2
        assert mode.calls == 2
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-2
    assert len(seen) == 1
    (report,) = lvsa_compile.reports()
    assert {site.lowering for site in report.sparse_sites} == {f"ascend_{name}"}
    assert report.options["inner"].endswith("record")


class Fused(VideoDiT):
    """Attention as diffusers' ``_native_npu`` backend calls it."""

    def __init__(self, **given):
        super().__init__(lambda model, tokens, grid, text: self.attend(tokens))
        self.given = given

    def attend(self, tokens):
        heads = tokens.unflatten(-1, (2, -1))
        said = {"input_layout": "BSND", "scale": 0.3, "pre_tockens": 65536, "next_tockens": 65536, "keep_prob": 1.0, **self.given}
        return tokens + torch.ops.npu.npu_fusion_attention(heads, heads, heads, 2, **said)[0].flatten(2)


@pytest.mark.process
def test_torch_npus_own_attention_is_rewritten():
    model, given = randomise(Fused()), dit_inputs()
    with torch.no_grad():
        compiled = torch.compile(model, backend="lvsa", options={**PATTERN, "inner": "eager"})
        found = compiled(*given)
        mask = oracle.token_mask(9, 12, 0, window=1, reference=4)
        model.given = {"atten_mask": ~mask}
        wanted = model(*given)
    assert lvsa_compile.reports()[0].sites[0].decision == "sparse"
    assert float((found - wanted).abs().max()) < 1e-5


@pytest.mark.process
@pytest.mark.parametrize("layout", ["BSND", "BNSD"])
def test_torch_npus_own_attention_is_sparse_in_eager_code(layout):
    def attend(model, tokens, grid, text):
        heads = tokens.contiguous().unflatten(-1, (2, -1))
        heads = heads if layout == "BSND" else heads.transpose(1, 2).contiguous()
        out = torch.ops.npu.npu_fusion_attention(heads, heads, heads, 2, layout, scale=0.3, **model.given)[0]
        return (out if layout == "BSND" else out.transpose(1, 2)).flatten(2)

    model, given = randomise(VideoDiT(attend)), dit_inputs()
    model.given = {}
    lvsa_compile.enable(model, **PATTERN, strict=True)
    with torch.no_grad():
        found = model(*given)
        model.given = {"atten_mask": ~oracle.token_mask(9, 12, 0, window=1, reference=4)}
        wanted = lvsa_compile.undo(model)(*given)
    assert lvsa_compile.reports()[0].sites[0].decision == "sparse"
    assert float((found - wanted).abs().max()) < 1e-5


def test_torch_npus_own_attention_with_fewer_key_heads():
    def attend(tokens):
        heads = tokens.unflatten(-1, (4, -1))
        return tokens + torch.ops.npu.npu_fusion_attention(heads, heads[:, :, :2], heads[:, :, :2], 4, "BSND", scale=0.3)[0].flatten(2)

    model, given = randomise(VideoDiT(lambda model, tokens, grid, text: attend(tokens))), dit_inputs()
    with torch.no_grad():
        found = torch.compile(model, backend="lvsa", options={**PATTERN, "inner": "eager", "dense_steps": 1})(*given)
        assert float((found - model(*given)).abs().max()) < 1e-4
    assert lvsa_compile.reports()[0].sites[0].decision == "sparse"


@pytest.mark.parametrize(("given", "reason", "text"), [
    ({"atten_mask": torch.zeros(108, 108, dtype=torch.bool)}, "form_not_rewritten", "npu.npu_fusion_attention with atten_mask="),
    ({"keep_prob": 0.9}, "dropout", "dropout_p=0.0"),
    ({"sparse_mode": 2}, "form_not_rewritten", "npu.npu_fusion_attention with sparse_mode=2"),
    ({"input_layout": "SBH"}, "form_not_rewritten", "npu.npu_fusion_attention with input_layout=SBH"),
])  # fmt: skip
def test_torch_npus_own_attention_that_is_more_than_attention_stays(given, reason, text):
    report = lvsa_compile.explain(randomise(Fused(**given)), *dit_inputs(), options=PATTERN)
    (site,) = report.sites
    assert site.reason == reason
    assert site.detail.startswith(text)


def test_inner_takes_a_backend_and_names_what_it_does_not_know():
    assert parse_options({}).inner_on("npu") == "torchair"
    assert parse_options({}).inner_on("cpu") == "inductor"
    assert parse_options({"inner": "eager"}).inner_on("npu") == "eager"
    with pytest.raises(OptionError, match="verify=True: its comparison is an op that only torch's own compilers know"):
        parse_options({"inner": "torchair", "verify": True})
    with pytest.raises(OptionError, match="this is Inductor's, and inner='torchair' does not use Inductor"):
        parse_options({"inner": "torchair", "mode": "max-autotune"})
    for name, value in (("mode", "max-autotune"), ("triton.cudagraphs", True), ("verify", True)):
        assert parse_options({name: value}).on("cuda").inner == "auto"
        with pytest.raises(OptionError, match=name):
            parse_options({name: value}).on("npu")


def test_without_torch_npu_the_error_names_it():
    pytest.importorskip("torch")
    if "torch_npu" in sys.modules:
        pytest.skip("torch_npu is here")
    with pytest.raises(Exception, match="option inner='torchair': torch_npu cannot be imported"), torch.no_grad():
        torch.compile(wan(num_layers=1), backend="lvsa", options={**PATTERN, "inner": "torchair"})(**wan_inputs())
