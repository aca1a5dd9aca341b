"""Random video DiTs with their ground truth by construction.

A ``Recipe`` is what hypothesis draws; ``RandomDiT(recipe)`` the model.  Every attention of the model goes through ``attend`` with the
truth about its sequence, so that the same model with ``masks`` set computes what LVSA must compute, by its definition in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import einops
import oracle
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 12
PATTERN = {"reference_frames": 4, "window": 1}

LATENTS = ("BCFHW", "BFCHW", "BFHWC", "list", "packed ints", "packed coordinates", "packed counts")
PATCHES = ("conv3d", "conv3d temporal", "conv2d per frame", "linear", "overlapping", "loop over frames")
PROJECTIONS = ("separate", "fused chunk", "fused unbind", "einsum", "einops", "conv1d")
FORMS = ("sdpa", "sdpa keywords", "matmul", "einsum", "bmm", "baddbmm", "multihead")
ROPES = ("none", "table", "in place", "complex", "interleaved", "input")
ORDERS = ("video", "text video", "video text", "text video registers", "condition video", "video condition text")
MASKS = ("none", "text padding", "outer product", "frame causal", "padding float")
WRITES = ("no", "no", "a key", "a query", "a corner", "some keys later", "the padding later")
DECOYS = (
    "none",
    "text only",
    "spatial",
    "temporal",
    "cross equal length",
    "reversed",
    "halves swapped",
    "places first",
    "shuffled",
    "flipped rows",
)
OUTPUTS = ("reshape", "einops", "conv transpose", "fold frames")
GRAPHS = ("whole", "breaks", "regional", "in place", "by forward", "in place, inference mode")


@dataclass(frozen=True)
class Recipe:
    """One model: how it spells each part."""

    latent: str
    patch: str
    projection: str
    form: str
    rope: str
    order: str
    mask: str
    write: str
    decoy: str
    output: str
    grid: tuple[int, int, int]
    batch: int
    heads: int
    blocks: int
    modulation: str
    graphs: str
    seed: int

    @property
    def packed(self) -> bool:
        return self.latent.startswith("packed")


recipes = st.builds(
    Recipe,
    latent=st.sampled_from(LATENTS),
    patch=st.sampled_from(PATCHES),
    projection=st.sampled_from(PROJECTIONS),
    form=st.sampled_from(FORMS),
    rope=st.sampled_from(ROPES),
    order=st.sampled_from(ORDERS),
    mask=st.sampled_from(MASKS),
    write=st.sampled_from(WRITES),
    decoy=st.sampled_from(DECOYS),
    output=st.sampled_from(OUTPUTS),
    grid=st.tuples(st.integers(6, 10), st.integers(2, 4), st.integers(2, 4)),
    batch=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 3]),
    blocks=st.integers(1, 2),
    modulation=st.sampled_from(["none", "per sample", "per frame", "per token"]),
    graphs=st.sampled_from(GRAPHS),
    seed=st.integers(0, 1000),
)


@dataclass
class Truth:
    """What an attention call is about: a layout in tokens if it is over the target video, else nothing."""

    layout: dict | None
    allowed: Tensor | None = None


class Block(nn.Module):
    """One block of a ``RandomDiT``; ``run`` is the model's method that computes it."""

    def __init__(self, model: RandomDiT, index: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.mha = nn.ModuleList(nn.MultiheadAttention(WIDTH, model.recipe.heads, batch_first=True) for _ in range(2))
        self.run, self.index = model.block, index

    def forward(self, *inputs: object) -> Tensor:
        return self.run(self.index, *inputs)


class RandomDiT(nn.Module):
    """See the module's docstring.  ``sparse`` says at which calls the oracle masks; None: the model as the user has it."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = r = recipe
        self.step, self.sparse, self.calls = 0, None, []
        frames = 2 if r.patch == "conv3d temporal" else 1
        self.patch3 = nn.Conv3d(4, WIDTH, (frames, 2, 2), (frames, 2, 2))
        self.patch2, self.before = nn.Conv2d(4, WIDTH, 2, 2), nn.Conv2d(4, 4, 3, 1, 1)
        self.patch1, self.embed = nn.Linear(16, WIDTH), nn.Linear(5, WIDTH)
        self.text = nn.Linear(8, WIDTH)
        self.registers = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.time = nn.Linear(8, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2 * r.blocks))
        self.conv = nn.ModuleList(nn.Conv1d(WIDTH, 3 * WIDTH, 1) for _ in range(2 * r.blocks))
        self.blocks = nn.ModuleList(Block(self, index) for index in range(r.blocks))
        self.mha = tuple(block.mha[place] for place in range(2) for block in self.blocks)
        self.head = nn.Linear(WIDTH, 16 * frames)
        self.unpack = nn.Linear(WIDTH, 5)
        self.transposed = nn.ConvTranspose3d(WIDTH, 4, (frames, 2, 2), (frames, 2, 2))

    # --- in -------------------------------------------------------------------------------------------------------------------

    def tokens_of(self, latents) -> Tensor:
        r = self.recipe
        if r.packed:
            return self.embed(latents)
        x = {"BCFHW": lambda t: t, "BFCHW": lambda t: t.transpose(1, 2), "BFHWC": lambda t: t.permute(0, 4, 1, 2, 3), "list": torch.stack}[
            r.latent
        ](latents)
        if r.patch in ("conv3d", "conv3d temporal"):
            return self.patch3(x).flatten(2).transpose(1, 2)
        if r.patch == "linear":
            return self.patch1(einops.rearrange(x, "b c f (h p) (w q) -> b (f h w) (p q c)", p=2, q=2))
        if r.patch == "loop over frames":
            return torch.cat([self.patch2(x[:, :, f]).flatten(2).transpose(1, 2) for f in range(x.shape[2])], 1)
        frames = x.transpose(1, 2).reshape(-1, *x.shape[1:2], *x.shape[3:])
        frames = self.before(frames) if r.patch == "overlapping" else frames
        y = self.patch2(frames).flatten(2).transpose(1, 2)
        return y.reshape(x.shape[0], -1, WIDTH)

    def joined(self, video: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, list[tuple[str, int]]]:
        kinds = {"video": video, "text": text, "registers": self.registers.expand(video.shape[0], -1, -1), "condition": condition}
        names = self.recipe.order.split()
        parts = [kinds[name] for name in names]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), [(n, p.shape[1]) for n, p in zip(names, parts, strict=True)]

    # --- attention ------------------------------------------------------------------------------------------------------------

    def projected(self, x: Tensor, index: int) -> list[Tensor]:
        """Query, key and value ``[B, heads, tokens, head_dim]``."""
        heads, layer = self.recipe.heads, self.qkv[index]
        match self.recipe.projection:
            case "fused chunk":
                return [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in layer(x).chunk(3, -1)]
            case "fused unbind":
                return list(layer(x).reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0))
            case "einsum":
                weights = layer.weight.reshape(3, heads, -1, WIDTH)
                return [torch.einsum("bnc,hdc->bhnd", x, w) for w in weights]
            case "einops":
                return [einops.rearrange(t, "b n (h d) -> b h n d", h=heads) for t in layer(x).split(WIDTH, -1)]
            case "conv1d":
                return [einops.rearrange(t, "b (h d) n -> b h n d", h=heads) for t in self.conv[index](x.transpose(1, 2)).chunk(3, 1)]
            case _:
                parts = layer.weight.chunk(3)
                return [F.linear(x, w).view(*x.shape[:2], heads, -1).transpose(1, 2) for w in parts]

    def rotated(self, q: Tensor, k: Tensor, segments, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding of the video tokens alone; the head's odd tail is left as it is."""
        if self.recipe.rope == "none" or q.shape[-1] < 2:
            return q, k
        start = sum(n for name, n in segments[: [name for name, _ in segments].index("video")])
        stop, half = start + dict(segments)["video"], q.shape[-1] // 2
        cos, sin = angles.cos()[..., :half], angles.sin()[..., :half]
        out = []
        for x in (q, k):
            a, b, tail = x[..., start:stop, :half], x[..., start:stop, half : 2 * half], x[..., start:stop, 2 * half :]
            if self.recipe.rope == "in place":
                y = x.clone()
                y[:, :, start:stop, :half], y[:, :, start:stop, half : 2 * half] = a * cos - b * sin, a * sin + b * cos
            elif self.recipe.rope == "complex":
                pairs = torch.view_as_complex(torch.stack([a, b], -1).float().contiguous()) * torch.polar(
                    torch.ones_like(sin), angles[..., :half]
                )
                video = torch.cat([torch.view_as_real(pairs).transpose(-1, -2).flatten(-2), tail], -1)
                y = torch.cat([x[:, :, :start], video, x[:, :, stop:]], 2)
            elif self.recipe.rope == "interleaved":
                turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
                y = torch.cat([x[:, :, :start], torch.cat([turned, tail], -1), x[:, :, stop:]], 2)
            else:
                video = torch.cat([a * cos - b * sin, a * sin + b * cos, tail], -1)
                y = torch.cat([x[:, :, :start], video, x[:, :, stop:]], 2)
            out.append(y)
        return out[0], out[1]

    def attend(self, x: Tensor, index: int, truth: Truth, mask: Tensor | None = None, rope=None, context: Tensor | None = None) -> Tensor:
        """One attention over ``x``, or from ``x`` to ``context``, as the recipe spells it; by its definition where the oracle masks."""
        number = len(self.calls)
        self.calls.append(truth)
        form = self.recipe.form
        if form == "multihead" and mask is None and self.sparse is None:
            c = x if context is None else context
            return self.mha[index](x, c, c, need_weights=bool(self.recipe.seed % 2))[0]
        if form == "multihead" and mask is None:
            weights, biases = self.mha[index].in_proj_weight.chunk(3), self.mha[index].in_proj_bias.chunk(3)
            c = x if context is None else context
            q, k, v = (
                F.linear(t, w, b).unflatten(-1, (self.recipe.heads, -1)).transpose(1, 2)
                for t, w, b in zip((x, c, c), weights, biases, strict=True)
            )
        else:
            q, k, v = self.projected(x, index)
            if context is not None:
                _, k, v = self.projected(context, index)
            if rope is not None:
                q, k = self.rotated(q, k, *rope)
        if self.sparse is not None:
            keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
            if self.sparse[number]:
                keep = oracle.token_mask(**truth.layout, step=self.step, reference=4, window=1)
            if mask is not None:
                keep = keep & (mask if mask.dtype == torch.bool else mask == 0)
            out = oracle.dense(q, k, v, keep)[0].to(q.dtype)
        else:
            out = self.weighed(q, k, v, mask)
        out = out.transpose(1, 2).flatten(2)
        return self.mha[index].out_proj(out) if form == "multihead" and mask is None else out

    def weighed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scale, form = q.shape[-1] ** -0.5, self.recipe.form
        if form in ("sdpa", "multihead"):
            return F.scaled_dot_product_attention(q, k, v, mask)
        if form == "sdpa keywords":
            return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=scale)

        def masked(scores: Tensor) -> Tensor:
            if mask is None:
                return scores
            return scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, float("-inf"))

        def weights(scores: Tensor) -> Tensor:
            return (
                masked(scores).softmax(-1).nan_to_num(0.0)
                if (self.recipe.mask == "outer product" or self.recipe.write != "no") and mask is not None
                else masked(scores).softmax(-1)
            )

        if form == "matmul":
            return weights(q @ k.transpose(-1, -2) * scale) @ v
        if form == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights(torch.einsum("bhqd,bhkd->bhqk", q, k) * scale), v)
        shape = q.shape
        q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
        if form == "bmm":
            scores = torch.bmm(q, k.transpose(1, 2)) * scale
        else:
            scores = torch.baddbmm(torch.empty(len(q), q.shape[1], k.shape[1]), q, k.transpose(1, 2), beta=0, alpha=scale)
        return torch.bmm(weights(scores.unflatten(0, shape[:2])).flatten(0, 1), v).unflatten(0, shape[:2])

    def mask_of(self, segments, grid, valid: Tensor) -> Tensor | None:
        """The mask as the recipe makes it and writes to it afterwards."""
        valid = valid.clone()
        mask = self.mask_before_writes(segments, grid, valid)
        if mask is None or self.recipe.write == "no":
            return mask
        mask = mask if self.recipe.mask in ("outer product", "frame causal") else mask.expand(*mask.shape[:-2], mask.shape[-1], -1).clone()
        closed = False if mask.dtype == torch.bool else float("-inf")
        match self.recipe.write:
            case "a key":
                mask[..., 3] = closed
            case "a query":
                mask[..., 2, :5] = closed
            case "a corner":
                mask[..., :4, 2:].masked_fill_(torch.ones(4, mask.shape[-1] - 2, dtype=torch.bool).tril(), closed)
            case "some keys later":
                mask.index_fill_(-1, torch.tensor([1, 4]), closed)
            case _:
                valid.zero_()
        return mask

    def mask_before_writes(self, segments, grid, valid: Tensor) -> Tensor | None:
        kind, length = self.recipe.mask, sum(n for _, n in segments)
        names = [name for name, _ in segments]
        if kind == "none" or (kind != "frame causal" and "text" not in names) or (kind == "frame causal" and names != ["video"]):
            return None
        if kind == "frame causal":
            frame = torch.arange(grid[0]).repeat_interleave(grid[1] * grid[2])
            return frame[:, None] >= frame[None, :]
        start = sum(n for _, n in segments[: names.index("text")])
        keys = torch.cat([valid.new_ones(len(valid), start), valid, valid.new_ones(len(valid), length - start - valid.shape[1])], 1)
        if kind == "text padding":
            return keys[:, None, None, :]
        if kind == "padding float":
            return torch.zeros(keys.shape[0], 1, 1, length).masked_fill(~keys[:, None, None, :], float("-inf"))
        return keys[:, None, None, :] & keys[:, None, :, None]

    # --- the model ------------------------------------------------------------------------------------------------------------

    def forward(self, latents, timestep, text, valid, condition, table, ids, grid):
        r = self.recipe
        self.calls = []
        video, text = self.tokens_of(latents), self.text(text)
        frequencies = torch.arange(4) * 0.2
        angles = timestep.float()[..., None] * frequencies
        emb = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        places = grid[1] * grid[2]
        if r.modulation == "per frame":
            video = (video.unflatten(1, (grid[0], places)) * (1 + emb[:, None, None])).flatten(1, 2)
        elif r.modulation == "per token":
            video = video + emb[:, None].expand(-1, video.shape[1], -1)
        elif r.modulation == "per sample":
            video = video * (1 + emb[:, None])
        turn = self.angles(table, ids, grid)
        if r.graphs == "breaks":  # and no loop: Dynamo gives up a function that breaks in one
            torch._dynamo.graph_break()
        video = self.blocks[0](video, text, condition, turn, valid, grid)
        if r.graphs == "breaks":
            torch._dynamo.graph_break()
        if r.blocks > 1:
            video = self.blocks[1](video, text, condition, turn, valid, grid)
        if r.graphs == "breaks":
            torch._dynamo.graph_break()
        return self.out(video, grid)

    def block(self, b: int, video: Tensor, text: Tensor, condition: Tensor, turn: Tensor, valid: Tensor, grid) -> Tensor:
        if b == 0:
            video = self.decoy(video, text, grid, b)
        joint, segments = self.joined(video, text, self.patch1(condition))
        before = sum(n for _, n in segments[: [n for n, _ in segments].index("video")])
        layout = dict(frames=grid[0], tokens=grid[1] * grid[2], prefix=before, suffix=joint.shape[1] - before - video.shape[1])
        out = self.attend(joint, b, Truth(layout), self.mask_of(segments, grid, valid), (segments, turn))
        video = video + out[:, before : before + video.shape[1]]
        return video + self.blocks[b].mlp(video)

    def angles(self, table: Tensor, ids: Tensor, grid) -> Tensor:
        if self.recipe.latent == "packed coordinates":
            return ids.float().sum(-1, keepdim=True) * torch.arange(1, 7) * 0.05
        if self.recipe.rope == "input":
            return table
        f, h, w = (torch.arange(n) * 0.1 for n in grid)
        whole = f[:, None, None] + 2 * h[:, None] + 3 * w
        return whole.flatten()[:, None] * torch.arange(1, 7)

    def decoy(self, video: Tensor, text: Tensor, grid, b: int) -> Tensor:
        frames, places, index = grid[0], grid[1] * grid[2], b + self.recipe.blocks
        apart = video.unflatten(1, (frames, places))
        match self.recipe.decoy:
            case "text only":
                return video + self.attend(text, index, Truth(None)).mean(1, keepdim=True)
            case "spatial":
                return video + self.attend(apart.flatten(0, 1), index, Truth(None)).unflatten(0, (-1, frames)).flatten(1, 2)
            case "temporal":
                rows = apart.transpose(1, 2).flatten(0, 1)
                return video + self.attend(rows, index, Truth(None)).unflatten(0, (-1, places)).transpose(1, 2).flatten(1, 2)
            case "cross equal length":
                longer = text.repeat(1, -(-video.shape[1] // text.shape[1]), 1)[:, : video.shape[1]]
                return video + self.attend(video, index, Truth(None), context=longer)
            case "reversed":
                return video + self.attend(apart.flip(1).flatten(1, 2), index, Truth(None)).mean(1, keepdim=True)
            case "halves swapped":
                half = (frames // 2) * places
                return video + self.attend(torch.cat([video[:, half:], video[:, :half]], 1), index, Truth(None)).mean(1, keepdim=True)
            case "places first":
                return video + self.attend(apart.transpose(1, 2).flatten(1, 2), index, Truth(None)).mean(1, keepdim=True)
            case "shuffled":
                order = (torch.arange(video.shape[1]) * 5 + 2) % video.shape[1]
                order = order if video.shape[1] % 5 else video.shape[1] - 1 - torch.arange(video.shape[1])
                return video + self.attend(video[:, order], index, Truth(None)).mean(1, keepdim=True)
            case "flipped rows":  # the places of a frame in another order: still whole frames in order
                return video + self.attend(apart.flip(2).flatten(1, 2), index, Truth(dict(frames=frames, tokens=places))).mean(
                    1, keepdim=True
                )
        return video

    def out(self, video: Tensor, grid):
        r = self.recipe
        frames = 2 if r.patch == "conv3d temporal" else 1
        if r.packed:
            y = self.unpack(video)
            return y.unflatten(1, grid) if r.latent == "packed ints" else y
        if r.output == "conv transpose":
            x = self.transposed(video.transpose(1, 2).unflatten(2, grid))
        elif r.output == "einops":
            x = einops.rearrange(self.head(video), "b (f h w) (p q r c) -> b c (f p) (h q) (w r)", f=grid[0], h=grid[1], p=frames, q=2, r=2)
        elif r.output == "fold frames" and frames == 1:
            y = self.head(video).reshape(-1, grid[1], grid[2], 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(-1, 4, 2 * grid[1], 2 * grid[2])
            x = y.unflatten(0, (-1, grid[0])).transpose(1, 2)
        else:
            y = self.head(video).reshape(video.shape[0], *grid, frames, 2, 2, 4)
            x = y.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
        if r.latent == "list":
            return list(x.unbind(0))
        return {"BCFHW": lambda t: t, "BFCHW": lambda t: t.transpose(1, 2), "BFHWC": lambda t: t.permute(0, 2, 3, 4, 1)}[r.latent](x)


def inputs_of(recipe: Recipe, words: int = 5) -> tuple:
    """Inputs of a model, with so many text tokens; the grid last."""
    generator = torch.Generator().manual_seed(recipe.seed)
    frames, rows, columns = recipe.grid
    latent_frames = 2 * frames if recipe.patch == "conv3d temporal" and not recipe.packed else frames

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    latents: Tensor | list = randn(recipe.batch, 4, latent_frames, 2 * rows, 2 * columns)
    if recipe.packed:
        latents = randn(recipe.batch, frames * rows * columns, 5)
    elif recipe.latent == "list":
        latents = list(latents.unbind(0))
    elif recipe.latent != "BCFHW":
        latents = latents.permute(0, 2, 1, 3, 4) if recipe.latent == "BFCHW" else latents.permute(0, 2, 3, 4, 1)
        latents = latents.contiguous()
    length = frames * rows * columns
    ids = torch.stack(torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 2)
    valid = (torch.arange(words) < 3).expand(recipe.batch, -1).contiguous()
    text, condition, table = randn(recipe.batch, words, 8), randn(recipe.batch, 7, 16), randn(length, 6)
    return latents, torch.full((recipe.batch,), 700.0), text, valid, condition, table, ids, recipe.grid
