"""HASTE: heads keep their blocks while queries and keys stay where they were, and get thresholds by what they cost (arXiv 2605.14513).

Example:
    >>> heads = haste.refresh(haste.drift(query.mean(2), key.mean(2), anchor_query, anchor_key), threshold=30.0)
"""

from lvsa_compile.policies.haste.calibration import BANDS, allot, band_errors, spectral_error
from lvsa_compile.policies.haste.policy import Haste
from lvsa_compile.policies.haste.refreshing import drift, refresh

__all__ = ["BANDS", "Haste", "allot", "band_errors", "drift", "refresh", "spectral_error"]
