"""Writes ``options.md``, ``reasons.md`` and ``behaviours.md`` from code and tests: ``python docs/write_reference.py``."""

from __future__ import annotations

import sys
from pathlib import Path

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


PAGES = {"options.md": options_page, "reasons.md": reasons_page, "behaviours.md": behaviours_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
