"""Makes videos at one to six times the horizon in every way of ``methods.py``, and measures what happens in them.

    python examples/quality_lab/run.py                # everything, into examples/quality_lab/results.json
    python examples/quality_lab/run.py --quick        # dense and LVSA at four times the horizon, two minutes; fails unless LVSA moves more

Videos are kept in ``--videos``; run again, it makes those that are missing.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hashlib
import json
import multiprocessing
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from methods import METHODS, TRADE, Method
from model import CHECKPOINT, HORIZON, STEPS, generate, load, noise_of
from numpy.typing import NDArray
from physics import MEASURES, physics_of
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scenes import CAPTIONS, random_scene
from summary import difference, mean_of

import lvsa_compile
from lvsa_compile.report.report import versions
from lvsa_compile.source_stamp import source_stamp

MULTIPLES = (2, 3, 4, 6)
TRADE_MULTIPLES = (4, 6)
AGAIN_METHODS = ("dense", "lvsa", "lvsa fixed", "window only")
BATCH = 16
VQEVAL = ("spatial", "temporal", "loop", "artefacts", "dynamics", "composite")
ENLARGED = 8  # VQeval looks at pixels eight times as large, since it expects more than 16×16
SHOWN = ("dense", "lvsa", "lvsa fixed", "window only", "anchors only", "riflex", "ultravico")  # and the truth
SHOWN_SEED, SHOWN_MULTIPLE = 0, 4
RESULTS = Path(__file__).parent / "results.json"


def captions_of(seeds: list[int]) -> list[tuple[str, str, str]]:
    """All captions in turn."""
    return [CAPTIONS[seed % len(CAPTIONS)] for seed in seeds]


def videos_of(method: Method, frames: int, seeds: list[int], checkpoint: Path) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Videos ``[seeds, frames, 3, rows, columns]``, and what the backend said of them."""
    torch._dynamo.reset()
    lvsa_compile.reset()
    model = load(checkpoint)
    method.prepare(model, frames)
    compiled = torch.compile(model, backend="lvsa", options={"inner": "aot_eager", **method.options_for(frames)}, dynamic=False)
    made = []
    for begin in range(0, len(seeds), BATCH):
        some = seeds[begin : begin + BATCH]
        videos = generate(compiled, captions_of(some), noise_of(some, frames))
        made.append((videos * 255).round().to(torch.uint8).numpy())
    report = [report for report in lvsa_compile.reports() if report.sites][-1]
    sparse = [site for site in report.sparse_sites if site.density < 1]
    density = float(np.mean([site.density for site in sparse])) if sparse else 1.0
    facts = {"density": density, "sparse_sites": len(sparse)}
    return np.concatenate(made), facts


def code() -> str:
    """Identity of all that makes videos: the lab's sources, the package's, and torch."""
    sources = [Path(__file__).with_name(f"{name}.py").read_text() for name in ("methods", "model", "scenes")]
    return hashlib.sha256("".join([*sources, source_stamp()]).encode()).hexdigest()


def kept(method: Method, frames: int, seeds: list[int], checkpoint: Path, folder: Path) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """The same from the folder, where it was made before by the same code with the same weights, seeds and options."""
    about = (method.name, method.options_for(frames), frames, seeds, STEPS)
    identity = repr((about, hashlib.sha256(checkpoint.read_bytes()).hexdigest(), code()))
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    if path.is_file():
        held = np.load(path)
        return held["videos"], json.loads(str(held["facts"]))
    videos, facts = videos_of(method, frames, seeds, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, videos=videos, facts=json.dumps(facts))
    return videos, facts


def measured(job: tuple[NDArray[np.uint8], str]) -> dict[str, float]:
    """Physics and VQeval of one video, given the colour of its caption."""
    from lvsa_compile.vqeval import evaluate

    cv2.setNumThreads(1)
    video, colour = job
    found = dataclasses.asdict(physics_of(video.astype(np.float32) / 255, colour))
    large = [cv2.resize(frame.transpose(1, 2, 0), None, fx=ENLARGED, fy=ENLARGED, interpolation=cv2.INTER_CUBIC) for frame in video]
    scores = evaluate(np.stack(large).transpose(0, 3, 1, 2).astype(np.float32) / 255, fps=8)
    found |= {f"vqeval_{name}": getattr(scores, name) for name in VQEVAL if getattr(scores, name) is not None}
    return {name: round(float(value), 4) for name, value in found.items()}


def true_videos(frames: int, seeds: list[int]) -> NDArray[np.uint8]:
    """True scenes of the same captions."""
    scenes = [random_scene(np.random.default_rng([1, seed]), caption) for seed, caption in zip(seeds, captions_of(seeds), strict=True)]
    return np.stack([(scene.frames(frames) * 255).round().astype(np.uint8) for scene in scenes])


def sprite(video: NDArray[np.uint8]) -> str:
    """The frames of a video side by side, as a PNG in base64."""
    sheet = np.concatenate(list(video.transpose(0, 2, 3, 1)), 1)
    return base64.b64encode(
        cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()
    ).decode()


def whole() -> list[tuple[Method, int]]:
    """Which method at which multiple of the horizon; at the horizon itself dense alone, since LVSA is full there."""
    longer = [(method, multiple) for multiple in MULTIPLES for method in METHODS]
    return [(METHODS[0], 1), *longer, *((method, multiple) for multiple in TRADE_MULTIPLES for method in TRADE)]


QUICK = [(method, 4) for method in METHODS[:2]]
AGAIN = [(METHODS[0], 1), *((method, multiple) for multiple in (4, 6) for method in METHODS if method.name in AGAIN_METHODS)]


def run(checkpoint: Path, seeds: list[int], todo: list[tuple[Method, int]], folder: Path, command: str) -> dict[str, Any]:
    """All results, as they are written."""
    runs: list[dict[str, Any]] = []
    sprites: dict[str, str] = {}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for multiple in sorted({multiple for _, multiple in todo}):
            videos = true_videos(multiple * HORIZON, seeds)
            runs.append({"method": "truth", "multiple": multiple, "videos": _started(pool, videos, seeds).get()})
            if multiple == SHOWN_MULTIPLE:
                sprites["truth"] = sprite(videos[seeds.index(SHOWN_SEED)])
        waiting = []
        for method, multiple in track(todo, description="videos"):
            videos, facts = kept(method, multiple * HORIZON, seeds, checkpoint, folder)
            about = {"method": method.name, "multiple": multiple, "interval": method.interval(multiple * HORIZON), **facts}
            waiting.append((about, _started(pool, videos, seeds)))
            if multiple == SHOWN_MULTIPLE and method.name in SHOWN:
                sprites[method.name] = sprite(videos[seeds.index(SHOWN_SEED)])
        for about, results in track(waiting, description="measures"):
            runs.append(about | {"videos": results.get()})
    return {
        "command": command,
        "checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "versions": versions(),
        "horizon": HORIZON,
        "steps": STEPS,
        "seeds": seeds,
        "captions": [" ".join(caption) for caption in captions_of(seeds)],
        "runs": runs,
        "shown": {"seed": SHOWN_SEED, "multiple": SHOWN_MULTIPLE, "sprites": sprites},
    }


def _started(pool: Any, videos: NDArray[np.uint8], seeds: list[int]) -> Any:
    return pool.map_async(
        measured, [(video, colour) for video, (colour, _, _) in zip(videos, captions_of(seeds), strict=True)], chunksize=4
    )


def shown(results: dict[str, Any]) -> Table:
    """What came out at four times the horizon, with 95 % intervals; the difference is of videos of the same noise."""
    table = Table("4×, means", "truth", "dense", "LVSA", "LVSA minus dense, 95 % interval")
    for name in MEASURES:
        means = [f"{mean_of(results, way, 4, name).value:.3f}" for way in ("truth", "dense", "lvsa")]
        found = difference(results, "lvsa", "dense", 4, name)
        table.add_row(name, *means, f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--seeds", type=int, default=32, help="videos of each method and length")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", type=Path, help="weights of another training, of which a part is measured too")
    parser.add_argument("--videos", type=Path, default=Path("out/quality_lab/videos"), help="where videos are kept, but for --quick")
    parser.add_argument("--out", type=Path, help="by default results.json beside this file, and nothing with --quick")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: an interval needs at least 2")
    for path in (args.checkpoint, args.again):
        if path is not None and not path.is_file():
            parser.error(f"{path}: there is no such file; examples/quality_lab/train.py writes one")
    command = shlex.join(["python", "examples/quality_lab/run.py", *sys.argv[1:]])
    seeds = list(range(args.seeds))
    with tempfile.TemporaryDirectory() as fresh:
        results = run(args.checkpoint, seeds, QUICK if args.quick else whole(), Path(fresh) if args.quick else args.videos, command)
    if args.again is not None:
        again = run(args.again, seeds, AGAIN, args.videos, command)
        results["again"] = {name: again[name] for name in ("checkpoint", "seeds", "runs")}
    out = args.out or (None if args.quick else RESULTS)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=None, separators=(",", ":")).replace('{"method"', '\n{"method"') + "\n")
    if not args.quick:
        print(f"Written to {out}; docs/write_quality.py writes the page.")
        return
    Console().print(shown(results))
    if not difference(results, "lvsa", "dense", 4, "net_speed").low > 0:
        raise SystemExit("Dense attention is not slower than LVSA beyond its interval.")


if __name__ == "__main__":
    main()
