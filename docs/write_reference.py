"""Writes ``options.md``, ``reasons.md`` and ``behaviours.md`` from code and tests: ``python docs/write_reference.py``."""

from __future__ import annotations

import sys
from pathlib import Path

from lvsa_compile.horizons import HORIZONS
from lvsa_compile.options import option_fields
from lvsa_compile.reasons import NOTHING_TO_DO, REASONS

FOLDER = Path(__file__).parent


def options_page() -> str:
    """Every option with default and meaning."""
    rows = [f"| `{field.name}` | `{field.default!r}` | {field.metadata['meaning']} |" for field in option_fields()]
    return "\n".join(
        [
            "# Options",
            "",
            "Written by `python docs/write_reference.py` from `lvsa_compile/options.py`.",
            "",
            '`torch.compile(model, backend="lvsa", options={...})` takes these names, and beside them the keys of Inductor\'s own',
            "configuration. Any other name is an error that names the nearest option. `lvsa_compile.make_options(...)` checks them before",
            "the first forward.",
            "All lengths are in latent frames as the transformer sees them, after temporal patchify.",
            "",
            "| option | default | meaning |",
            "|---|---|---|",
            *rows,
            "",
            "## Where a program takes a backend by name alone",
            "",
            "Many programs take `--compile-backend lvsa` and no options. Two ways give them, key by key, to every compile that does not",
            "give them itself; a call comes before the function, the function before the variable. The report names the source of each.",
            "",
            "| way | reaches |",
            "|---|---|",
            "| `LVSA_OPTIONS='{\"reference_frames\": 21}'`, a JSON object in the environment | this process and those that it starts |",
            "| `lvsa_compile.set_default_options(reference_frames=21)` | this process; each call replaces the one before |",
            "",
            "Both hold for what is compiled from then on. A bad value is an error that names the variable.",
            "",
        ]
    )


def reasons_page() -> str:
    """Every reason with meaning and remedy."""
    rows = [f"| `{reason.code}` | {reason.meaning} | {reason.remedy or NOTHING_TO_DO} |" for reason in REASONS]
    return "\n".join(
        [
            "# Why a site is dense",
            "",
            "Written by `python docs/write_reference.py` from `lvsa_compile/reasons.py`.",
            "",
            "Every attention site that is not rewritten has exactly one of these reasons, in the log line, in the report and here.",
            "",
            "| reason | meaning | remedy |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def behaviours_page() -> str:
    """What works around diffusers, from the rows that the tests hold."""
    sys.path.insert(0, str(FOLDER.parent / "tests"))
    import test_patched_models  # noqa: F401 - adds rows
    from test_behaviours import ROWS

    rows = [f"| {what} | {result} | {note or '–'} |" for what, result, note in ROWS]
    return "\n".join(
        [
            "# Behaviours around diffusers",
            "",
            "Written by `python docs/write_reference.py` from `tests/test_behaviours.py` and `tests/test_patched_models.py`: each row is a",
            'test with a real diffusers pipeline or model of small random parts. Where a row says "works", the result equals the',
            "uncompiled pipeline with explicit LVSA masks.",
            "",
            "| what you do | result | note |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def models_page() -> str:
    """Which models were tried, from the rows that the tests hold."""
    sys.path.insert(0, str(FOLDER.parent / "tests"))
    from test_models import COLUMNS, FRAMES, MODELS, ROWS, built
    from test_originals import FORMS, STRUCTURES

    rows = []
    for name, facts in MODELS.items():
        kind = type(built(name)[0]).__name__
        horizons = sorted({row.frames for row in HORIZONS if row.class_name == kind})
        frames = "–" if facts.dense else " or ".join(map(str, horizons)) or "give `reference_frames`"
        ways = [way for way, held in (("whole", facts.whole), ("block by block", facts.blocks)) if held]
        ways = [f"{way}, `fullgraph=True`" if facts.fullgraph else way for way in ways]
        result = f"dense: `{facts.dense}`" if facts.dense else " and ".join(ways)
        rows.append(f"| {facts.what} | `{kind}` | {facts.sequence} | {frames} | {result} |")
    return "\n".join(
        [
            "# Models",
            "",
            "Written by `python docs/write_reference.py` from `tests/test_models.py` and `tests/test_originals.py`.",
            "",
            "Nothing here is a list of what is supported: the layout is inferred from the graph, so that a model that is not listed is",
            "tried like any other, and `lvsa explain` says what became of it. Each row is a test with diffusers' own class and small",
            f"random weights, a video of {FRAMES} latent frames of {ROWS} by {COLUMNS} tokens, float32, on the CPU: two denoising steps of",
            "the compiled model equal the uncompiled one whose attention was given the explicit mask of each step. No checkpoints were",
            "tried: none can be had where these tests run.",
            "",
            "The horizon is the training length in latent frames that the table in `lvsa_compile/horizons.py` holds for the class; where",
            "it holds several, the model's config decides, and the option `reference_frames` beats it. Compiled *whole* means",
            "`torch.compile(model)`, *block by block* `lvsa_compile.compile_repeated_blocks(model)`.",
            "",
            "| model | class | attention over the video sees | horizon | sparse and exact when compiled |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "## Structures",
            "",
            "How original repositories write their models, each tried as a tiny model of the tests' own: as a whole, with `dynamic=True`,",
            "by blocks and in eager code, two sizes and two videos of three denoising steps, each output against the explicit mask of its",
            "step. In brackets: how many forwards are dense before the first sparse one, in these four ways. Attention of other libraries",
            "runs by stand-ins with the packages' schemas; the packages themselves need a GPU.",
            "",
            "| structure | seen in | result |",
            "|---|---|---|",
            *(f"| {each.what} | {each.seen} | sparse ({', '.join(map(str, each.dense_first))}) |" for each in STRUCTURES),
            *(f"| {what} | {seen} | {result} |" for what, seen, result in FORMS),
            "",
        ]
    )


PAGES = {"models.md": models_page, "options.md": options_page, "reasons.md": reasons_page, "behaviours.md": behaviours_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
