"""Paths of modules that differ only in their numbers, as one name."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def together(names: Sequence[str], what: str = "sites") -> str:
    """One name for several, by ``what`` they are: "blocks.0-2.attn1 (3 sites)".

    Where they differ in more than one number it is the first and a count.
    """
    count, names = len(names), list(dict.fromkeys(names))
    if count == 1:
        return names[0]
    if len(names) == 1:
        return f"{names[0]} ({count} {what})"
    parts = [name.split(".") for name in names]
    differing = [position for position, members in enumerate(zip(*parts, strict=False)) if len(set(members)) > 1]
    alike = len({len(path) for path in parts}) == 1 and len(differing) == 1
    if not alike or not all(path[differing[0]].isdigit() for path in parts):
        return f"{names[0]} and {count - 1} more"
    numbers = sorted(int(path[differing[0]]) for path in parts)
    runs = [list(run) for _, run in itertools.groupby(enumerate(numbers), lambda found: found[1] - found[0])]
    numbered = ",".join(str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)
    return ".".join([*parts[0][: differing[0]], numbered, *parts[0][differing[0] + 1 :]]) + f" ({count} {what})"
