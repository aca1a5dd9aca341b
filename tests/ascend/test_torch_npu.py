"""Against the real torch_npu over libraries of CANN that do nothing (``make test-ascend``): what can be proven without an NPU.

That is: the calls are accepted by torch_npu's schemas and meta kernels, and torchair makes a GE graph of them; that the graph computes the
right thing, with the ops' meaning in plain PyTorch.  Nothing about results or speed on an NPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import warnings
import zipfile
from pathlib import Path

import kernels
import oracle
import pytest
import test_models as models
import torch
from plans import attention_call
from tiny_models import PATTERN, timesteps, wan, wan_inputs
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel

import lvsa_compile
from lvsa_compile import FramePattern
from lvsa_compile.compilers import torchair as bridge
from lvsa_compile.lowering.ascend import block_sparse as ascend_block_sparse
from lvsa_compile.lowering.ascend import gather as ascend_gather
from lvsa_compile.lowering.ascend import ops as ascend_ops
from lvsa_compile.lowering.ascend import paged as ascend_paged
from lvsa_compile.policies.tables import VideoSpan
from lvsa_compile.selection import select
from lvsa_compile.selection.contract import AttentionCall

try:
    torch_npu = importlib.import_module("torch_npu")
    torchair = importlib.import_module("torch_npu.dynamo.torchair")
except (ImportError, RuntimeError) as problem:
    pytest.skip(f"no torch_npu here ({problem}); make test-ascend sets one up", allow_module_level=True)

MODULES = {"paged": ascend_paged, "gather": ascend_gather, "block_sparse": ascend_block_sparse}
OLDER_WHEELS = sorted(Path(os.environ.get("LVSA_TORCH_NPU_WHEELS", "/nowhere")).glob("torch_npu-2.11*.whl"))


def on_any_device(name: str):
    return dataclasses.replace(MODULES[name].LOWERING, unavailable=lambda device: None)


@pytest.fixture
def wide(monkeypatch):
    """The lowerings in float32 on the CPU, to see errors that half precision hides."""
    kernels.install()
    monkeypatch.setattr(ascend_ops, "_DTYPES", (torch.float32,))
    monkeypatch.setattr(kernels, "DTYPES", {torch.float32})
    return monkeypatch


@contextlib.contextmanager
def graphs_of_torchair():
    """The GE graphs that torchair makes inside, each a list of its ops' types; its engine, which is not here, is not started."""
    converter = importlib.import_module("torchair._ge_concrete_graph.fx2ge_converter")
    made: list[list[str]] = []
    before = converter.initialize_graph_engine, converter.GeConcreteGraph.optimize_graph_without_runtime

    def note(self, *args, **kwargs):
        made.append([op.type for op in self.graph.op])

    converter.initialize_graph_engine = lambda *args, **kwargs: None
    converter.GeConcreteGraph.optimize_graph_without_runtime = note
    try:
        yield made
    finally:
        converter.initialize_graph_engine, converter.GeConcreteGraph.optimize_graph_without_runtime = before


def eager_after_conversion():
    """torchair as a backend that makes its GE graph and then runs the graph it was made of."""
    config = torchair.CompilerConfig()
    config.mode = "max-autotune"
    config.debug.run_eagerly = True
    return torchair.get_npu_backend(compiler_config=config)


def arguments(schema) -> dict[str, str]:
    return {argument.name: f"{argument.type} {argument.default_value}" for argument in schema.arguments}


@pytest.mark.parametrize("name", kernels.SCHEMAS)
def test_the_schemas_the_stand_ins_use_are_parts_of_the_real_ones(name):
    real = arguments(getattr(torch.ops.npu, name).default._schema)
    ours = arguments(torch._C.parse_schema(f"npu::{name}{kernels.SCHEMAS[name]}"))
    assert ours.items() <= real.items()
    assert [argument for argument in real if argument in ours] == list(ours)


@pytest.mark.skipif(not OLDER_WHEELS, reason="no wheel of torch_npu 2.11 in LVSA_TORCH_NPU_WHEELS")
@pytest.mark.parametrize("name", kernels.SCHEMAS)
def test_torch_npu_2_11_has_the_same_schemas(name):
    with zipfile.ZipFile(OLDER_WHEELS[-1]) as wheel:
        (listing,) = [path for path in wheel.namelist() if path.endswith("npu_native_functions_by_codegen.yaml")]
        text = wheel.read(listing).decode()
    (schema,) = set(re.findall(rf"func: ({name}\(.*)$", text, re.MULTILINE))
    real = arguments(torch._C.parse_schema(f"npu::{schema}"))
    assert arguments(torch._C.parse_schema(f"npu::{name}{kernels.SCHEMAS[name]}")).items() <= real.items()


def call_of(name: str, device: str, batch: int = 1, masked: bool = False) -> AttentionCall:
    tokens, dim = (256, 64) if name == "block_sparse" else (150, 64)
    pattern, span = FramePattern(9, 1, 1, 4), VideoSpan(128, 9, tokens, 9)
    return attention_call(torch.device(device), torch.bfloat16, batch, 4, 2, dim, dim, span, span, pattern, masked=masked)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_the_meta_kernels_take_the_calls(name, batch, masked):
    if masked and name == "block_sparse":
        pytest.skip("it refuses masks")
    call = call_of(name, "meta", batch, masked)
    lowering = on_any_device(name)
    assert lowering.refusal(call) is None
    run = lowering.on_device(call)
    shape = (batch, call.query.length, 4, 64)
    query, key, value = (torch.empty(*shape[:2], heads, 64, device="meta", dtype=call.dtype).transpose(1, 2) for heads in (4, 2, 2))
    mask = torch.empty(batch, 1, 1, call.key.length, dtype=torch.bool, device="meta") if masked else None
    output, log_sum_exp = run(query, key, value, torch.zeros((), dtype=torch.int32, device="meta"), key_mask=mask)
    assert (output.shape, output.dtype) == (query.shape, call.dtype)
    assert (log_sum_exp.shape, log_sum_exp.dtype) == (query.shape[:3], torch.float32)


def test_the_meta_kernels_turn_down_what_breaks_their_rules():
    """So that taking the calls above says something."""
    tensor = torch.empty(1, 2, 256, 64, device="meta", dtype=torch.bfloat16)
    blocks = torch.empty(1, 2, 2, 2, device="meta", dtype=torch.int8)
    with pytest.raises(RuntimeError, match="must be a multiple of 128"):
        torch.ops.npu.npu_block_sparse_attention(tensor, tensor, tensor, blocks, [128, 100], q_input_layout="BNSD", kv_input_layout="BNSD")
    with pytest.raises(RuntimeError, match="inner_precise must be 0"):
        torch.ops.npu.npu_block_sparse_attention(tensor, tensor, tensor, blocks, [128, 128], q_input_layout="BNSD", kv_input_layout="BNSD")
    with pytest.raises(RuntimeError, match="is not supported"):
        torch.ops.npu.npu_fused_infer_attention_score(tensor, tensor, tensor, num_heads=2, input_layout="SNBD")
    table = torch.empty(1, 2, device="meta", dtype=torch.int32)
    paged = {"block_table": table, "block_size": 128, "num_heads": 2, "input_layout": "BSND"}
    with pytest.raises(RuntimeError, match="value's dim should be 3/4/5"):
        torch.ops.npu.npu_fused_infer_attention_score(tensor, tensor[0, 0], tensor[0, 0], **paged)
    with pytest.raises(RuntimeError, match="block_tables"):
        torch.ops.npu.npu_fused_infer_attention_score(tensor, tensor, tensor, block_tables=blocks)


@pytest.mark.parametrize("name", ["paged", "gather"])
def test_wan_becomes_a_ge_graph_with_the_fused_op_at_each_site(name, wide):
    """And the graph that it was made of computes masked attention, at all steps, without a recompile."""
    wide.setattr(select, "lowerings", lambda: (on_any_device(name),))
    model = wan(num_layers=3)
    with graphs_of_torchair() as graphs, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the CPU's own kernel is nothing that GE knows
        compiled = torch.compile(model, backend="lvsa", options={**PATTERN, "inner": eager_after_conversion()})
        for step, timestep in enumerate(timesteps(6)):
            given = wan_inputs(timestep=timestep)
            with oracle.MaskedAttention(oracle.token_mask(9, 12, step, window=1, reference=4)):
                wanted = model(**given)[0]
            found = compiled(**given)[0]
            assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4
    (graph,) = graphs
    assert graph.count("FusedInferAttentionScore") == 3
    assert {site.lowering for site in lvsa_compile.reports()[0].sparse_sites} == {f"ascend_{name}"}


@pytest.mark.parametrize("name", ["paged", "gather"])
@pytest.mark.parametrize("entry", [entry for entry, facts in models.MODELS.items() if facts.whole and not facts.dense])
def test_every_model_at_every_phase(name, entry, wide):
    """The ops of torch_npu with their meaning in plain PyTorch, beside the uncompiled model under explicit masks."""
    if entry == "mochi":
        pytest.skip("they refuse texts whose length is known only while the model runs")
    wide.setattr(select, "lowerings", lambda: (on_any_device(name),))
    facts = models.MODELS[entry]
    network, given = models.built(entry)
    phases = FramePattern(models.FRAMES, 1, 1, 4).phases
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forward = torch.compile(network, backend="lvsa", options={**PATTERN, "inner": "aot_eager"}, fullgraph=facts.fullgraph)
        for step, timestep in enumerate(timesteps(phases)):
            mask = oracle.token_mask(models.FRAMES, models.TOKENS, step, prefix=facts.before, suffix=facts.after, window=1, reference=4)
            mode = oracle.MaskedAttention(mask)
            mode.replaces_masks = True
            with mode:
                wanted = models.answer(network, given, timestep)
            kernels.calls.clear()
            assert models.error(models.answer(forward, given, timestep), wanted) < 1e-4
            assert kernels.calls.count("npu_fused_infer_attention_score") >= mode.calls


class Collected(Exception):
    """Raised in the place of running what was compiled: there is nothing to run it on."""


def on_the_npu(value):
    if isinstance(value, torch.Tensor):
        return value.to("npu", torch.bfloat16 if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {name: on_the_npu(item) if name != "timestep" else item.to("npu") for name, item in value.items()}
    return type(value)(map(on_the_npu, value)) if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("entry", [entry for entry, facts in models.MODELS.items() if facts.whole and entry != "mochi"])
def test_on_an_npu_the_layouts_are_those_of_the_cpu_and_the_real_meta_kernels_take_the_graph(entry, monkeypatch):
    """Of Mochi torch_npu's own attention fails on a text of unknown length while Dynamo traces it."""
    kernels.install()
    monkeypatch.setattr(select, "smoke_tested", lambda lowering, call: None)  # nothing computes here
    facts = models.MODELS[entry]
    network, given = models.built(entry)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_the_cpu = lvsa_compile.explain(network, options=PATTERN, **given)
        seen: list[str] = []

        def collect(graph_module, example_inputs):
            seen.extend(str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")
            raise Collected

        inner = aot_autograd(fw_compiler=collect, inference_compiler=collect)
        compiled = torch.compile(network.to(torch.bfloat16).to("npu"), backend="lvsa", options={**PATTERN, "inner": inner})
        with torch.no_grad(), pytest.raises(Exception, match="Collected"):
            compiled(**on_the_npu(given))
    (report,) = lvsa_compile.reports()
    decided = [(site.name, site.decision, site.layout, site.reason) for site in report.sites]
    assert decided == [(site.name, site.decision, site.layout, site.reason) for site in on_the_cpu.sites]
    assert {site.lowering for site in report.sparse_sites} == (set() if facts.dense else {"ascend_paged"})
    rows_beside_the_video = bool(facts.before or facts.after)
    fused = seen.count("npu.npu_fused_infer_attention_score.default")
    assert fused == len(report.sparse_sites) * (1 + rows_beside_the_video)
    assert not any(target.startswith("lvsa.") for target in seen)


def test_torch_npus_own_compilers_are_found_by_name():
    assert bridge.npu_backend("torchair").__module__ == "torch_npu.dynamo"
    assert bridge.npu_backend("npugraph_ex").__module__ == "torch_npu.dynamo"


def test_torch_npu_2_11_registers_nothing_and_is_served_all_the_same(monkeypatch):
    def missing(name):
        raise RuntimeError(f"no backend {name}")

    monkeypatch.setattr(bridge.compat, "lookup_backend", missing)
    for name, mode in (("torchair", "max-autotune"), ("npugraph_ex", "npugraph_ex")):
        seen = []
        monkeypatch.setattr(torchair, "get_npu_backend", lambda compiler_config, seen=seen: seen.append(compiler_config.mode.value))
        bridge.npu_backend(name)
        assert seen == [mode]
