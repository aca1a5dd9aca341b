"""What tests/test_parallel.py runs in several processes: ``python parallel_runs.py NAME RANK WORLD PORT``; rank 0 prints a line of JSON."""

from __future__ import annotations

import json
import os
import sys
import warnings

import oracle
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from tiny_models import EXACT, timesteps, wan, wan_inputs

import lvsa_compile

FRAMES, ROWS, COLUMNS = 9, 2, 4
OPTIONS = dict(num_attention_heads=4, attention_head_dim=12)


def compiled(model, how):
    if how == "regional":
        return lvsa_compile.compile_repeated_blocks(model, options=EXACT)
    return torch.compile(model, backend="lvsa", options=EXACT)


def ulysses(model, world):
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    return model


def ring(model, world):
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=world))
    return model


def plain(model, world):
    return model


def tensor_parallel(model, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        plan = {"ffn.net.0.proj": ColwiseParallel(), "ffn.net.2": RowwiseParallel()}
        for name in ("attn1", "attn2"):
            plan |= {f"{name}.to_q": ColwiseParallel(), f"{name}.to_k": ColwiseParallel(), f"{name}.to_v": ColwiseParallel()}
            plan |= {f"{name}.to_out.0": RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    return model


def fully_sharded(model, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


SPREAD = {f.__name__: f for f in (ulysses, ring, plain, tensor_parallel, fully_sharded)}


def main(name: str, rank: int, world: int, port: str) -> None:
    warnings.filterwarnings("ignore")
    torch.accelerator.device_count = lambda: 1  # diffusers counts accelerators to number devices, and here is none
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    spread, how = name.split("-")
    alone, together = wan(**OPTIONS), SPREAD[spread](wan(**OPTIONS), world)
    model = compiled(together, how)
    errors, dense_errors = [], []
    graphs = None
    for step, value in enumerate(timesteps(4)):
        inputs = wan_inputs(FRAMES, ROWS, COLUMNS, timestep=value)
        with torch.no_grad():
            output = model(**inputs)[0]
            mask = oracle.token_mask(FRAMES, ROWS * COLUMNS, step, reference=4, window=1)
            dense = alone(**inputs)[0]
            with oracle.MaskedAttention(mask):
                answer = alone(**inputs)[0]
        graphs = graphs or torch._dynamo.utils.counters["stats"]["unique_graphs"]
        errors.append(float((output - answer).abs().max() / answer.abs().max()))
        dense_errors.append(float((output - dense).abs().max() / dense.abs().max()))
    if rank == 0:
        sites = [
            [site.name, site.decision, site.reason, site.detail, site.layout] for report in lvsa_compile.reports() for site in report.sites
        ]
        recompiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        print(json.dumps({"sparse": max(errors), "dense": max(dense_errors), "recompiled": recompiled, "sites": sites}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
