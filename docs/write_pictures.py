"""Draws the pictures of the documents from the code: ``python docs/write_pictures.py``."""

from __future__ import annotations

from pathlib import Path

from lvsa_compile import FramePattern

FOLDER = Path(__file__).parent / "pictures"
CELL, SECONDS_PER_STEP = 8, 0.7
PATTERN = FramePattern(49, reference_frames=13)
STYLE = "svg{{color-scheme:light dark}}.a{{fill:#d18a2f}}.w{{fill:#4a90d0}}g{{visibility:hidden;animation:s {turn}s step-end infinite}}"


def rotation() -> str:
    """The mask of a video of 49 latent frames, step by step: a row is a query frame, a column a frame that it attends."""
    side, turn = PATTERN.frames * CELL, PATTERN.phases * SECONDS_PER_STEP
    shown = f"@keyframes s{{0%{{visibility:visible}}{100 / PATTERN.phases:.4g}%{{visibility:hidden}}}}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" width="{side}" height="{side}" role="img">',
        f"<title>Each frame attends to anchors, which move with the step, and to its window: {PATTERN.density:.0%} of all pairs</title>",
        f"<style>{STYLE.format(turn=f'{turn:.4g}')}{shown}</style>",
        f'<rect width="{side}" height="{side}" fill="#8882"/>',
    ]
    for phase in range(PATTERN.phases):
        anchors = set(PATTERN.anchors(phase))
        lines.append(f'<g style="animation-delay:{phase * SECONDS_PER_STEP - turn:.4g}s">')
        for frame in range(PATTERN.frames):
            own = [other for other in PATTERN.attended(frame, phase) if other not in anchors]
            if own:
                lines.append(
                    f'<rect class="w" x="{own[0] * CELL}" y="{frame * CELL}" width="{(own[-1] - own[0] + 1) * CELL}" height="{CELL}"/>'
                )
        lines += [f'<rect class="a" x="{anchor * CELL}" width="{CELL}" height="{side}"/>' for anchor in sorted(anchors)]
        lines.append("</g>")
    return "\n".join([*lines, "</svg>", ""])


def sequence() -> str:
    """The tokens of a short video with text behind it, frame by frame, and which of them one frame's tokens attend, for three steps."""
    pattern, frame, text, width, height = FramePattern(21, window=2, reference_frames=9), 10, 3, 32, 26
    whole = (pattern.frames + text) * width
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {5 * height}" width="{whole}" height="{5 * height}" role="img">',
        f"<title>What the tokens of latent frame {frame} attend in three denoising steps</title>",
        "<style>svg{color-scheme:light dark;font:13px sans-serif}.a{fill:#d18a2f}.w{fill:#4a90d0}.t{fill:#7a8a5a}.s{fill:#8883}"
        "text{fill:#888;text-anchor:middle}</style>",
    ]
    for place in range(pattern.frames):
        lines.append(f'<text x="{(place + 0.5) * width}" y="16">{place}</text>')
    lines.append(f'<text x="{(pattern.frames + text / 2) * width}" y="16">text</text>')
    for step in range(3):
        anchors, attended, top = pattern.anchors(step), pattern.attended(frame, step), (1.2 + 1.2 * step) * height
        for place in range(pattern.frames):
            kind = "a" if place in anchors else "w" if place in attended else "s"
            lines.append(f'<rect class="{kind}" x="{place * width + 1}" y="{top:.4g}" width="{width - 2}" height="{height}"/>')
        lines.append(f'<rect class="t" x="{pattern.frames * width + 1}" y="{top:.4g}" width="{text * width - 2}" height="{height}"/>')
    return "\n".join([*lines, "</svg>", ""])


PICTURES = {"rotation.svg": rotation, "sequence.svg": sequence}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw())
