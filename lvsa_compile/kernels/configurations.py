"""Tile sizes of the Triton kernel by device and head dim: a small list, each of which is compiled and inspected by ``lvsa kernels``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Configuration:
    """How one launch is cut: query rows and keys per tile, warps that share it, blocks of keys in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int


INTERPRETED = Configuration(16, 16, 4, 1)

_Table = dict[str, dict[int, tuple[Configuration, ...]]]  # target -> head dim up to -> best first, by size and registers; untimed

_BY_DESCRIPTOR: _Table = {  # parts that copy tiles by tensor descriptor
    "cuda:90": {
        96: (Configuration(128, 128, 8, 2), Configuration(128, 128, 8, 3), Configuration(128, 64, 8, 3)),
        128: (Configuration(128, 128, 8, 2), Configuration(128, 64, 8, 3), Configuration(128, 64, 8, 4)),
        256: (Configuration(128, 64, 8, 2),),
    },
    "cuda:100": {
        128: (Configuration(128, 64, 8, 3), Configuration(128, 64, 8, 2)),
        256: (Configuration(64, 64, 8, 2),),
    },
    "cuda:120": {
        96: (Configuration(128, 64, 8, 2), Configuration(128, 64, 8, 3)),
        128: (Configuration(128, 64, 8, 2), Configuration(128, 32, 8, 3)),
        256: (Configuration(64, 32, 4, 1),),
    },
}  # fmt: skip

_BY_POINTER: _Table = {
    "cuda:80": {
        96: (Configuration(128, 32, 8, 3),),
        128: (Configuration(64, 64, 8, 3), Configuration(64, 64, 8, 2)),
        256: (Configuration(64, 32, 4, 2),),
    },
    "cuda:90": {
        256: (Configuration(128, 64, 8, 2),),
    },
    "cuda:100": {
        64: (Configuration(128, 64, 8, 2),),
        128: (Configuration(64, 64, 8, 2),),
        256: (Configuration(64, 64, 8, 2),),
    },
    "cuda:120": {
        80: (Configuration(128, 32, 8, 2),),
        96: (Configuration(64, 64, 8, 2),),
        128: (Configuration(128, 32, 8, 2),),
        256: (Configuration(64, 32, 4, 1),),
    },
    "hip": {
        64: (Configuration(128, 64, 8, 2), Configuration(128, 32, 8, 1)),
        128: (Configuration(128, 32, 8, 1),),
        256: (Configuration(64, 32, 4, 1),),
    },
}  # fmt: skip


def configurations(target: str, head_dim: int, element_bytes: int, described: bool = False) -> tuple[Configuration, ...]:
    """Best first, for ``target`` such as "cuda:90" or "hip:gfx942"; none where it has no tensor descriptors and they are wanted.

    float32 takes smaller tiles, by pointer.  A CUDA device between two known ones takes the list of the older.
    """
    kind, _, version = target.partition(":")
    if described and (element_bytes > 2 or kind != "cuda" or int(version) < 90):
        return ()
    table = _BY_DESCRIPTOR if described else _BY_POINTER
    found = next(listed for most, listed in table[nearest(target, table)].items() if head_dim <= most)
    if element_bytes <= 2:
        return found
    return tuple(Configuration(c.block_m // 2, max(16, c.block_n // 2), c.warps, 1) for c in found)


def nearest(target: str, known: Iterable[str]) -> str:
    """Of ``known`` targets the one that serves ``target``: its kind, or for CUDA the newest that is no newer."""
    kind, _, version = target.partition(":")
    if kind != "cuda":
        return kind
    versions = [int(name.partition(":")[2]) for name in known if name.startswith("cuda:")]
    return f"cuda:{max((n for n in versions if n <= int(version)), default=min(versions))}"


def column_widths(head_dim: int) -> tuple[int, int]:
    """A head dim as two powers of two, 0 or at least 16: 96 as 64 and 32, 80 as 64 and 16; else the next power of two, padded."""
    largest = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - largest
    if largest >= 16 and (rest == 0 or (rest >= 16 and rest & (rest - 1) == 0)):
        return largest, rest
    return max(16, power_of_two(head_dim)), 0


def power_of_two(n: int) -> int:
    """The least that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()
