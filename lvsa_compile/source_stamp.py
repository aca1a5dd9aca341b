"""The identity of this package's code, for caches that must never serve what another version made."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch


@functools.cache
def source_stamp() -> str:
    """A digest of the package's sources and torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"lvsa-compile {digest.hexdigest()}"
