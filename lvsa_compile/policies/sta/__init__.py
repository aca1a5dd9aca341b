"""STA: boxes of tokens attend a window of boxes around them, which may differ by step, layer and head (arXiv 2502.04507).

Example:
    >>> attended = sta.boxes((3, 6, 10), (3, 3, 3), tile=90)
"""

from lvsa_compile.policies.sta.tiles import attended_tiles, boxes, choose_windows, tile_order

__all__ = ["attended_tiles", "boxes", "choose_windows", "tile_order"]
