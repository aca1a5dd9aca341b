"""Real diffusers pipelines made of small random parts."""

from __future__ import annotations

import diffusers
import oracle
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from tiny_models import CONFIG, randomise, wan
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

SIZE = {"height": 48, "width": 64, "num_frames": 33}  # 9 latent frames of 3×4 tokens for Wan
WORDS = ["<pad>", "</s>", "<unk>", *["a", "dog", "runs", "on", "the", "beach", "blurry", "ugly", "and", "very", "bad"]]


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def umt5(width: int = 16):
    return randomise(UMT5EncoderModel(UMT5Config(vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)))


def t5(width: int = 16):
    return randomise(T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)))


def wan_vae() -> AutoencoderKLWan:
    torch.manual_seed(1)
    return AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()


def unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan_parts(**transformer: object) -> dict:
    return dict(tokenizer=tokenizer(), text_encoder=umt5(), vae=wan_vae(), scheduler=unipc(), transformer=wan(**transformer))


def wan_pipeline(kind: type = WanPipeline, scheduler=None, **parts: object):
    pipe = kind(**{**wan_parts(), **({"scheduler": scheduler} if scheduler else {}), **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vace_transformer():
    torch.manual_seed(0)
    return randomise(diffusers.WanVACETransformer3DModel(**CONFIG, vace_layers=[0, 1], vace_in_channels=2 * 4 + 64))


class SteppedAttention(oracle.MaskedAttention):
    """Explicit LVSA masks whose step moves when the pipeline says that a step ended."""

    def __init__(self, frames: int = 9, tokens: int = 12, **layout: int) -> None:
        self.masks = [oracle.token_mask(frames, tokens, step, reference=4, window=1, **layout) for step in range(12)]
        super().__init__(self.masks[0])
        self.step = 0

    def on_step_end(self, pipe, step, timestep, tensors):
        self.step += 1
        self.mask = self.masks[self.step % len(self.masks)]
        return tensors
