"""How many tokens and vocabulary entries one tile has: as many as its buffers may take bytes."""

from __future__ import annotations

TILES = {"cpu": (512, 4096), "cuda": (1024, 4096)}
"""The largest tile by device type: tokens x vocabulary entries. In fp32 a CPU tile is 8 MiB, which a last-level cache
holds."""
BUFFERS = {"cpu": 42e6, "cuda": 56e6}
"""Bytes that all buffers of a tile may take, so a wide model gets smaller tiles. A CPU gets less: its heap has gaps."""
PACKED = 16e6
"""Bytes out of BUFFERS for a bf16 tile of the weight, which a CPU's matrix library copies into an order of its own."""


def tile_shape(device: str, tokens: int, width: int, vocabulary: int) -> tuple[int, int]:
    """Rows n and columns v of a tile for N `tokens`, D = `width` and V = `vocabulary`. device: its type.

    A token needs two fp32 rows of the tile and up to four of D.
    """
    kind = device if device in TILES else "cuda"
    (rows, columns), buffers = TILES[kind], BUFFERS[kind]
    if kind == "cpu":
        while 2 * columns * width > PACKED and columns > 512:
            columns //= 2
        buffers -= 2 * columns * width
    fitting = int(buffers / (8 * columns + 16 * width)) // 128 * 128
    return min(rows, max(fitting, 128), max(1, tokens)), min(columns, vocabulary)
