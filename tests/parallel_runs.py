"""What tests/test_parallel.py runs in several processes: ``python parallel_runs.py RANK WORLD PORT NAME...``; rank 0 prints a
line of JSON for each name."""

from __future__ import annotations

import json
import os
import sys
import warnings

import oracle
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from diffusers import ContextParallelConfig
from tiny_models import EXACT, Attention, VideoDiT, dit_inputs, randomise, timesteps, wan, wan_inputs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lvsa_compile

FRAMES, ROWS, COLUMNS = 9, 2, 4
OPTIONS = dict(num_attention_heads=4, attention_head_dim=12)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(16, 4), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens)
        return tokens + self.mlp(tokens)


class Stack(VideoDiT):
    """A DiT whose attention may be spread over processes by heads."""

    def __init__(self) -> None:
        super().__init__(lambda model, tokens, grid, text: model.blocks[1](model.blocks[0](tokens)))
        self.blocks = nn.ModuleList(Block() for _ in range(2))


class RingAttention(Attention):
    """Each process asks with its part of the tokens and sees the others' keys and values part by part (arXiv 2310.01889)."""

    def forward(self, x: Tensor, context: Tensor | None = None, **sdpa: object) -> Tensor:
        world, rank = dist.get_world_size(), dist.get_rank()
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x.chunk(world, 1)[rank]), self.to_k(x), self.to_v(x))
        )
        outputs, sums = [], []
        for k, v in zip(key.chunk(world, 2), value.chunk(world, 2), strict=True):
            sums.append((query @ k.transpose(-1, -2) * query.shape[-1] ** -0.5).logsumexp(-1, keepdim=True))
            outputs.append(F.scaled_dot_product_attention(query, k, v))
        weights = torch.cat(sums, -1).softmax(-1).unbind(-1)
        part = sum(weight[..., None] * out for weight, out in zip(weights, outputs, strict=True)).transpose(1, 2).flatten(2)
        return self.out(funcol.all_gather_tensor(part.contiguous(), 1, dist.group.WORLD))


def compiled(model, how):
    if how == "regional":
        return lvsa_compile.compile_repeated_blocks(model, options=EXACT)
    return torch.compile(model, backend="lvsa", options=EXACT)


def small_wan():
    return wan(**OPTIONS)


def stack():
    return randomise(Stack())


def ulysses(model, world):
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    return model


def ring(model, world):
    for block in model.blocks:
        block.attention.__class__ = RingAttention
    return model


def tensor_parallel(model, world):
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        plan = {f"attention.to_{name}": ColwiseParallel() for name in "qkv"} | {"attention.out": RowwiseParallel()}
        parallelize_module(block, mesh, plan | {"mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()})
        block.attention.heads //= world
    return model


def fully_sharded(model, world):
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicated_and_sharded(model, world):
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {  # how a model is spread, and which
    "ulysses": (ulysses, small_wan),
    "ring": (ring, stack),
    "tensor parallel": (tensor_parallel, stack),
    "fully sharded": (fully_sharded, small_wan),
    "replicated and sharded": (replicated_and_sharded, small_wan),
}


def per_token(inputs: dict) -> dict:
    """A timestep for each token: diffusers' hook for it logs a line about any other, and Dynamo breaks there."""
    return inputs | {"timestep": inputs["timestep"][:, None].expand(-1, FRAMES * ROWS * COLUMNS)}


def run(name: str, world: int) -> dict:
    spread, how = name.rsplit("-", 1)
    way, make = WAYS[spread]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    alone, together = make(), way(make(), world)
    tokenwise = way is ulysses and how == "whole"
    if tokenwise:  # diffusers' hooks look at signatures in their first call, which Dynamo cannot follow
        with torch.no_grad():
            together(**per_token(wan_inputs(FRAMES, ROWS, COLUMNS)))
    model = compiled(together, how)
    errors, dense_errors, graphs = [], [], None
    for step, value in enumerate(timesteps(4)):
        inputs = (dit_inputs if make is stack else wan_inputs)(FRAMES, ROWS, COLUMNS, timestep=value)
        args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), per_token(inputs) if tokenwise else inputs)
        with torch.no_grad():
            output, dense = model(*args, **kwargs)[0], alone(*args, **kwargs)[0]
            with oracle.MaskedAttention(oracle.token_mask(FRAMES, ROWS * COLUMNS, step, reference=4, window=1)):
                answer = alone(*args, **kwargs)[0]
        graphs = graphs or torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if name == "fully sharded-whole" and not step:
            continue  # broken into graphs, which are followed from the second forward on
        errors.append(float((output - answer).abs().max() / answer.abs().max()))
        dense_errors.append(float((output - dense).abs().max() / dense.abs().max()))
    recompiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    sites = [[site.name, site.decision, site.reason, site.remedy] for report in lvsa_compile.reports() for site in report.sites]
    return {"name": name, "from sparse": max(errors), "from dense": max(dense_errors), "recompiled": recompiled, "sites": sites}


def main(rank: int, world: int, port: str, names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.accelerator.device_count = lambda: 1  # diffusers counts accelerators to number devices, and here is none
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for name in names:
        result = run(name, world)
        if rank == 0:
            print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
