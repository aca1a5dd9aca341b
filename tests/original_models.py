"""The structures in which original repositories write their models, each as a tiny model of its own: inputs, rope, residuals, attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS = 16, 2
PATCH = (1, 2, 2)


def by_sdpa(query, key, value, lengths):
    """Attention ``[B, S, heads, d]``; ``lengths`` are the numbers of keys that count, here always all."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)


def ends_of(lengths):
    return torch.cat([lengths.new_zeros(1), lengths]).cumsum(0, dtype=torch.int32)


def by_sequences(attend, cut_keys):
    """Attention over all samples in one sequence, told by where each ends; ``cut_keys`` takes the keys of each sample by their number."""

    def attention(query, key, value, lengths):
        batch, most, scale = query.shape[0], query.shape[1], query.shape[-1] ** -0.5
        if cut_keys:
            key, value = (torch.cat([sample[:n] for sample, n in zip(t, lengths, strict=True)]) for t in (key, value))
        else:
            key, value = key.flatten(0, 1), value.flatten(0, 1)
        queries = torch.full((batch,), most, dtype=torch.int32)
        output = attend(query.flatten(0, 1), key, value, ends_of(queries), ends_of(lengths.int()), most, most, scale)
        return output.unflatten(0, (batch, most))

    return attention


class Block(nn.Module):
    def __init__(self, attend=by_sdpa):
        super().__init__()
        self.attend = attend
        self.to_q, self.to_k, self.to_v, self.out, self.mlp = (nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def heads(self, x):
        return [to(x).unflatten(-1, (HEADS, -1)) for to in (self.to_q, self.to_k, self.to_v)]

    def forward(self, x, lengths=None):
        x = x + self.out(self.attend(*self.heads(x), lengths).flatten(2))
        return x + self.mlp(F.gelu(x))


class Model(nn.Module):
    """``[B, C, F, H, W]`` and a timestep in, the like out."""

    block: type[nn.Module] = Block

    def __init__(self, **of_block):
        super().__init__()
        self.patch, self.time = nn.Conv3d(4, WIDTH, PATCH, PATCH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(self.block(**of_block) for _ in range(2))
        self.back = nn.Linear(WIDTH, 16)

    def tokens(self, latents, timestep):
        x = self.patch(latents)
        return x.flatten(2).transpose(1, 2) + self.time(timestep[..., None] / 1000).view(len(x), -1, WIDTH), x.shape[2:]

    def run(self, x, grid):
        for block in self.blocks:
            x = block(x)
        return x

    def video(self, x, grid):
        x = self.back(x).unflatten(1, grid).unflatten(-1, (-1, 2, 2))
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)

    def forward(self, latents, timestep):
        x, grid = self.tokens(latents, timestep)
        return self.video(self.run(x, grid), grid)


class FramesLast(Model):
    """``[B, C, H, W, F]``."""

    def forward(self, latents, timestep):
        return super().forward(latents.movedim(-1, 2), timestep).movedim(2, -1)


class TokensFirst(Model):
    """Tokens ``[S, B, C]``."""

    class block(Block):
        def forward(self, x):
            query, key, value = (t.permute(1, 2, 0, 3) for t in self.heads(x))
            x = x + self.out(F.scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3).flatten(2))
            return x + self.mlp(F.gelu(x))

    def run(self, x, grid):
        return super().run(x.transpose(0, 1).contiguous(), grid).transpose(0, 1)


def ends_with_padding(valid, longest):
    """Two sequences in each sample of ``longest`` tokens: those that are ``valid``, and the padding after them."""
    ends = torch.zeros(2 * len(valid) + 1, dtype=torch.int32)
    for sample in range(len(valid)):
        ends[2 * sample + 1] = sample * longest + valid[sample]
        ends[2 * sample + 2] = (sample + 1) * longest
    return ends


class VideoAndPaddedText(Model):
    """The video, then text of which ``text_mask`` counts; returns both.  Without ``attend`` blocks mask, by ``pattern`` too."""

    pattern = None

    class block(Block):
        def forward(self, x, ends, pattern):
            query, key, value = self.heads(x)
            key, value = (t[:, :, : self.key_heads] for t in (key, value))
            batch, longest, scale = *x.shape[:2], query.shape[-1] ** -0.5
            if self.attend is not None:
                attended = self.attend(*(t.flatten(0, 1) for t in (query, key, value)), ends, ends, longest, longest, scale)
                attended = attended.unflatten(0, (batch, longest))
            else:
                sequence = torch.repeat_interleave(torch.arange(2 * batch), ends.diff()).view(batch, longest)
                mask = sequence[:, None, :, None] == sequence[:, None, None]
                mask = mask if pattern is None else mask & pattern
                turned = (t.transpose(1, 2) for t in (query, key, value))
                attended = F.scaled_dot_product_attention(*turned, mask, enable_gqa=True).transpose(1, 2)
            x = x + self.out(attended.flatten(2))
            return x + self.mlp(F.gelu(x))

    def __init__(self, attend=None, ends=ends_with_padding, key_heads=HEADS):
        super().__init__(attend=attend)
        self.words, self.ends = nn.Linear(WIDTH, WIDTH), ends
        for block in self.blocks:
            block.key_heads = key_heads

    def forward(self, latents, timestep, text, text_mask):
        x, grid = self.tokens(latents, timestep)
        tokens = x.shape[1]
        ends = self.ends(text_mask.sum(1) + tokens, tokens + text.shape[1])
        x = torch.cat([x, self.words(text)], 1)
        for block in self.blocks:
            x = block(x, ends, self.pattern)
        return [self.video(x[:, :tokens], grid), x[:, tokens:]]


def joined_with_zeros(x, part):
    return x + torch.cat([torch.zeros_like(x[:, : x.shape[1] - part.shape[1]]), part], 1)


def padded(x, part):
    return x + F.pad(part, (0, 0, x.shape[1] - part.shape[1], 0))


def written(x, part):
    x = x.clone()
    x[:, x.shape[1] - part.shape[1] :] += part
    return x


def joined(x, part):
    beginning = x.shape[1] - part.shape[1]
    return torch.cat([x[:, :beginning], x[:, beginning:] + part], 1)


class PartOfTheFrames(Model):
    """A residual for all frames but the first two, as of image-to-video and continuation; ``add`` spells it."""

    def __init__(self, add):
        super().__init__()
        self.add = add

    def run(self, x, grid):
        for block in self.blocks:
            x = block(self.add(x, block.mlp(x[:, 2 * grid[1] * grid[2] :])))
        return x


class FramesAmongThemselves(Model):
    """The first two frames attend each other, the rest attends all, as where a video is continued; ``pattern`` masks frames of the rest."""

    pattern = None

    class block(Block):
        def forward(self, x, first, pattern):
            query, key, value = (t.transpose(1, 2) for t in self.heads(x))
            if pattern is not None:
                pattern = F.pad(pattern, (first, 0), value=True)
            given = F.scaled_dot_product_attention(*(t[:, :, :first] for t in (query, key, value)))
            rest = F.scaled_dot_product_attention(query[:, :, first:], key, value, pattern)
            return x + self.out(torch.cat([given, rest], 2).transpose(1, 2).flatten(2))

    def run(self, x, grid):
        for block in self.blocks:
            x = block(x, 2 * grid[1] * grid[2], self.pattern)
        return x


class KeptKeys(Model):
    """Keys and values that earlier calls kept, with this call's after them; ``written`` into the place that was left for them."""

    pattern = None

    class block(Block):
        def forward(self, x, kept, written, pattern):
            query, key, value = (t.transpose(1, 2) for t in self.heads(x))
            if pattern is not None:
                pattern = F.pad(pattern, (kept[0].shape[2], 0), value=True)
            if written:
                kept = [F.pad(t, (0, 0, 0, x.shape[1])) for t in kept]
                kept[0][:, :, -x.shape[1] :], kept[1][:, :, -x.shape[1] :] = key, value
                key, value = kept
            else:
                key, value = torch.cat([kept[0], key], 2), torch.cat([kept[1], value], 2)
            return x + self.out(F.scaled_dot_product_attention(query, key, value, pattern).transpose(1, 2).flatten(2))

    def __init__(self, written):
        super().__init__()
        self.written = written

    def forward(self, latents, timestep, kept):
        x, grid = self.tokens(latents, timestep)
        for block, own in zip(self.blocks, kept, strict=True):
            x = block(x, own, self.written, self.pattern)
        return self.video(x, grid)


class InTwoParts(Model):
    """Attention over all frames, computed for some of the queries, then for the others."""

    class block(Block):
        def forward(self, x):
            query, key, value = (t.transpose(1, 2) for t in self.heads(x))
            parts = (F.scaled_dot_product_attention(part, key, value) for part in query.split(x.shape[1] * 2 // 3, 2))
            return x + self.out(torch.cat(list(parts), 2).transpose(1, 2).flatten(2))


class BothDirections(Model):
    """Before each block a recurrence over the tokens, and one over tokens turned around and back; ``between`` runs in the middle."""

    def __init__(self, between=lambda: None):
        super().__init__()
        self.between = between

    def run(self, x, grid):
        for block in self.blocks:
            backwards = x.flip(1).cumsum(1).tanh()
            self.between()
            x = block(x + x.cumsum(1).tanh() + backwards.flip(1))
        return x


class TurnedAround(Model):
    """Frames in reverse."""

    def forward(self, latents, timestep):
        return super().forward(latents.flip(2), timestep).flip(2)


class Permuted(Model):
    """Frames in another order, by a product with a matrix."""

    def forward(self, latents, timestep):
        order = torch.eye(latents.shape[2]).roll(3, 0)
        latents = torch.einsum("bcfhw,gf->bcghw", latents, order)
        return torch.einsum("bcghw,gf->bcfhw", super().forward(latents, timestep), order)


def complex_table(positions, size):
    angles = torch.outer(torch.arange(positions), 10 ** -(torch.arange(size) / size)).double()
    return torch.polar(torch.ones_like(angles), angles)


def turned(x, grids, tables):
    """Complex rope, sample by sample, each with its own grid, read back from a tensor."""
    done = []
    for i, (frames, rows, columns) in enumerate(grids.tolist()):
        length = frames * rows * columns
        along = [
            tables[0][:frames].view(frames, 1, 1, -1).expand(frames, rows, columns, -1),
            tables[1][:rows].view(1, rows, 1, -1).expand(frames, rows, columns, -1),
            tables[2][:columns].view(1, 1, columns, -1).expand(frames, rows, columns, -1),
        ]
        own = torch.view_as_complex(x[i, :length].double().unflatten(-1, (-1, 2)))
        own = torch.view_as_real(own * torch.cat(along, -1).reshape(length, 1, -1)).flatten(2)
        done.append(torch.cat([own, x[i, length:]]))
    return torch.stack(done).float()


class ListOfLatents(nn.Module):
    """Latents ``[C, F, H, W]`` in a list, padded to ``seq_len`` tokens; a timestep for each sample, or for each token."""

    class block(Block):
        def forward(self, x, shift, lengths, grids, tables):
            query, key, value = self.heads(x + shift)
            attended = self.attend(turned(query, grids, tables), turned(key, grids, tables), value, lengths)
            x = x + self.out(attended.flatten(2))
            return x + self.mlp(F.gelu(x))

    def __init__(self, attend=by_sdpa):
        super().__init__()
        self.patch_embedding, self.time, self.head = nn.Conv3d(4, WIDTH, PATCH, PATCH), nn.Linear(8, WIDTH), nn.Linear(WIDTH, 16)
        self.blocks = nn.ModuleList(self.block(attend) for _ in range(2))
        self.tables = [complex_table(32, size) for size in (2, 1, 1)]

    def forward(self, x, t, seq_len):
        x = [self.patch_embedding(latents[None]) for latents in x]
        grids = torch.stack([torch.tensor(latents.shape[2:]) for latents in x])
        x = [latents.flatten(2).transpose(1, 2) for latents in x]
        lengths = torch.tensor([tokens.shape[1] for tokens in x])
        x = torch.cat([torch.cat([tokens, tokens.new_zeros(1, seq_len - tokens.shape[1], WIDTH)], 1) for tokens in x])
        angles = t.double()[..., None] * 10 ** -torch.arange(4.0)
        shift = self.time(torch.cat([angles.cos(), angles.sin()], -1).float()).view(len(x), -1, WIDTH)
        for block in self.blocks:
            x = block(x, shift, lengths, grids, self.tables)
        videos = []
        for tokens, grid in zip(self.head(x), grids.tolist(), strict=True):
            patches = tokens[: math.prod(grid)].view(*grid, *PATCH, 4)
            patches = torch.einsum("fhwpqrc->cfphqwr", patches)
            videos.append(patches.reshape(4, *(places * size for places, size in zip(grid, PATCH, strict=True))))
        return videos


def places(frames, rows, columns):
    """``[1, tokens, 3]``: each column written by itself."""
    ids = torch.zeros(frames, rows, columns, 3)
    ids[..., 0] = ids[..., 0] + torch.arange(frames)[:, None, None]
    ids[..., 1] = ids[..., 1] + torch.arange(rows)[None, :, None]
    ids[..., 2] = ids[..., 2] + torch.arange(columns)[None, None]
    return ids.reshape(1, -1, 3)


def rotations(position, size):
    angles = torch.einsum("bn,d->bnd", position.double(), 100 ** -(torch.arange(0, size, 2) / size).double())
    return torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2)).float()


def rotated(x, table):
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]).flatten(-2)


class IdsColumnByColumn(Model):
    """Text, then the video; ``ids[..., i]`` gives each part of the rope. ``packed``: tokens and ids are inputs, the caller unpacks."""

    class block(Block):
        def forward(self, x, table):
            query, key, value = (t.transpose(1, 2) for t in self.heads(x))
            attended = F.scaled_dot_product_attention(rotated(query, table), rotated(key, table), value)
            return x + self.out(attended.transpose(1, 2).flatten(2))

    def __init__(self, packed=False):
        super().__init__()
        self.packed, self.words = packed, nn.Linear(WIDTH, WIDTH)
        if packed:
            self.patch = nn.Linear(16, WIDTH)

    def forward(self, img, timesteps, txt, img_ids=None):
        grid = None
        if self.packed:
            x = self.patch(img) + self.time(timesteps[:, None] / 1000)[:, None]
        else:
            x, grid = self.tokens(img, timesteps)
            img_ids = places(*grid).repeat(len(x), 1, 1)
        ids = torch.cat([txt.new_zeros(*txt.shape[:2], 3), img_ids], 1)
        table = torch.cat([rotations(ids[..., i], size) for i, size in enumerate((4, 2, 2))], -3)[:, None]
        x = torch.cat([self.words(txt), x], 1)
        for block in self.blocks:
            x = block(x, table)
        x = x[:, txt.shape[1] :]
        return self.back(x) if grid is None else self.video(x, grid)
