"""Ants and bees, put together from painted parts.

Lengths of a `Frame` are in units of the insect, angles are in radians, and y points down as
in the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transferkit.data._painting import (
    HAIR_BINS,
    PLAIN,
    Colour,
    FloatArray,
    Layer,
    Look,
    Paint,
    Point,
    pick_colour,
)

DARK_COLOURS = ((0.07, 0.06, 0.06), (0.15, 0.10, 0.07), (0.22, 0.10, 0.06), (0.10, 0.08, 0.10))
BRIGHT_COLOURS = ((0.86, 0.63, 0.16), (0.78, 0.48, 0.14), (0.60, 0.36, 0.16), (0.66, 0.26, 0.10))
"""Body colours. Ants and bees take theirs from the same two lists."""


@dataclass(frozen=True)
class Frame:
    """Where an insect lies in the picture: from its own units to pixels.

    The thorax is at (0, 0), the head towards positive x; a body is about 1 long.

    Args:
        layer: What is painted on.
        origin: Pixel of the thorax.
        scale: Pixels to one unit.
        angle: Direction in which it looks.
        mirror: 1, or -1 to exchange its left and right.
    """

    layer: Layer
    origin: Point
    scale: float
    angle: float
    mirror: int

    def point(self, at: Point) -> Point:
        """Return the pixel of a point of the insect."""
        x, y = at[0] * self.scale, at[1] * self.scale * self.mirror
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return (self.origin[0] + x * cos - y * sin, self.origin[1] + x * sin + y * cos)

    def blob(
        self, centre: Point, radii: Point, angle: float, paint: Colour | Paint, look: Look = PLAIN
    ) -> None:
        """Paint `Layer.blob`, given in units of the insect."""
        pixels = (radii[0] * self.scale, radii[1] * self.scale)
        turned = self.angle + angle * self.mirror
        self.layer.blob(self.point(centre), pixels, turned, paint, look)

    def limb(
        self, points: Sequence[Point], widths: Sequence[float], colour: Colour, look: Look = PLAIN
    ) -> None:
        """Paint `Layer.limb`, given in units of the insect."""
        pixels = [self.point(point) for point in points]
        self.layer.limb(pixels, [width * self.scale for width in widths], colour, look)


LEGS_FROM_ABOVE = ((55, 30, 15), (85, 110, 122), (120, 150, 160))
LEGS_FROM_SIDE = ((-25, 70, 35), (60, 105, 140), (205, 118, 155))
"""Headings in degrees of femur, tibia and tarsus, for the front, middle and hind leg."""

VEINS = (
    ((-1.0, 0.0), (-0.3, -0.5), (0.6, -0.66)),
    ((-1.0, 0.0), (-0.2, -0.1), (0.45, -0.12), (0.85, 0.2)),
    ((-1.0, 0.0), (-0.3, 0.35), (0.3, 0.6)),
    ((-0.3, -0.5), (-0.15, -0.1), (-0.3, 0.35)),
    ((0.3, -0.6), (0.4, -0.12), (0.1, 0.5)),
)
"""Veins of a wing in its own coordinates, root at (-1, 0) and tip at (1, 0)."""

VEIN_RADIUS = 0.006


def paint_insect(class_name: str, frame: Frame, rng: np.random.Generator) -> None:
    """Paint one insect of the class "ants" or "bees" with shape, pose and colours from `rng`."""
    dark = pick_colour(rng, DARK_COLOURS)
    bright = pick_colour(rng, BRIGHT_COLOURS)
    if class_name == "ants":
        _paint_ant(frame, dark, bright, rng)
    else:
        _paint_bee(frame, dark, bright, rng)


def _paint_ant(frame: Frame, dark: Colour, bright: Colour, rng: np.random.Generator) -> None:
    sideways = rng.random() < 0.35
    body = _mix(dark, bright, rng.uniform(0.0, 0.85) ** 2)
    rear = _mix(dark, bright, rng.uniform(0.0, 0.95) ** 2)
    leg = _mix(body, bright, rng.uniform(0.0, 0.35)) * np.float32(0.85)
    gloss = rng.uniform(0.1, 0.6)
    roots = ((0.1, 0.03), (0.02, 0.035), (-0.08, 0.03))
    lengths = [_about(rng, length) for length in (0.22, 0.23, 0.16)]
    _legs(frame, roots, lengths, 0.019, leg, sideways, rng, far=True)
    bend = rng.normal(0.0, 0.22) + (0.15 if sideways else 0.0)
    waist = (-0.2, 0.01)
    for distance, size in ((0.01, 0.036), (0.07, 0.03)):
        node = _chain(waist, [bend + math.pi], [distance])[-1]
        frame.blob(node, (size, size * _about(rng, 1.1)), bend, body, Look(gloss=gloss))
    half = _about(rng, 0.2)
    back = _chain(waist, [bend + math.pi], [0.07 + half])[-1]
    stripe = _mix(rear, dark, rng.uniform(0.0, 0.7))
    bands = _bands(stripe, rear, _about(rng, 4.0), 0.4, curve=-0.15)
    frame.blob(back, (half, _about(rng, 0.135)), bend, bands, Look(taper=0.12, gloss=gloss))
    chest = Look(taper=-0.25, gloss=gloss)
    frame.blob((0.0, 0.0), (0.19, _about(rng, 0.07)), 0.0, body, chest)
    frame.blob((0.1, 0.0), (0.09, _about(rng, 0.078)), 0.0, body, chest)
    if sideways:
        _legs(frame, roots, lengths, 0.019, leg, sideways, rng, far=False)
    _ant_head(frame, body, leg, gloss, sideways, rng)


def _ant_head(
    frame: Frame,
    body: Colour,
    leg: Colour,
    gloss: float,
    sideways: bool,
    rng: np.random.Generator,
) -> None:
    """Paint mandibles, head, eyes and the elbowed antennae."""
    turn = rng.normal(0.0, 0.2) + (0.4 if sideways else 0.0)
    long, wide = _about(rng, 0.125, 0.2), _about(rng, 0.115, 0.2)

    def at(x: float, y: float) -> Point:
        """Return the point of the insect at (x, y) of the head, 1 at its front and side."""
        x, y = x * long, y * wide
        cos, sin = math.cos(turn), math.sin(turn)
        return (0.19 + 0.9 * long * cos + x * cos - y * sin, 0.9 * long * sin + x * sin + y * cos)

    for side in (-1, 1):
        jaw = [at(0.75, 0.4 * side), at(1.2, 0.42 * side), at(1.45, 0.08 * side)]
        frame.limb(jaw, (0.028, 0.022, 0.008), leg)
    frame.blob(at(0.0, 0.0), (long, wide), turn, body, Look(taper=0.2, gloss=gloss))
    for side in (1,) if sideways else (-1, 1):
        eye = at(0.15, (0.1 if sideways else 0.72) * side)
        frame.blob(eye, (0.027, 0.021), turn, body * np.float32(0.3), Look(gloss=0.8))
    for side in (-1, 1):
        out = rng.normal(48.0, 12.0) * (-1 if sideways else side) + 8.0 * side * sideways
        elbow = out - rng.normal(62.0, 15.0) * (-1 if sideways else side)
        headings = [math.radians(a) + turn for a in (out, elbow, elbow * 0.8, elbow * 0.5)]
        lengths = (_about(rng, 0.2), 0.09, 0.09, 0.09)
        feeler = _chain(at(0.55, 0.3 * side), headings, lengths)
        frame.limb(feeler, (0.011, 0.012, 0.012, 0.013, 0.012), leg)


def _paint_bee(frame: Frame, dark: Colour, bright: Colour, rng: np.random.Generator) -> None:
    sideways = rng.random() < 0.35
    coat = _mix(dark, bright, rng.uniform(0.15, 1.0))
    pale = _mix(dark, bright, rng.uniform(0.3, 1.0))
    leg = _mix(dark, bright, rng.uniform(0.0, 0.4))
    lengths = [_about(rng, length) for length in (0.16, 0.17, 0.12)]
    roots = ((0.1, 0.09), (0.0, 0.1), (-0.1, 0.09))
    _legs(frame, roots, lengths, 0.026, leg, sideways, rng, far=True)
    spread = rng.uniform(105.0, 168.0)
    haze = _mix(bright, np.ones(3, dtype=np.float32), rng.uniform(0.4, 1.0))
    wing = (haze, dark, rng.uniform(0.1, 0.45))
    if sideways:
        _wing_pair(frame, -1, spread + 12.0, wing, True, rng)
    bend = rng.normal(0.0, 0.15) - (0.2 if sideways else 0.0)
    half = _about(rng, 0.31)
    back = _chain((-0.08, 0.0), [bend + math.pi], [half])[-1]
    stripes = _bands(dark, pale, _about(rng, 5.0, 0.25), rng.uniform(0.35, 0.65), curve=-0.25)
    glossy = Look(taper=rng.uniform(0.1, 0.3), gloss=0.2, fur=0.05, hairs=_hairs(rng))
    frame.blob(back, (half, _about(rng, 0.185)), bend, stripes, glossy)
    frame.blob((0.25, 0.02 if sideways else 0.0), (0.085, _about(rng, 0.135)), 0.0, leg)
    furry = Look(gloss=0.0, fur=rng.uniform(0.12, 0.3), hairs=_hairs(rng))
    frame.blob((0.0, 0.0), (0.185, _about(rng, 0.17)), 0.0, coat, furry)
    if sideways:
        _legs(frame, roots, lengths, 0.026, leg, sideways, rng, far=False)
    for side in (-1,) if sideways else (-1, 1):
        _wing_pair(frame, side, spread, wing, sideways, rng)
    _bee_head(frame, coat, dark, sideways, rng)


def _bee_head(
    frame: Frame, coat: Colour, dark: Colour, sideways: bool, rng: np.random.Generator
) -> None:
    """Paint the fur of the face, the large eyes and the short antennae."""
    downy = Look(gloss=0.0, fur=0.15, hairs=_hairs(rng))
    frame.blob((0.26, 0.03 * sideways), (0.07, 0.085), 0.0, coat, downy)
    for side in (-1, 1):
        out = math.radians(rng.normal(22.0, 8.0) * side - 20.0 * sideways)
        tip = math.radians(rng.normal(62.0, 12.0) * (1 if sideways else side))
        start = (0.31, 0.035 * side)
        frame.limb(_chain(start, (out, tip), (0.09, 0.14)), (0.011, 0.012, 0.012), dark)
    for side in (1,) if sideways else (-1, 1):
        eye = (0.27, 0.0) if sideways else (0.265, 0.105 * side)
        size = (0.055, 0.09) if sideways else (0.065, 0.046)
        frame.blob(eye, size, 0.35 * side, dark * np.float32(0.6), Look(gloss=0.7))


def _wing_pair(
    frame: Frame,
    side: int,
    spread: float,
    wing: tuple[Colour, Colour, float],
    sideways: bool,
    rng: np.random.Generator,
) -> None:
    """Paint hind wing and fore wing of one side; `wing` is membrane, veins and opacity."""
    membrane, vein, opacity = wing
    for root, length, width, extra in ((-0.07, 0.44, 0.16, 14.0), (0.01, 0.66, 0.22, 0.0)):
        heading = math.radians(min(spread + extra, 176.0) + rng.normal(0.0, 4.0)) * side
        start = (root, (0.1 if not sideways else 0.09) * side)
        half = _about(rng, length / 2)
        centre = _chain(start, [heading], [half])[-1]
        clear = Look(taper=-0.3, gloss=0.2, opacity=opacity, relief=0.6)
        frame.blob(centre, (half, width / 2), heading, membrane, clear)
        turned = frame.angle + heading * frame.mirror
        inner = Frame(frame.layer, frame.point(centre), frame.scale, turned, frame.mirror * side)
        faint = Look(gloss=0.0, opacity=0.6)
        for line in VEINS:
            points = [(u * half, v * width / 2 * (1.0 + 0.3 * u)) for u, v in line]
            inner.limb(points, [VEIN_RADIUS] * len(points), vein, faint)


def _legs(
    frame: Frame,
    roots: Sequence[Point],
    lengths: Sequence[float],
    radius: float,
    colour: Colour,
    sideways: bool,
    rng: np.random.Generator,
    *,
    far: bool,
) -> None:
    """Paint all six legs seen from above, or the three of the far or near side."""
    tone = colour * np.float32(0.6 if sideways and far else 1.0)
    widths = (radius, radius, 0.7 * radius, 0.4 * radius)
    for side in (1,) if sideways else (-1, 1):
        headings = LEGS_FROM_SIDE if sideways else LEGS_FROM_ABOVE
        for root, leg in zip(roots, headings, strict=True):
            turns = np.radians(np.asarray(leg) + rng.normal(0.0, (11.0, 13.0, 18.0)))
            points = _chain((root[0], root[1] * side), (turns * side).tolist(), lengths)
            frame.limb(points, widths, tone)


def _chain(start: Point, headings: Sequence[float], lengths: Sequence[float]) -> list[Point]:
    """Return the joints of a limb from the heading and length of each piece."""
    points = [start]
    for heading, length in zip(headings, lengths, strict=True):
        x, y = points[-1]
        points.append((x + length * math.cos(heading), y + length * math.sin(heading)))
    return points


def _bands(first: Colour, second: Colour, count: float, share: float, *, curve: float) -> Paint:
    """Return the paint of `count` curved cross bands, `share` of them in the first colour."""

    def paint(u: FloatArray, v: FloatArray) -> FloatArray:
        wave = 0.5 + 0.5 * np.sin(math.pi * count * (u + curve * v * v))
        blend = np.clip((wave - share) * 4.0 + 0.5, 0.0, 1.0)[..., None]
        painted: FloatArray = first + (second - first) * blend
        return painted

    return paint


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    """Return the colour `share` of the way from the first to the second."""
    return first + (second - first) * np.float32(share)


def _about(rng: np.random.Generator, value: float, spread: float = 0.12) -> float:
    """Return the value times a factor in [1 - spread, 1 + spread]."""
    return value * float(rng.uniform(1.0 - spread, 1.0 + spread))


def _hairs(rng: np.random.Generator) -> FloatArray:
    """Return fresh noise for fur."""
    return rng.random(HAIR_BINS, dtype=np.float32)
