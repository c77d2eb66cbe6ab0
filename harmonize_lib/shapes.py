"""shapes-on-scenes: a procedural BAM, ten objects pasted on ten scenes, with exact masks and counterfactuals.

The object's class sits in its shape and in the *type* of its texture; its two colors, its angle, size, place and
the texture's phase and period are free. Scenes are low in contrast, and their class sits in the type of their
pattern. Images come in blocks of 100, one of every (object, scene) pair in shuffled order, and a block depends on
the seed, the split and its own number alone: the first n images are the same whatever n is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Field = NDArray[Any]

SIZE = 64
SPLITS = ("train", "val", "test")
OBJECT_SIDE = (0.36, 0.50)  # of the image's side
OBJECT_CONTRAST = 0.45  # the second color lies at least this part of the way to the farther end, per channel
SCENE_CONTRAST = 0.07
PIXEL_NOISE = 0.02
BLOCK = 100


def _polar(u: Field, v: Field) -> tuple[Field, Field]:
    return np.hypot(u, v), np.arctan2(v, u)


def _star(u: Field, v: Field) -> NDArray[np.bool_]:
    radius, angle = _polar(u, v)
    return radius < 0.68 + 0.32 * np.cos(5 * (angle + np.pi / 2))


def _crescent(u: Field, v: Field) -> NDArray[np.bool_]:
    return (np.hypot(u, v) < 1) & (np.hypot(u - 0.6, v) > 0.68)


SHAPES: dict[str, Callable[[Field, Field], NDArray[np.bool_]]] = {
    "disc": lambda u, v: np.hypot(u, v) < 0.85,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.72,
    "triangle": lambda u, v: (v < 0.75) & (abs(u) < (v + 0.95) / 1.7),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 0.95),
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.7) < 0.27,
    "star": _star,
    "crescent": _crescent,
    "bowtie": lambda u, v: (abs(u) < 0.9) & (abs(v) < 0.15 + 0.75 * abs(u)),
    "bar": lambda u, v: (abs(u) < 0.42) & (abs(v) < 1),
    "corner": lambda u, v: (np.maximum(abs(u), abs(v)) < 0.85) & ((u < -0.15) | (v > 0.15)),
}


def _square_wave(x: Field) -> Field:
    """Smooth 0-1 wave of period 1."""
    return 0.5 + 0.5 * np.tanh(3 * np.sin(2 * np.pi * x))


# Textures: x, y in periods (rotated, free phase), r and a the polar coordinates about the object's center,
# speckle a random 0-1 field.
TEXTURES: dict[str, Callable[[Field, Field, Field, Field, Field], Field]] = {
    "rings": lambda x, y, r, a, speckle: _square_wave(r),
    "stripes": lambda x, y, r, a, speckle: _square_wave(x),
    "dots": lambda x, y, r, a, speckle: (np.sin(2 * np.pi * x) * np.sin(2 * np.pi * y) > 0.35) * 1.0,
    "checks": lambda x, y, r, a, speckle: (
        _square_wave(x / 2) * _square_wave(y / 2) + (1 - _square_wave(x / 2)) * (1 - _square_wave(y / 2))
    ),
    "spokes": lambda x, y, r, a, speckle: _square_wave(a * 8 / (2 * np.pi)),
    "zigzag": lambda x, y, r, a, speckle: _square_wave(x + 0.8 * abs((y / 2) % 1 - 0.5)),
    "mesh": lambda x, y, r, a, speckle: np.minimum(abs(x % 1 - 0.5), abs(y % 1 - 0.5)) < 0.14,
    "speckle": lambda x, y, r, a, speckle: (speckle > 0.5) * 1.0,
    "bricks": lambda x, y, r, a, speckle: (
        np.minimum(abs(y % 1 - 0.5), 2 * abs((x / 2 + 0.5 * np.floor(y)) % 1 - 0.5)) < 0.16
    ),
    "shade": lambda x, y, r, a, speckle: 0.5 + 0.5 * np.tanh(0.35 * (x - x.mean(axis=(1, 2), keepdims=True))),
}

OBJECTS = tuple(f"{texture} {shape}" for shape, texture in zip(SHAPES, TEXTURES, strict=True))


def _hills(x: Field, y: Field, p: Field, blobs: Field) -> Field:
    return np.sign(y - 0.1 - 0.25 * np.sin(2 * np.pi * (1.5 * x + p)) - 0.3 * (p - 0.5))


def _bokeh(x: Field, y: Field, p: Field, blobs: Field) -> Field:
    shift = np.floor(2.5 * (y + p)) * 0.37
    return np.where(np.hypot((2.5 * (x + shift + p)) % 1 - 0.5, (2.5 * (y + p)) % 1 - 0.5) < 0.33, 1.0, -0.6)


# Scenes: x, y in [-1, 1], p a free number per image, blobs a smooth random field; a value in about [-1, 1].
SCENES: dict[str, Callable[[Field, Field, Field, Field], Field]] = {
    "horizon": lambda x, y, p, blobs: np.sign(y - 0.6 * (p - 0.5)),
    "hills": _hills,
    "ramp": lambda x, y, p, blobs: 1.2 * (x * np.cos(2 * np.pi * p) + y * np.sin(2 * np.pi * p)),
    "clouds": lambda x, y, p, blobs: 2.2 * blobs,
    "tiles": lambda x, y, p, blobs: np.sign(np.sin(2 * np.pi * (1.6 * x + p)) * np.sin(2 * np.pi * (1.6 * y + p))),
    "columns": lambda x, y, p, blobs: np.sin(2 * np.pi * (2.2 * x + p)),
    "rays": lambda x, y, p, blobs: np.sign(np.sin(14 * np.arctan2(y + 1.2, x - 2 * (p - 0.5)))),
    "waves": lambda x, y, p, blobs: np.sin(2 * np.pi * (2.2 * y + 0.25 * np.sin(2 * np.pi * (x + p)) + p)),
    "bokeh": _bokeh,
    "vignette": lambda x, y, p, blobs: 1 - 1.6 * np.hypot(x - 0.6 * (p - 0.5), y),
}


class Block(NamedTuple):
    """Images of a block, (100, 64, 64, 3), with everything that is known of them."""

    with_object: NDArray[np.uint8]
    without_object: NDArray[np.uint8]
    moved_object: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    moved_mask: NDArray[np.bool_]
    objects: NDArray[np.int64]
    scenes: NDArray[np.int64]


def _by_class(labels: NDArray[np.int64], functions: dict, *fields: Field) -> Field:
    """Apply to each image the function of its class."""
    out = np.empty((len(labels), SIZE, SIZE), np.float32)
    for label, function in enumerate(functions.values()):
        chosen = labels == label
        if chosen.any():
            out[chosen] = function(*(field[chosen] for field in fields))
    return out


def _upsample(grid: Field) -> Field:
    """Cubic-smooth interpolation of coarse random grids (n, g, g) to (n, SIZE, SIZE)."""
    g = grid.shape[1]
    position = np.linspace(0, g - 1, SIZE)
    low = np.minimum(position.astype(int), g - 2)
    t = position - low
    weight = (t * t * (3 - 2 * t)).astype(np.float32)
    matrix = np.zeros((SIZE, g), np.float32)
    matrix[np.arange(SIZE), low], matrix[np.arange(SIZE), low + 1] = 1 - weight, weight
    return np.einsum("ag,ngh,bh->nab", matrix, grid, matrix)


def draw_block(seed: int, split: str, block: int, object_label: int | None = None) -> Block:
    """Draw one block of 100 images.

    Parameters
    ----------
    seed : int
        Seed of the data set.
    split : str
        One of ``SPLITS``; the splits share no image.
    block : int
        Number of the block, from 0.
    object_label : int | None
        Paste this object everywhere; None pastes every object on every scene once.

    Returns
    -------
    Block
        100 images (100, 64, 64, 3) uint8 with, without and with the moved object, masks (100, 64, 64) bool,
        labels (100).
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), block])
    pair = rng.permutation(BLOCK)
    objects, scenes = pair % 10, pair // 10
    if object_label is not None:
        objects = np.full(BLOCK, object_label)
    free = rng.random((BLOCK, 24), dtype=np.float32)[:, :, None, None]
    row, column = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    row, column = row[None] + 0.5, column[None] + 0.5

    x, y = np.broadcast_arrays(column / (SIZE / 2) - 1, row / (SIZE / 2) - 1)
    x, y = (np.broadcast_to(field, (BLOCK, SIZE, SIZE)) for field in (x, y))
    blobs = _upsample(rng.random((BLOCK, 7, 7), dtype=np.float32) - 0.5)
    pattern = _by_class(scenes, SCENES, x, y, np.broadcast_to(free[:, 0], x.shape), blobs)
    noise = rng.standard_normal((BLOCK, SIZE, SIZE, 3), dtype=np.float32)
    speckle = np.repeat(np.repeat(rng.random((BLOCK, SIZE // 2, SIZE // 2), dtype=np.float32), 2, 1), 2, 2)

    base = 0.35 + 0.3 * free[:, 1:4, 0, 0]
    tint = 0.7 + 0.3 * free[:, 4:7, 0, 0]
    scene = base[:, None, None] + SCENE_CONTRAST * pattern[..., None] * tint[:, None, None]

    side = SIZE * (OBJECT_SIDE[0] + (OBJECT_SIDE[1] - OBJECT_SIDE[0]) * free[:, 7])
    margin = side / 2
    color = free[:, 8:11, 0, 0]
    contrast = OBJECT_CONTRAST + (1 - OBJECT_CONTRAST) * free[:, 14:17, 0, 0]
    other = np.where(color > 0.5, color - contrast * color, color + contrast * (1 - color))

    def paste(place_y: Field, place_x: Field) -> tuple[Field, NDArray[np.bool_]]:
        center_y, center_x = margin + (SIZE - side) * place_y, margin + (SIZE - side) * place_x
        tilt = 0.5 * (free[:, 17] - 0.5)
        dy, dx = (row - center_y) / margin, (column - center_x) / margin
        u, v = np.cos(tilt) * dx + np.sin(tilt) * dy, np.cos(tilt) * dy - np.sin(tilt) * dx
        mask = _by_class(objects, SHAPES, u, v) > 0
        period = 5.0 + 2.0 * free[:, 18]
        turn = np.pi * free[:, 19]
        tx = (np.cos(turn) * dx + np.sin(turn) * dy) * margin / period + free[:, 20]
        ty = (np.cos(turn) * dy - np.sin(turn) * dx) * margin / period + free[:, 21]
        r, a = np.hypot(dx, dy) * margin / period + free[:, 20], np.arctan2(dy, dx) + 6 * free[:, 21]
        texture = _by_class(objects, TEXTURES, tx, ty, r, a, speckle)[..., None]
        painted = color[:, None, None] * (1 - texture) + other[:, None, None] * texture
        return np.where(mask[..., None], painted, scene), mask

    def to_uint8(image: Field) -> NDArray[np.uint8]:
        return np.round(np.clip(image + PIXEL_NOISE * noise, 0, 1) * 255).astype(np.uint8)

    composite, mask = paste(free[:, 11], free[:, 12])
    moved, moved_mask = paste((free[:, 11] + 0.3 + 0.4 * free[:, 22]) % 1, (free[:, 12] + 0.3 + 0.4 * free[:, 23]) % 1)
    return Block(to_uint8(composite), to_uint8(scene), to_uint8(moved), mask, moved_mask, objects, scenes)
