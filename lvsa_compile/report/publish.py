"""Everybody who is to know of a report: the store, logs, counters, torch's trace, and the user by warnings."""

from __future__ import annotations

import json
import logging
import warnings

from torch.utils.weak import WeakIdKeyDictionary

from lvsa_compile import compat
from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.errors import LvsaWarning
from lvsa_compile.forward import context
from lvsa_compile.report.report import Report
from lvsa_compile.report.store import add

log = logging.getLogger(__name__)
_warned: set[str] = dropped_on_reset(set())
_models_warned_of: WeakIdKeyDictionary = dropped_on_reset(WeakIdKeyDictionary())


def publish(report: Report) -> Report:
    """Keeps the report, logs its line and counts; returns the report of the forward so far."""
    compat.trace_artifact("lvsa_report", lambda: json.dumps(report.to_dict(), indent=1))
    forward = add(report, compat.compiled_entry(), context.parent.get())
    log.info("%s", report.summary)
    log.debug("%s", report)
    counts = compat.counters()
    counts["sites"] += len(report.sites)
    counts["sparse"] += len(report.sparse_sites)
    for site in report.sites:
        if site.reason:
            counts[f"dense.{site.reason}"] += 1
    return forward


def warn_of_model(message: str) -> None:
    """Warns once for each model, whatever differs between its graphs and sizes; for each message where the model is not known."""
    model = context.root_module()
    if message and (model is None or model not in _models_warned_of):
        if model is not None:
            _models_warned_of[model] = True
        warn_once(message)


def warn_once(message: str) -> None:
    """Warns of each message once, until ``torch._dynamo.reset()``."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, LvsaWarning, stacklevel=2)
        log.info("%s", message)
