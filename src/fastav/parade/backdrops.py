"""Textures behind the things. All repeat sideways, some also downwards."""

from functools import cache

import numpy as np
from jaxtyping import Float

WIDTH, HEIGHT = 160, 128  # pixels


def slides_down(name: str) -> bool:
    """Whether the camera can pan up and down: there is no horizon, and the texture repeats."""
    return name in ("grass", "bricks")


def backdrop(name: str, rng: np.random.Generator) -> Float[np.ndarray, "height width 3"]:
    """A texture of this kind, in [0, 1]."""
    x, y = np.arange(WIDTH, dtype=np.float32)[None], np.arange(HEIGHT, dtype=np.float32)[:, None]
    tint = rng.uniform(-0.08, 0.08, 3).astype(np.float32)
    if name == "grass":
        blades = _noise(rng, 16, 80) + 0.5 * _noise(rng, 64, 160)
        return _shade(np.array((0.25, 0.5, 0.12)) + tint, 0.16 * blades + 0.1 * _noise(rng, 4, 5))
    if name == "bricks":
        row = (y // 16).astype(int)
        column = ((x + 16 * (row % 2)) // 32 % (WIDTH // 32)).astype(int)
        tones = 0.09 * rng.standard_normal((HEIGHT // 16, WIDTH // 32)).astype(np.float32)
        mortar = (y % 16 < 2) | ((x + 16 * (row % 2)) % 32 < 2)
        walls = _shade(np.array((0.55, 0.3, 0.22)) + tint, tones[row, column] + 0.08 * _noise(rng, 32, 40))
        return np.where(mortar[..., None], np.float32(0.68), walls)
    if name == "water":
        bend = 6 * _noise(rng, 4, 5)
        waves = np.sin((y + bend + 3 * np.sin(2 * np.pi * 3 * x / WIDTH)) * (2 * np.pi / 12.8))
        return _shade(np.array((0.12, 0.38, 0.52)) + tint, 0.12 * waves + 0.06 * _noise(rng, 32, 20))
    sky = np.array((0.5, 0.68, 0.85), np.float32) + tint + 0.15 * (y / HEIGHT)[..., None]
    image = sky + 0.05 * _noise(rng, 8, 10)[..., None]
    return _hills(image, rng, x, y) if name == "hills" else _city(image, rng, y)


def _hills(image: np.ndarray, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Three ridges, nearer ones lower and greener."""
    for number, tone in enumerate(((0.5, 0.52, 0.58), (0.42, 0.46, 0.3), (0.3, 0.38, 0.16))):
        turns = rng.integers(1, 4)
        ridge = 44 + 22 * number + rng.uniform(6, 14) * np.sin(2 * np.pi * (turns * x / WIDTH + rng.random()))
        ridge = ridge + 4 * np.sin(2 * np.pi * (7 * x / WIDTH + rng.random()))
        ground = _shade(np.array(tone, np.float32), 0.1 * _noise(rng, 32, 40))
        image = np.where((y > ridge)[..., None], ground, image)
    return image.astype(np.float32)


def _city(image: np.ndarray, rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """Ten houses with windows, a street before them."""
    roofs = rng.integers(24, 72, WIDTH // 16).repeat(16)
    tones = rng.uniform(0.25, 0.6, (WIDTH // 16, 1)) + rng.uniform(-0.06, 0.06, (WIDTH // 16, 3))
    walls = np.broadcast_to(tones.repeat(16, 0)[None], image.shape)
    lit = rng.random((HEIGHT // 8, WIDTH // 8)) < 0.5
    panes = np.where(lit[..., None], (0.85, 0.78, 0.5), (0.15, 0.18, 0.25)).repeat(8, 0).repeat(8, 1)
    window = ((np.arange(WIDTH)[None] % 8 > 2) & (np.arange(WIDTH)[None] % 8 < 7)) & ((y % 8 > 2) & (y % 8 < 7))
    walls = np.where(window[..., None], panes, walls)
    image = np.where((y > roofs)[..., None], walls, image)
    street = _shade(np.array((0.32, 0.32, 0.34), np.float32), 0.07 * _noise(rng, 64, 80))
    return np.where((y > 100)[..., None], street, image).astype(np.float32)


def _shade(tone: np.ndarray, relief: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "height width 3"]:
    return np.clip(tone + relief[..., None], 0, 1).astype(np.float32)


def _noise(rng: np.random.Generator, rows: int, columns: int) -> Float[np.ndarray, "height width"]:
    """Smooth noise of standard deviation one half or so, with this many cells; it repeats in both directions."""
    cells = rng.standard_normal((rows, columns), np.float32)
    return _stretch(HEIGHT, rows) @ cells @ _stretch(WIDTH, columns).T


@cache
def _stretch(size: int, cells: int) -> Float[np.ndarray, "size cells"]:
    """Weights of cells in each pixel, between which they are interpolated linearly."""
    place = np.arange(size) * cells / size
    left, part = place.astype(int), place % 1
    weights = np.zeros((size, cells), np.float32)
    weights[np.arange(size), left] = 1 - part
    weights[np.arange(size), (left + 1) % cells] += part
    return weights
