"""A Wan-shaped transformer end to end: ``backend="inductor"`` against ``backend="lvsa"`` at multiples of the horizon."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lvsa_compile.bench.measuring import in_turn, peak_bytes
from lvsa_compile.errors import BenchError
from lvsa_compile.policies.lvsa.frame_pattern import FramePattern
from lvsa_compile.report.store import reports

HORIZON = 21
_HEADS, _LAYERS, _ROWS, _COLUMNS = 4, 2, 16, 24  # of 128 each; latent rows and columns, twice the patches
_TEXT = 64

Row = dict[str, Any]


def wan_shaped(heads: int = _HEADS, ffn_dim: int = 2944, layers: int = _LAYERS) -> nn.Module:
    """Wan 2.1 1.3B with 2 layers for 30 and 4 heads for 12 unless others are given, widths in proportion, random weights.

    Raises:
        BenchError: diffusers is not installed.
    """
    try:
        from diffusers import WanTransformer3DModel
    except ImportError:
        raise BenchError("model", "needs diffusers", "Run `pip install diffusers`, or name other parts: lvsa bench sites.") from None
    torch.manual_seed(0)
    made: Any = WanTransformer3DModel
    model: nn.Module = made(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=512,
        freq_dim=256, ffn_dim=ffn_dim, num_layers=layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=1024,
    )  # fmt: skip
    return model.eval()


def inputs_of(
    frames: int, device: torch.device, dtype: torch.dtype = torch.float32, rows: int = _ROWS, columns: int = _COLUMNS
) -> dict[str, Any]:
    """One denoising step of a video of ``frames`` latent frames."""
    torch.manual_seed(1)
    latents = torch.randn(1, 16, frames, rows, columns).to(device, dtype)
    text = torch.randn(1, _TEXT, 512).to(device, dtype)
    timestep = torch.full((1,), 900.0, device=device)
    return {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text, "return_dict": False}


def flop_bound(model: nn.Module, frames: int, density: float) -> float:
    """How many times fewer FLOPs a step takes when video attention keeps ``density`` of its pairs."""
    total = total_flops(model, inputs_of(frames, torch.device("meta")))
    attention = attention_flops(frames * (_ROWS // 2) * (_COLUMNS // 2))
    return total / (total - attention * (1.0 - density))


def total_flops(model: nn.Module, inputs: dict[str, Any]) -> float:
    """Floating-point operations of a forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta")(**{name: each.to("meta") if isinstance(each, Tensor) else each for name, each in inputs.items()})
    return float(counter.get_total_flops())


def attention_flops(tokens: int) -> float:
    """Those of attention over a video of so many tokens, where the model has the layers and heads that it has by default."""
    return 4.0 * tokens**2 * _HEADS * 128 * _LAYERS


def measure(
    device: torch.device, rounds: int, horizons: Sequence[float] = (1, 2, 4, 6, 8, 12), dense_up_to: float = 6, errors: bool = True
) -> list[Row]:
    """A row per length; dense attention is left out beyond ``dense_up_to`` horizons."""
    rows = []
    with torch.no_grad(), _no_caches():
        plain = wan_shaped().to(device)
        for horizon in horizons:
            torch.compiler.reset()
            frames = round(HORIZON * horizon)
            inputs = inputs_of(frames, device)
            pattern = FramePattern(frames, reference_frames=HORIZON)
            row: Row = {"horizon": horizon, "frames": frames, "tokens": frames * (_ROWS // 2) * (_COLUMNS // 2)}
            steps: dict[str, Callable[[], Tensor]] = {}
            for name in ("inductor", "lvsa") if horizon <= dense_up_to else ("lvsa",):
                compiled = torch.compile(copy.deepcopy(plain), backend=name, dynamic=False)
                steps[name] = functools.partial(one_step, compiled, inputs)
                started = time.perf_counter()
                steps[name]()
                row[f"{name}_first"] = time.perf_counter() - started
            decided = {site.lowering for report in reports() for site in report.sparse_sites}
            row |= {"density": pattern.density, "lowering": ", ".join(sorted(decided)) or "dense: the pattern is full"}
            seconds = in_turn(steps, rounds if horizon <= 2 else max(3, rounds // 2), device)
            for name, found in seconds.items():
                row |= {name: found.median, f"{name}_spread": found.spread, f"{name}_peak_bytes": peak_bytes(steps[name], device)}
                row[f"{name}_compile"] = max(0.0, row.pop(f"{name}_first") - found.median)
                if errors:
                    row[f"{name}_worst_error"] = _error_of(steps[name](), plain, inputs, name)
            row |= {"bound": flop_bound(plain, frames, pattern.density), "rounds": len(seconds["lvsa"].rounds)}
            if "inductor" in seconds:
                row["speedup"] = seconds["lvsa"].times_faster_than(seconds["inductor"])
                row["share"] = row["speedup"] / row["bound"]
                row["identical"] = bool(torch.equal(steps["inductor"](), steps["lvsa"]()))
            rows.append(row)
    torch.compiler.reset()
    return rows


def one_step(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """What a denoising step gives."""
    output: Tensor = model(**inputs)[0]
    return output


def _error_of(output: Tensor, plain: nn.Module, inputs: dict[str, Any], name: str) -> float:
    """Largest difference from the same model in float64, relative to the largest value; sparse by the merge of dense kernels."""
    exact: Callable[..., Any] = copy.deepcopy(plain).double()
    if name == "lvsa":
        exact = torch.compile(exact, backend="lvsa", dynamic=False, options={"inner": "eager"})
    widened = {key: value.double() if isinstance(value, Tensor) and key != "timestep" else value for key, value in inputs.items()}
    expected = one_step(exact, widened)
    return float((output.double() - expected).abs().max() / expected.abs().max())


@contextlib.contextmanager
def _no_caches() -> Iterator[None]:
    """So that seconds of compiling are those of a first compile."""
    before = torch.compiler.config.force_disable_caches
    torch.compiler.config.force_disable_caches = True
    try:
        yield
    finally:
        torch.compiler.config.force_disable_caches = before
