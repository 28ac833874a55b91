"""Surroundings: soil, leaves, flowers, and what lies about on them."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter

from transferkit.data._painting import (
    Colour,
    FloatArray,
    Layer,
    Light,
    Look,
    Paint,
    Point,
    blur,
    pick_colour,
)

SURFACES = {
    "soil": ((0.20, 0.14, 0.09), (0.52, 0.39, 0.26)),
    "sand": ((0.60, 0.50, 0.36), (0.85, 0.77, 0.62)),
    "bark": ((0.22, 0.17, 0.13), (0.58, 0.48, 0.38)),
    "stone": ((0.36, 0.36, 0.37), (0.70, 0.69, 0.66)),
    "leaf": ((0.14, 0.30, 0.08), (0.42, 0.60, 0.22)),
    "flower": ((0.08, 0.18, 0.06), (0.36, 0.46, 0.20)),
}
"""What the insect sits on, with the darkest and the brightest colour of the ground."""

CLUTTER_COLOURS = (
    (0.08, 0.07, 0.06), (0.16, 0.10, 0.07), (0.45, 0.25, 0.12), (0.62, 0.26, 0.10),
    (0.88, 0.66, 0.14), (0.80, 0.50, 0.14), (0.92, 0.88, 0.80), (0.45, 0.43, 0.42),
    (0.30, 0.48, 0.16), (0.55, 0.62, 0.26),
)  # fmt: skip
"""Colours of what lies about; those of the insects are among them."""

PETAL_COLOURS = (
    (0.96, 0.82, 0.16), (0.95, 0.62, 0.12), (0.96, 0.95, 0.93), (0.90, 0.55, 0.70),
    (0.60, 0.40, 0.75), (0.80, 0.18, 0.20),
)  # fmt: skip

BARK_GRAIN = (0.3, 2.0)
"""Width and height of the noise in bark, or the other way round; 1 elsewhere."""

COARSE_NOISE = ((140.0, 0.5), (43.0, 0.3), (15.0, 0.2))
"""Size in pixels and weight of the clouds in the ground; the weights add up to 1."""

FINE_NOISE = ((2.0, 0.9), (0.8, 0.25))
"""Blur in pixels and weight of the grains in the ground."""

TWIG_PIECES = 4

FOREGROUND_SHARE = 0.4
"""Share of the pictures with something between camera and insect."""

GROUND_BLUR = 5.0
"""Strongest blur of the surroundings in pixels."""

SHADOW_SOFTNESS = 0.35
"""Blur of a shadow relative to the height of what casts it."""


def paint_ground(
    width: int, height: int, light: Light, focus: Point, rng: np.random.Generator
) -> FloatArray:
    """Paint the surroundings, float32 `(height, width, 3)` in about [0, 1]."""
    surface = str(rng.choice(list(SURFACES)))
    upright = rng.random() < 0.5
    grain = (BARK_GRAIN if upright else BARK_GRAIN[::-1]) if surface == "bark" else (1.0, 1.0)
    rough = _noise(width, height, grain, rng)[..., None]
    low, high = (np.asarray(colour, dtype=np.float32) for colour in SURFACES[surface])
    size = min(width, height)
    scene: FloatArray = (low + (high - low) * rough) * np.float32(rng.uniform(0.8, 1.2))
    layer = Layer(width, height, light)
    if surface == "leaf":
        _paint_leaf_veins(layer, high, rng)
    if surface == "flower":
        _paint_flower(layer, focus, rng)
    _scatter(layer, rng)
    scene = lay(scene, layer, size * rng.uniform(0.005, 0.02), rng.uniform(0.2, 0.6))
    return blur(scene, rng.uniform(0.0, 1.0) ** 2 * GROUND_BLUR)


def _noise(
    width: int, height: int, grain: tuple[float, float], rng: np.random.Generator
) -> FloatArray:
    """Return cloudy noise in [0, 1], float32 `(height, width)`, coarse and fine together."""
    total: FloatArray = np.zeros((height, width), dtype=np.float32)
    for cell, weight in COARSE_NOISE:
        rows, columns = math.ceil(height / (cell * grain[1])), math.ceil(width / (cell * grain[0]))
        small = Image.fromarray(rng.random((rows + 1, columns + 1), dtype=np.float32))
        # A random start keeps the grids of the sizes from showing through.
        left, top = rng.random(2)
        box = (left, top, left + columns, top + rows)
        total += weight * np.asarray(small.resize((width, height), Image.Resampling.BICUBIC, box))
    for radius, weight in FINE_NOISE:
        white = rng.integers(0, 256, (height, width), dtype=np.uint8)
        smooth = Image.fromarray(white).filter(
            ImageFilter.GaussianBlur((radius * grain[0], radius * grain[1]))
        )
        total += weight * (np.asarray(smooth, dtype=np.float32) / np.float32(127.5) - 1.0)
    return np.clip(total, 0.0, 1.0)


def _paint_leaf_veins(layer: Layer, colour: Colour, rng: np.random.Generator) -> None:
    height, width = layer.alpha.shape
    size = math.hypot(width, height)
    angle = rng.uniform(0.0, math.pi)
    x, y = width * rng.uniform(0.3, 0.7), height * rng.uniform(0.3, 0.7)
    cos, sin = math.cos(angle), math.sin(angle)
    pale, look = colour * np.float32(1.15), Look(gloss=0.05, opacity=0.6)
    layer.limb([(x - size * cos, y - size * sin), (x + size * cos, y + size * sin)],
               (0.008 * size, 0.008 * size), pale, look)  # fmt: skip
    for step in range(-8, 9):
        root = (x + step * size * 0.09 * cos, y + step * size * 0.09 * sin)
        for side in (-1, 1):
            turn = angle + side * 0.9
            tip = (root[0] + size * math.cos(turn), root[1] + size * math.sin(turn))
            layer.limb([root, tip], (0.004 * size, 0.001 * size), pale, look)


def _paint_flower(layer: Layer, focus: Point, rng: np.random.Generator) -> None:
    """Paint a large blossom somewhere under the insect."""
    size = min(layer.alpha.shape)
    x, y = (place + rng.normal(0.0, 0.12) * size for place in focus)
    disc = size * rng.uniform(0.08, 0.25)
    length, count = size * rng.uniform(0.2, 0.4), int(rng.integers(6, 17))
    petal, start = pick_colour(rng, PETAL_COLOURS), rng.uniform(0.0, 2 * math.pi)
    for index in rng.permutation(count):
        angle = start + 2 * math.pi * index / count + rng.normal(0.0, 0.06)
        reach = disc * 0.8 + length
        wide = (disc + length) * math.pi / count * rng.uniform(0.8, 1.2)
        centre = (x + reach * math.cos(angle), y + reach * math.sin(angle))
        shade = petal * np.float32(rng.uniform(0.85, 1.1))
        look = Look(taper=rng.uniform(-0.3, 0.0), gloss=0.0, relief=0.5)
        layer.blob(centre, (length, wide), angle, _streaks(shade), look)
    heart = pick_colour(rng, CLUTTER_COLOURS)
    layer.blob((x, y), (disc, disc), 0.0, heart, Look(gloss=0.0))
    for _ in range(60):
        away, turn = disc * math.sqrt(rng.random()), rng.uniform(0.0, 2 * math.pi)
        dot = (x + away * math.cos(turn), y + away * math.sin(turn))
        radius = disc * rng.uniform(0.05, 0.1)
        layer.blob(dot, (radius, radius), 0.0, heart * np.float32(rng.uniform(0.7, 1.4)))


def _scatter(layer: Layer, rng: np.random.Generator) -> None:
    """Scatter pebbles, seeds, petals, twigs and blades of grass."""
    height, width = layer.alpha.shape
    size = min(width, height)
    pebbles, petals, twigs = rng.integers((0, 0, 0), (22, 7, 9))
    for kind in rng.permutation([0] * pebbles + [1] * petals + [2] * twigs):
        at = (width * rng.random(), height * rng.random())
        angle = rng.uniform(0.0, 2 * math.pi)
        taper = rng.uniform(-0.4, 0.4)
        if kind == 0:
            long = size * rng.uniform(0.01, 0.045)
            look = Look(taper=taper, gloss=rng.uniform(0.0, 0.3))
            colour = pick_colour(rng, CLUTTER_COLOURS)
            layer.blob(at, (long, long * rng.uniform(0.45, 1.0)), angle, colour, look)
        elif kind == 1:
            long = size * rng.uniform(0.05, 0.14)
            look = Look(taper=taper, gloss=0.0, relief=0.4)
            petal = _streaks(pick_colour(rng, PETAL_COLOURS))
            layer.blob(at, (long, long * rng.uniform(0.3, 0.6)), angle, petal, look)
        else:
            _paint_twig(layer, at, angle, size * rng.uniform(0.003, 0.014), rng)


def _paint_twig(
    layer: Layer, at: Point, angle: float, radius: float, rng: np.random.Generator
) -> None:
    """Paint a bent twig or blade of grass from `at` on, thinner towards its end."""
    size = min(layer.alpha.shape)
    points = [at]
    for _ in range(TWIG_PIECES):
        angle += rng.normal(0.0, 0.2)
        step = size * rng.uniform(0.05, 0.15)
        at = (at[0] + step * math.cos(angle), at[1] + step * math.sin(angle))
        points.append(at)
    widths = np.linspace(radius, 0.3 * radius, len(points))
    layer.limb(points, widths.tolist(), pick_colour(rng, CLUTTER_COLOURS), Look(gloss=0.05))


def _streaks(colour: Colour) -> Paint:
    """Return the paint of a petal: streaks along it, darker towards its root."""

    def paint(u: FloatArray, v: FloatArray) -> FloatArray:
        tone = (0.88 + 0.1 * u + 0.06 * np.cos(22.0 * v))[..., None]
        painted: FloatArray = colour * tone
        return painted

    return paint


def paint_foreground(insect: Layer, rng: np.random.Generator) -> Layer:
    """Paint blades and petals close to the camera, out of focus, some across the insect."""
    height, width = insect.alpha.shape
    size = min(width, height)
    layer = Layer(width, height, insect.light)
    for _ in range(rng.integers(1, 4)):
        at = (width * rng.random(), height * rng.random())
        angle = rng.uniform(0.0, 2 * math.pi)
        if rng.random() < 0.5:
            _paint_twig(layer, at, angle, size * rng.uniform(0.015, 0.04), rng)
        else:
            long = size * rng.uniform(0.1, 0.25)
            look = Look(gloss=0.0, relief=0.4)
            layer.blob(at, (long, 0.5 * long), angle, pick_colour(rng, PETAL_COLOURS), look)
    layer.defocus(size * rng.uniform(0.005, 0.025))
    return layer


def lay(scene: FloatArray, layer: Layer, height: float, strength: float) -> FloatArray:
    """Lay a sheet over the scene, with the shadow of parts that stand `height` pixels high."""
    lx, ly, lz = layer.light.direction
    reach = height / max(lz, 0.3)
    shadow = _shifted(layer.alpha, round(-lx * reach), round(-ly * reach))
    scene = scene * (1.0 - strength * blur(shadow[..., None], SHADOW_SOFTNESS * height))
    return scene * (1.0 - layer.alpha[..., None]) + layer.colour


def _shifted(plane: FloatArray, right: int, down: int) -> FloatArray:
    """Move a channel by whole pixels; what comes in from outside is 0."""
    height, width = plane.shape
    moved = np.zeros_like(plane)
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = plane[
        max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return moved
