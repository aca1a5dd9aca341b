"""Runs passes in order: each is timed, says in a line what it changed, and may be switched off by name."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence, Sized
from pathlib import Path

from lvsa_compile.errors import OptionError
from lvsa_compile.passes.compilation import Compilation, Pass, PassRun

log = logging.getLogger(__name__)
_ALWAYS = ("find_attention", "decide")


def run_passes(passes: Sequence[Pass], compilation: Compilation, known: Sequence[Pass] = ()) -> Compilation:
    """The compilation after all passes but those of the option ``disable_passes``, which may name any of the ``known`` ones.

    With LVSA_DUMP_DIR set, the graph is written before the first and after each one.

    Raises:
        OptionError: ``disable_passes`` names no pass, or one that nothing can do without.
    """
    names = [name_of(step) for step in passes]
    disabled = compilation.options.disable_passes
    check_disabled(disabled, (*passes, *known))
    dump(compilation, "0-before")
    for number, (name, step) in enumerate(zip(names, passes, strict=True), start=1):
        if name in disabled:
            log.debug("pass %d %s is switched off", number, name)
            continue
        before, nodes, started = compilation, len(compilation.graph_module.graph.nodes), time.perf_counter()
        compilation = step(compilation)
        done = PassRun(name, what_changed(before, compilation, nodes), time.perf_counter() - started)
        compilation = dataclasses.replace(compilation, passes=(*compilation.passes, done))
        log.debug("pass %d %s: %s (%.3f s)", number, name, done.changed, done.seconds)
        dump(compilation, f"{number}-{name}")
    return compilation


def name_of(step: Pass) -> str:
    """A pass by the name of its function."""
    return getattr(step, "__name__", str(step))


def what_changed(before: Compilation, after: Compilation, nodes: int) -> str:
    """The parts of a compilation that a pass filled in or changed, and how many nodes it added to the graph of ``nodes`` or took out."""
    found = []
    for field in dataclasses.fields(Compilation):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if field.name in ("passes", "graph_module") or old is new or old == new:
            continue
        found.append(f"{field.name}: {len(new)}" if isinstance(new, Sized) and not isinstance(new, str) else f"{field.name}: {_short(new)}")
    now = len(after.graph_module.graph.nodes)
    found += [f"{now - nodes:+d} nodes"] if now != nodes else []
    return "; ".join(found) or "nothing changed"


def dump(compilation: Compilation, stage: str) -> None:
    """Writes the graph and what is decided so far to the folder of LVSA_DUMP_DIR, where that is set."""
    folder = os.environ.get("LVSA_DUMP_DIR")
    if not folder:
        return
    path = Path(folder) / f"{compilation.compile_id.replace('/', '.')}.{stage}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {compilation.model or 'graph'} [{compilation.compile_id}] {stage}"]
    lines += [f"# {d.name}: {f'sparse by {d.plan.choice.lowering.name}' if d.plan else d.miss} [{d.layout}]" for d in compilation.decisions]
    path.write_text("\n".join([*lines, "", str(compilation.graph_module.print_readable(print_output=False))]))


def check_disabled(disabled: Sequence[str], passes: Sequence[Pass]) -> None:
    """Checks the option ``disable_passes``.

    Raises:
        OptionError: it names no pass, or one that nothing can do without.
    """
    names = [name_of(step) for step in passes]
    for name in disabled:
        if name in _ALWAYS:
            problem = f"nothing is known without pass {name!r}"
            raise OptionError("disable_passes", list(disabled), problem, 'Use backend="inductor" to do without all of them.')
        if name not in names:
            raise OptionError(
                "disable_passes", list(disabled), f"there is no pass {name!r}", f"The passes are: {', '.join(dict.fromkeys(names))}."
            )


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
