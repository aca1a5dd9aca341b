"""The identity of this package's code, for caches that must never serve what another version made."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

from lvsa_compile.registry import stamp_of_registered


@functools.cache
def source_stamp() -> str:
    """A digest of torch's version and of every file of the package: Python, the CPU kernel's C++, pages and tables alike.

    What other packages registered is digested, too.
    """
    digest, package = hashlib.sha256(torch.__version__.encode()), Path(__file__).parent
    for path in sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    digest.update(stamp_of_registered().encode())
    return f"lvsa-compile {digest.hexdigest()}"
