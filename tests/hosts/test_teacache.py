"""TeaCache as its authors publish it: the forward of one model object is replaced, and some calls add what the call before added."""

from __future__ import annotations

import types
import warnings

import oracle
import pytest
import torch
from stand_ins import needs
from test_graph_breaks import close
from test_regional import Stack
from test_watching import in_place
from tiny_models import dit_inputs, randomise, timesteps
from videos import OPTIONS, forget, graphs

import lvsa_compile

needs("vllm_omni")  # in the environment of the hosts alone


def cached_forward(self, latents, timestep, text):
    """Computes every other call."""
    if self.count % 2 == 0:
        output = type(self).forward(self, latents, timestep, text)
        self.residual = output - latents
    else:
        output = latents + self.residual
    self.count += 1
    return output


def cached():
    model = randomise(Stack())
    model.count, model.forward = 0, types.MethodType(cached_forward, model)
    return model


WAYS = {
    "blocks by others": lambda model: in_place(model, backend="lvsa", options=OPTIONS),
    "our blocks": lambda model: lvsa_compile.compile_repeated_blocks(model, options=OPTIONS),
    "enabled": lambda model: lvsa_compile.enable(model, **OPTIONS),
}
GRAPHS = {"blocks by others": 2, "our blocks": 1, "enabled": 0}


@pytest.mark.parametrize("way", WAYS)
def test_two_videos(way):
    forget()
    alone, model = cached(), cached()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WAYS[way](model)
        for video in range(3):
            for step, value in enumerate(timesteps(6)):
                inputs = dit_inputs(timestep=value)
                with oracle.MaskedAttention(oracle.token_mask(9, 12, step, reference=4, window=1)) as masked:
                    answer = alone(*inputs)
                assert masked.calls == (0 if step % 2 else 3)
                assert close(model(*inputs), answer) or (video == 0 and step < 2 and way == "blocks by others"), (video, step)
    assert graphs() == GRAPHS[way]
