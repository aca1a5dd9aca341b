"""One attention site, computed in every way there is: what each takes, and how far it is from float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lvsa_compile.bench.measuring import in_turn, peak_bytes
from lvsa_compile.policies.lvsa.frame_pattern import FramePattern
from lvsa_compile.policies.lvsa.policy import plan_with
from lvsa_compile.policies.tables import VideoSpan, query_blocks
from lvsa_compile.selection.contract import AttentionCall
from lvsa_compile.selection.select import lowerings, select

Row = dict[str, Any]
Attention = Callable[[], Tensor]
_CHECKED_ROWS = 512
_STEP = 1  # of the rotation: the anchors are neither where they begin nor where they end


@dataclass(frozen=True)
class Site:
    """Self-attention over ``prefix`` tokens, a video of ``frames`` latent frames, and ``suffix`` tokens."""

    frames: int
    tokens_per_frame: int
    heads: int
    head_dim: int = 128
    reference: int = 21
    dtype: str = "float32"
    batch: int = 1
    key_heads: int = 0  # 0: as many as heads
    prefix: int = 0
    suffix: int = 0
    padded: int = 0  # tokens at the end that no query attends
    kind: str = "plain"

    @property
    def span(self) -> VideoSpan:
        """Where the video lies."""
        return VideoSpan(self.prefix, self.frames, self.tokens_per_frame, self.suffix)

    @property
    def pattern(self) -> FramePattern:
        """LVSA's pattern with its published settings."""
        return FramePattern(self.frames, reference_frames=self.reference)

    @property
    def flops(self) -> float:
        """Of dense attention."""
        return 4.0 * self.batch * self.heads * self.span.length**2 * self.head_dim


MAIN = tuple(
    Site(*shape[:4], reference=shape[4], dtype=dtype)
    for dtype in ("float32", "bfloat16")
    for shape in ((41, 240, 4, 128, 21), (81, 96, 12, 128, 21), (121, 60, 12, 128, 21), (121, 96, 8, 128, 21), (65, 120, 8, 128, 33))
)


def variants_of(site: Site) -> tuple[Site, ...]:
    """The same video as models put it to attention: beside text, padded, with guidance in the batch, with grouped queries."""
    text = site.span.length // 40
    return (
        site,
        replace(site, kind="joint, text first", prefix=text),
        replace(site, kind="joint, text last", suffix=text),
        replace(site, kind="joint, padded text", suffix=text, padded=text // 2),
        replace(site, kind="batch 2", batch=2),
        replace(site, kind="grouped queries", key_heads=max(1, site.heads // 4)),
    )


VARIANTS = variants_of(MAIN[1])


def sweep() -> tuple[Site, ...]:
    """40 sites from tiny to large: frames 9 to 161, tokens per frame 16 to 400, heads 1 and as many as a second or so allows."""
    sites = []
    for frames in (9, 25, 41, 81, 161):
        for tokens in (16, 60, 120, 400):
            few = Site(frames, tokens, 1, head_dim=64, kind="sweep")
            many = next((n for n in (16, 8, 4) if few.flops * n < 3e11), 2)
            sites += [few, replace(few, heads=many)]
    return tuple(sites)


def growth(horizons: Sequence[int] = (2, 4, 6, 8, 10, 12)) -> tuple[Site, ...]:
    """One site at growing multiples of the horizon."""
    return tuple(Site(21 * n, 60, 4, kind="growth") for n in horizons)


class Measured:
    """A site's tensors, its table at one step, and the ways of computing it."""

    def __init__(self, site: Site, device: torch.device, step: int = _STEP) -> None:
        self.site, self.device = site, device
        torch.manual_seed(0)
        dtype, length = getattr(torch, site.dtype), site.span.length
        sizes = [(site.batch, length, n, site.head_dim) for n in (site.heads, *(site.key_heads or site.heads,) * 2)]
        self.query, self.key, self.value = (torch.randn(s, dtype=dtype, device=device).transpose(1, 2) for s in sizes)
        self.key_mask = None
        if site.padded:
            self.key_mask = (torch.arange(length, device=device) < length - site.padded).expand(site.batch, 1, 1, length)
        pattern = site.pattern
        self.plan = plan_with(pattern, site.span, site.span, heads=site.heads)
        table = self.plan.table
        self.phase = step % pattern.phases
        self.blocks = list(zip(query_blocks(site.span), table.key_ranges[self.phase][0], strict=True))
        self._tables = [torch.tensor(rows, dtype=torch.int32, device=device) for rows in (table.query_bounds, table.key_ranges, self.phase)]
        self.attended = torch.zeros(site.frames, site.frames, dtype=torch.bool, device=device)
        for frame in range(site.frames):
            self.attended[frame, pattern.attended(frame, self.phase)] = True

    @property
    def density(self) -> float:
        """Attended pairs of tokens over all pairs, at this step."""
        pairs = sum((end - start) * sum(b - a for a, b in ranges) for (start, end), ranges in self.blocks)
        return pairs / self.site.span.length**2

    @property
    def call(self) -> AttentionCall:
        """The site as lowerings see it."""
        site = self.site
        return AttentionCall(
            self.device, self.query.dtype, site.batch, site.heads, site.key_heads or site.heads, site.head_dim, site.head_dim,
            self.plan, masked=self.key_mask is not None,
        )  # fmt: skip

    def dense(self) -> Tensor:
        """``scaled_dot_product_attention``."""
        return scaled_dot_product_attention(self.query, self.key, self.value, self.key_mask, enable_gqa=self._grouped)

    def gathered(self) -> Tensor:
        """Keys and values of each query block gathered, then dense attention: the loop of the reference implementation."""
        output = torch.empty_like(self.query)
        for (start, end), ranges in self.blocks:
            key, value = (torch.cat([t[:, :, a:b] for a, b in ranges], 2) for t in (self.key, self.value))
            mask = None if self.key_mask is None else torch.cat([self.key_mask[..., a:b] for a, b in ranges], 3)
            output[:, :, start:end] = scaled_dot_product_attention(self.query[:, :, start:end], key, value, mask, enable_gqa=self._grouped)
        return output

    @functools.cached_property
    def flex(self) -> Attention:
        """Compiled FlexAttention under the same mask."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        site, length = self.site, self.site.span.length
        first, tokens, end = site.prefix, site.tokens_per_frame, length - site.suffix

        def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            frames = [((at - first) // tokens).clamp(0, site.frames - 1) for at in (query, key)]
            outside = (query < first) | (query >= end) | (key < first) | (key >= end)
            return (self.attended[frames[0], frames[1]] | outside) & (key < length - site.padded)

        on_gpu = self.device.type != "cpu"  # where it is compiled: by itself it takes eleven bytes for each pair of tokens
        block_mask = create_block_mask(attends, None, None, length, length, device=str(self.device), _compile=on_gpu)
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(self.query, self.key, self.value, block_mask=block_mask, enable_gqa=self._grouped)

    def lowered(self, name: str) -> Attention:
        """The attention op by a lowering of this package."""
        lowering = next(lowering for lowering in lowerings() if lowering.name == name)
        tables = [table.to(lowering.device_of_tables(self.device)) for table in self._tables]
        assert lowering.operator is not None, f"{name} is no op of its own"
        operator = lowering.operator
        return lambda: operator(self.query, self.key, self.value, *tables, key_mask=self.key_mask)[0]

    def worst_error(self, output: Tensor, sparse: bool) -> float:
        """Largest difference from attention in float64, over rows spread evenly, relative to the largest value there."""
        length, group = self.site.span.length, self.query.shape[1] // self.key.shape[1]
        rows = torch.linspace(0, length - 1, min(_CHECKED_ROWS, length), device=self.device).long()
        mask = torch.ones(len(rows), length, dtype=torch.bool, device=self.device)
        if sparse:
            for (start, end), ranges in self.blocks:
                inside = (rows >= start) & (rows < end)
                mask[inside] = False
                for a, b in ranges:
                    mask[inside, a:b] = True
        mask = mask if self.key_mask is None else mask & self.key_mask
        worst = largest = 0.0
        for b in range(self.site.batch):
            for h in range(self.site.heads):
                query, key, value = self.query[b, h, rows].double(), self.key[b, h // group].double(), self.value[b, h // group].double()
                scores = (query @ key.T / math.sqrt(self.site.head_dim)).masked_fill(
                    ~mask[b, 0] if mask.dim() == 4 else ~mask, float("-inf")
                )
                expected = scores.softmax(-1) @ value
                worst = max(worst, float((output[b, h, rows].double() - expected).abs().max()))
                largest = max(largest, float(expected.abs().max()))
        return worst / largest

    @property
    def _grouped(self) -> bool:
        return self.query.shape[1] != self.key.shape[1]


def measure(site: Site, device: torch.device, rounds: int, *, peers: bool = True, errors: bool = True) -> list[Row]:
    """A row per contender: the first is dense attention, which the others' speed-ups refer to.

    ``peers=False`` leaves only dense attention and what the backend would choose, which is dense attention where the pattern is full.
    """
    with torch.no_grad():
        found = Measured(site, device)
        chosen = select(found.call).lowering.name
        full = site.pattern.is_full
        ours = {chosen: found.dense if full else found.lowered(chosen)}
        contenders: dict[str, Attention] = {"dense SDPA": found.dense}
        if peers:
            contenders |= {"FlexAttention": found.flex, "gather per frame": found.gathered}
            for lowering in lowerings():
                if lowering.name != "reference" and lowering.refusal(found.call) is None:
                    ours.setdefault(lowering.name, found.lowered(lowering.name))
        contenders |= {f"lvsa {name}": run for name, run in ours.items()}
        seconds = in_turn(contenders, rounds, device, least_seconds=0.0 if peers else 0.5)
        bound = 1.0 / found.density
        tensors = found.query.nbytes * 2 + found.key.nbytes * 2
        rows = []
        for name, run in contenders.items():
            peak = peak_bytes(run, device) if peers else None
            speedup = seconds[name].times_faster_than(seconds["dense SDPA"])
            sparse = name != "dense SDPA" and not full
            rows.append({
                **asdict(site), "contender": name, "chosen": name == f"lvsa {chosen}", "density": found.density,
                "seconds": seconds[name].median, "spread": seconds[name].spread, "rounds": len(seconds[name].rounds),
                "speedup": speedup, "bound": bound if sparse else 1.0, "share": speedup / bound if sparse else 1.0,
                "peak_bytes": peak, "temporaries": None if peak is None else max(0.0, (peak - found.query.nbytes) / tensors),
                "worst_error": found.worst_error(run(), sparse) if errors else None,
            })  # fmt: skip
        torch.compiler.reset()
    return rows
