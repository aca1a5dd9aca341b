"""The picture of ``lvsa bench``: seconds of a denoising step against frames, dense and sparse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvsa_compile.errors import BenchError


def digest(results: dict[str, Any]) -> str:
    """Identity of what is drawn; an SVG carries it as its description."""
    return hashlib.sha256(json.dumps(results["model"]).encode()).hexdigest()


def check(parts: Sequence[str]) -> None:
    """Whether a picture can be drawn when these parts have been measured.

    Raises:
        BenchError: what is drawn is not among them, or matplotlib is not installed.
    """
    if "model" not in parts:
        raise BenchError("plot", "the part 'model' is not among the parts", "Add model to the parts.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BenchError("plot", "needs matplotlib", "Run `pip install lvsa-compile[bench]`, or leave --plot away.") from None


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the part "model" into an SVG, PNG or PDF file.

    Raises:
        BenchError: see ``check``.
    """
    check(list(results))
    import matplotlib
    from matplotlib.figure import Figure

    rows = results["model"]
    with matplotlib.rc_context({"svg.hashsalt": "lvsa", "svg.fonttype": "none", "font.size": 11}):
        axes = (figure := Figure(figsize=(7, 4.2), layout="constrained")).subplots()
        dense = [row for row in rows if "inductor" in row]
        axes.plot([r["frames"] for r in dense], [r["inductor"] for r in dense], "o-", color="#b4482f", label='dense, backend="inductor"')
        axes.plot([r["frames"] for r in rows], [r["lvsa"] for r in rows], "o-", color="#1f6f8b", label='sparse, backend="lvsa"')
        axes.plot(
            [r["frames"] for r in dense],
            [r["inductor"] / r["bound"] for r in dense],
            ":",
            color="#777777",
            label="dense, counting only the FLOPs kept",
        )
        axes.axvline(21, color="#cccccc", zorder=0)
        axes.annotate("horizon", (21, axes.get_ylim()[1]), xytext=(4, -12), textcoords="offset points", color="#777777")
        axes.set(
            xlabel="latent frames",
            ylabel="seconds per denoising step",
            ylim=(0, None),
            title=f"Wan-shaped transformer on {results['machine']['device']}",
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None, "Description": digest(results)} if path.suffix == ".svg" else None)
