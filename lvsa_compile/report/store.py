"""The reports of this process: the graphs of one forward are one report."""

from __future__ import annotations

import dataclasses
import threading

from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.forward import context
from lvsa_compile.report.report import Report, with_what_ran


@dataclasses.dataclass
class _Entry:
    report: Report
    entry: tuple[int, int]
    forward: object = None


_entries: list[_Entry] = []
_lock = threading.Lock()


def add(report: Report, compiled: object, forward: context.Parent | None = None) -> Report:
    """Adds the report of a graph and returns that of its forward so far; ``compiled`` is what the user called, None if unknown.

    A graph joins the last report of the same ``forward`` of a model whose blocks are compiled one by one; else that of the same function
    and thread whose code was not compiled there before: those are the graphs of one forward.  The same code again is a new forward, with
    other sizes.
    """
    entry = (threading.get_ident(), id(compiled))
    with _lock:
        if forward is not None:
            last = next((each for each in _entries if each.forward is forward.token), None)
        else:
            last = next((each for each in reversed(_entries) if each.entry == entry), None) if compiled is not None else None
            last = last if last is not None and not _codes(last.report) & _codes(report) else None
        if last is None:
            last = _Entry(report, entry, None if forward is None else forward.token)
            _entries.append(last)
        else:
            last.report = merged([last.report, report])
        return last.report


def _codes(report: Report) -> set[str]:
    """The code objects a report's graphs were compiled from, by torch's numbers."""
    return {graph.compile_id.split("/")[0] for graph in report.graphs}


def merged(parts: list[Report]) -> Report:
    """The reports of several graphs of one forward as one."""
    known = [part for part in parts if part.model and part.sites] or parts
    return dataclasses.replace(known[0], graphs=tuple(graph for part in parts for graph in part.graphs))


def report_with(compile_id: str) -> Report | None:
    """The report of the forward that the graph of a compile is part of."""
    with _lock:
        return next(
            (each.report for each in reversed(_entries) if any(graph.compile_id == compile_id for graph in each.report.graphs)), None
        )


def reports() -> list[Report]:
    """One report per model and forward that was compiled since the last ``torch._dynamo.reset()``, oldest first.

    Example:
        >>> for report in lvsa_compile.reports():
        ...     print(report.summary)
    """
    with _lock:
        return [with_what_ran(each.report) for each in _entries]


@dropped_on_reset
def _forget() -> None:
    with _lock:
        _entries.clear()
