"""Inputs of the data under ``data/policies``, by their recipes: integers from a hash, exact in every dtype down to bfloat16."""

from __future__ import annotations

import math

import numpy
import torch


def ints(seed, shape, low, high):
    with numpy.errstate(over="ignore"):
        z = numpy.uint64(seed << 32) + numpy.arange(math.prod(shape), dtype=numpy.uint64) + numpy.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        z = z ^ (z >> numpy.uint64(31))
    return low + ((z >> numpy.uint64(33)) % numpy.uint64(high - low + 1)).astype(numpy.int64).reshape(shape)


def query_and_key(case, later=False):
    """``[1, H, N, D]`` each, in float64, exact in every dtype down to bfloat16."""
    made, shape = case["input"], (case["H"], case["N"], case["D"])
    heads, tokens, width = shape
    seed, run, topics, noise = (made[name] for name in ("seed", "run", "T", "noise"))
    directions = ints(seed + 1, (heads, topics, width), -1, 1)
    of_query, of_key = (ints(seed + i, (heads, math.ceil(tokens / run)), 0, topics - 1).repeat(run, 1)[:, :tokens] for i in (2, 3))
    gains, head = numpy.array(made["gains"])[:, None, None], numpy.arange(heads)[:, None]
    query = gains * directions[head, of_query] + ints(seed + 4, shape, -noise, noise)
    key = 16 * directions[head, of_key] + ints(seed + 5, shape, -noise, noise)
    if later:
        query = query + ints(seed + 20, shape, -made["drift"], made["drift"])
        key = key + ints(seed + 21, shape, -made["drift"], made["drift"])
    return tuple(torch.from_numpy(each / 16)[None] for each in (query, key))
