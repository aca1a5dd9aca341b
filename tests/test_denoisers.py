"""What is no denoiser stays dense, even where the user says how many frames a model was trained on; a part of a denoiser counts."""

from __future__ import annotations

import diffusers
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lvsa_compile

OPTIONS = {"reference_frames": 3, "window": 1, "inner": "eager"}


class Attends(nn.Module):
    """Self-attention over all places of ``[B, C, F, H, W]``."""

    def __init__(self, width=8):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1))
        tokens = tokens + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return tokens.transpose(1, 2).reshape(x.shape)


class Pipe(nn.Module):
    """``before``, attention, ``after``."""

    def __init__(self, before, after):
        super().__init__()
        self.before, self.attend, self.after, self.time = before, Attends(), after, nn.Linear(1, 1)

    def forward(self, x, temb=None, timestep=None):
        return self.after(self.attend(self.before(x)))


class Timed(Pipe):
    """A timestep is added to what comes in."""

    def forward(self, x, timestep):
        return super().forward(x + self.time(timestep[:, None] / 1000)[..., None, None, None])


class Do(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def patches(channels=4):
    return nn.Conv3d(channels, 8, (1, 2, 2), (1, 2, 2))


def unpatched(channels=4):
    return nn.ConvTranspose3d(8, channels, (1, 2, 2), (1, 2, 2))


def shuffled(x):
    return F.pixel_shuffle(x.transpose(1, 2).flatten(0, 1), 2).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


NOT_DENOISERS_WITHOUT_A_TIMESTEP = {
    "upscaler": lambda: (nn.Conv3d(4, 8, 1), Do(shuffled)),
    "upscaler by interpolation": lambda: (nn.Conv3d(4, 8, 1), Do(lambda x: F.interpolate(x, scale_factor=(1, 2, 2)))),
    "upscaler by convolution": lambda: (nn.Conv3d(4, 8, 1), unpatched()),
    "more frames": lambda: (nn.Conv3d(4, 8, 1), nn.ConvTranspose3d(8, 4, (2, 2, 2), (2, 2, 2))),
    "encoder to tokens": lambda: (patches(), Do(lambda x: x.flatten(2).transpose(1, 2))),
    "autoencoder": lambda: (nn.Conv3d(4, 8, (1, 4, 4), (1, 2, 2), (0, 1, 1)), nn.ConvTranspose3d(8, 4, (1, 4, 4), (1, 2, 2), (0, 1, 1))),
    "middle of a decoder": lambda: (nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 4, 3, padding=1)),
    "images one by one": lambda: (
        Do(lambda x: F.conv2d(x.transpose(1, 2).flatten(0, 1), torch.ones(8, 4, 3, 3), padding=1).unflatten(0, (1, -1)).transpose(1, 2)),
        nn.Conv3d(8, 4, 1),
    ),
}
NOT_DENOISERS = {
    "encoder": lambda: (patches(), nn.Conv3d(8, 3, 1)),
    "discriminator": lambda: (patches(), nn.Conv3d(8, 1, 1)),
    "classifier": lambda: (patches(), Do(lambda x: x.mean((2, 3, 4)))),
    "score of each token": lambda: (patches(), Do(lambda x: x[:, :1].flatten(2).transpose(1, 2))),
}
DENOISERS = {
    "patches": lambda: (patches(), unpatched()),
    "places": lambda: (nn.Conv3d(4, 8, 1), nn.Conv3d(8, 4, 1)),
    "another number of channels": lambda: (patches(), unpatched(9)),
    "a tuple": lambda: (patches(), Do(lambda x: (x.repeat_interleave(2, 3).repeat_interleave(2, 4), x.mean()))),
}
DENOISERS_WITH_A_TIMESTEP = {
    "tokens with all of a patch": lambda: (patches(), Do(lambda x: x.flatten(2).transpose(1, 2))),
    "a grid with all of a patch": lambda: (patches(), Do(lambda x: x.movedim(1, -1))),
    "what it upscales": lambda: (patches(), nn.ConvTranspose3d(8, 4, (1, 4, 4), (1, 4, 4))),
    "its last frames": lambda: (patches(), Do(lambda x: x.repeat_interleave(2, 3).repeat_interleave(2, 4)[:, :, 2:])),
    "overlapping convolutions": lambda: (nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 4, 3, padding=1)),
}


def compiled(model, *inputs):
    """The answer, the model's own, and what was decided."""
    with torch.no_grad():
        found = torch.compile(model, backend="lvsa", options=OPTIONS)(*inputs)
        return found, model(*inputs), [site for report in lvsa_compile.reports() for site in report.sites]


def latent(channels=4):
    return torch.randn(1, channels, 8, 4, 4)


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("name", [*NOT_DENOISERS, *NOT_DENOISERS_WITHOUT_A_TIMESTEP])
def test_what_does_not_generate_the_video_stays_dense(name, timed, recwarn):
    if timed and name not in NOT_DENOISERS:
        pytest.skip("with a timestep it would be a denoiser")
    model = (Timed if timed else Pipe)(*{**NOT_DENOISERS, **NOT_DENOISERS_WITHOUT_A_TIMESTEP}[name]()).eval()
    found, answer, (site,) = compiled(model, latent(), *([torch.tensor([500.0])] if timed else []))
    assert site.decision == "dense"
    assert site.reason == ("other_video" if name == "classifier" else "not_denoiser"), site
    assert torch.equal(found, answer)
    assert not [w for w in recwarn if w.category is lvsa_compile.LvsaWarning]


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("name", [*DENOISERS, *DENOISERS_WITH_A_TIMESTEP])
def test_what_generates_the_video_is_sparse(name, timed):
    if not timed and name not in DENOISERS:
        pytest.skip("without a timestep it could be something else")
    before, after = {**DENOISERS, **DENOISERS_WITH_A_TIMESTEP}[name]()
    model = (Timed if timed else Pipe)(before, after).eval()
    x, time = latent(), [torch.tensor([500.0])] if timed else []
    found, _, (site,) = compiled(model, x, *time)
    assert site.decision == "sparse", site
    tokens = 4 if isinstance(before, nn.Conv3d) and before.stride[1] == 2 else 16
    with torch.no_grad(), oracle.MaskedAttention(oracle.token_mask(8, tokens, 0, reference=3, window=1)):
        answer = model(x, *time)
    for got, wanted in zip(*((each if isinstance(each, tuple) else (each,)) for each in (found, answer)), strict=True):
        assert (got - wanted).abs().max() < 1e-5


def test_the_reason_says_what_was_seen():
    _, _, (site,) = compiled(Pipe(nn.Conv3d(4, 8, 1), unpatched()), latent())
    assert site.detail == "no timestep is among its inputs, and of the 8×4×4 of x it returns [1, 4, 8, 8, 8]"
    torch._dynamo.reset()
    _, _, (site,) = compiled(Pipe(nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 4, 1)), latent())
    assert site.detail == "no timestep is among its inputs, and convolutions that overlap mix the places of x"


@pytest.mark.parametrize("spell", ["a number", "a closure"])
def test_a_timestep_that_is_a_constant_or_comes_from_around_counts(spell):
    model, time = Timed(*DENOISERS_WITH_A_TIMESTEP["overlapping convolutions"]()).eval(), torch.tensor([500.0])
    if spell == "a number":
        _, _, (site,) = compiled(lambda x, timestep: model(x, torch.tensor([float(timestep)])), latent(), 500)
    else:
        _, _, (site,) = compiled(lambda x: model(x, time), latent())
    assert site.decision == "sparse"


def hunyuan_video():
    return diffusers.AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)


def hunyuan_video_15():
    widths = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1}
    return diffusers.AutoencoderKLHunyuanVideo15(latent_channels=4, spatial_compression_ratio=8, temporal_compression_ratio=4, **widths)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        *((hunyuan_video, part) for part in ("decoder", "encoder", "decode")),
        *(pytest.param(hunyuan_video_15, part, marks=pytest.mark.slow) for part in ("encoder", "decode")),
    ],
)
@pytest.mark.pipeline
def test_autoencoders_of_diffusers(make, part):
    vae = make().eval()
    x = torch.randn(1, 3, 29, 32, 32) if part == "encoder" else latent()
    run = (lambda z: vae.decode(z, return_dict=False)[0]) if part == "decode" else getattr(vae, part)
    found, answer, sites = compiled(run, x)
    assert sites
    assert not [site for site in sites if site.decision == "sparse"]
    assert torch.equal(found, answer)


@pytest.mark.pipeline
def test_blocks_of_a_decoder_compiled_one_by_one_are_dense():
    vae = hunyuan_video().eval()
    x = latent()
    with torch.no_grad():
        answer = vae.decoder(x)
        lvsa_compile.compile_repeated_blocks(vae.decoder, options=OPTIONS)
        assert torch.equal(vae.decoder(x), answer)
    assert not [site for report in lvsa_compile.reports() for site in report.sites if site.decision == "sparse"]


@pytest.mark.parametrize("how", ["a forward that asks for it", "a step that is said"])
def test_other_signs_of_a_denoiser(how):
    """The function around hides the timestep's name; the model's forward, or the user, says that there is one."""
    layers = DENOISERS_WITH_A_TIMESTEP["overlapping convolutions"]()
    if how == "a forward that asks for it":
        model = Timed(*layers).eval()
        _, _, (site,) = compiled(lambda a, b: model(a, b), latent(), torch.tensor([500.0]))
    else:
        with lvsa_compile.step(0):
            _, _, (site,) = compiled(Pipe(*layers).eval(), latent())
    assert site.decision == "sparse"


def test_a_number_that_is_named_t_makes_no_denoiser_of_a_decoder():
    decoder = Pipe(nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 4, 3, padding=1)).eval()
    _, _, (site,) = compiled(lambda z, t: decoder(z) * t, latent(), 3)
    assert (site.decision, site.reason) == ("dense", "not_denoiser")
