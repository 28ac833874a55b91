"""Painting shaded, anti-aliased parts on a layer.

Every part is computed from its distance to the outline, so that edges are smooth without
drawing at a higher resolution, and from the normal of the round body it stands for, so that
one light shades the whole picture. Colours are RGB in [0, 1], arrays are float32, angles are
in radians, and y points down as in the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

FloatArray = npt.NDArray[np.floating[Any]]
Point = tuple[float, float]
Colour = FloatArray
Paint = Callable[[FloatArray, FloatArray], FloatArray]

HAIR_BINS = (180, 12)
"""Number of hairs around a furry part, and of shades along one hair."""


@dataclass(frozen=True)
class Light:
    """A distant light: unit vector towards it (x, y, out of the picture) and the ambient share."""

    direction: tuple[float, float, float]
    ambient: float


@dataclass(frozen=True)
class Look:
    """What a solid looks like apart from its colour.

    Args:
        taper: How much narrower the front is than the back, in (-0.6, 0.6).
        gloss: Strength of the highlight.
        opacity: 1 for solid, less for glassy.
        relief: 1 for a round body, less for a flat one such as a petal.
        fur: Length of the hairs relative to the radius.
        hairs: Noise in [0, 1] of shape `HAIR_BINS`; needed if there is fur.
    """

    taper: float = 0.0
    gloss: float = 0.2
    opacity: float = 1.0
    relief: float = 1.0
    fur: float = 0.0
    hairs: FloatArray | None = None


PLAIN = Look()


class Layer:
    """A transparent sheet that parts are painted on, each over what is there already.

    Args:
        width: Width in pixels.
        height: Height in pixels.
        light: The light that shades the parts.

    Attributes:
        colour: RGB times alpha, float32 `(height, width, 3)`, in about [0, 1].
        alpha: Opacity, float32 `(height, width)`, in [0, 1].
    """

    def __init__(self, width: int, height: int, light: Light) -> None:
        self.light = light
        self.colour: FloatArray = np.zeros((height, width, 3), dtype=np.float32)
        self.alpha: FloatArray = np.zeros((height, width), dtype=np.float32)

    def blob(
        self,
        centre: Point,
        radii: Point,
        angle: float,
        paint: Colour | Paint,
        look: Look = PLAIN,
    ) -> None:
        """Paint an egg-shaped solid.

        Args:
            centre: Its centre in pixels.
            radii: Half its length and half its width in pixels.
            angle: Direction of its length, towards its front.
            paint: Its colour, or the colours `(h, w, 3)` at (u, v), its own coordinates,
                with u = 1 at the front and v = -1 and 1 at the sides.
            look: Its shape and surface.
        """
        a, b = max(radii[0], 0.5), max(radii[1], 0.5)
        reach = (1.0 + look.fur) * max(a, b * (1.0 + abs(look.taper))) + 1.0
        window = self._window(centre[0] - reach, centre[1] - reach, 2 * reach, 2 * reach)
        if window is None:
            return
        region, x, y = window
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = x - np.float32(centre[0]), y - np.float32(centre[1])
        u = (x * cos + y * sin) / a
        v = (y * cos - x * sin) / b
        v = v / np.maximum(1.0 - look.taper * u, 0.3)
        radius = np.sqrt(u * u + v * v)
        outline: float | FloatArray = 1.0
        tone: float | FloatArray = 1.0
        if look.hairs is not None:
            outline, tone = _fur(u, v, radius, look.fur, look.hairs)
        alpha = np.clip(0.5 + (outline - radius) * min(a, b), 0.0, 1.0) * look.opacity
        base = paint(u, v) if callable(paint) else paint
        scale = look.relief / np.maximum(radius, 1.0)
        normal = ((u * cos - v * sin) * scale, (u * sin + v * cos) * scale)
        self._shade(region, alpha, base, normal, look.gloss, tone)

    def limb(
        self, points: Sequence[Point], widths: Sequence[float], colour: Colour, look: Look = PLAIN
    ) -> None:
        """Paint a jointed rod through `points`, with these radii in pixels at each point."""
        for joint in range(len(points) - 1):
            thick, thin = max(widths[joint], 0.4), max(widths[joint + 1], 0.4)
            self._rod(points[joint], points[joint + 1], thick, thin, colour, look)

    def defocus(self, radius: float) -> None:
        """Blur what is on the sheet by a Gaussian of `radius` pixels."""
        self.colour = blur(self.colour, radius)
        self.alpha = blur(self.alpha[..., None], radius)[..., 0]

    def _rod(
        self, start: Point, end: Point, first: float, last: float, colour: Colour, look: Look
    ) -> None:
        pad = max(first, last) + 1.0
        left, top = min(start[0], end[0]) - pad, min(start[1], end[1]) - pad
        dx, dy = end[0] - start[0], end[1] - start[1]
        window = self._window(left, top, abs(dx) + 2 * pad, abs(dy) + 2 * pad)
        if window is None:
            return
        region, x, y = window
        length = max(math.hypot(dx, dy), 1e-3)
        dx, dy = dx / length, dy / length
        x, y = x - np.float32(start[0]), y - np.float32(start[1])
        along = np.clip(x * dx + y * dy, 0.0, length)
        off_x, off_y = x - along * dx, y - along * dy
        width = first + (last - first) / length * along
        distance = np.sqrt(off_x * off_x + off_y * off_y)
        alpha = np.clip(0.5 + width - distance, 0.0, 1.0) * look.opacity
        scale = 1.0 / np.maximum(distance, width)
        self._shade(region, alpha, colour, (off_x * scale, off_y * scale), look.gloss, 1.0)

    def _window(
        self, left: float, top: float, width: float, height: float
    ) -> tuple[tuple[slice, slice], FloatArray, FloatArray] | None:
        """Return the part of the sheet inside a box, with its x `(1, w)` and y `(h, 1)`."""
        x0, x1 = max(int(left), 0), min(int(left + width) + 2, self.alpha.shape[1])
        y0, y1 = max(int(top), 0), min(int(top + height) + 2, self.alpha.shape[0])
        if x0 >= x1 or y0 >= y1:
            return None
        x = np.arange(x0, x1, dtype=np.float32)[None, :]
        y = np.arange(y0, y1, dtype=np.float32)[:, None]
        return (slice(y0, y1), slice(x0, x1)), x, y

    def _shade(
        self,
        region: tuple[slice, slice],
        alpha: FloatArray,
        base: FloatArray,
        normal: tuple[FloatArray, FloatArray],
        gloss: float,
        tone: float | FloatArray,
    ) -> None:
        """Light a surface with the given normal (x and y) and lay it over the sheet."""
        nx, ny = normal
        nz = np.sqrt(np.maximum(1.0 - nx * nx - ny * ny, 0.0))
        lx, ly, lz = self.light.direction
        diffuse = np.maximum(nx * lx + ny * ly + nz * lz, 0.0)
        shade = (self.light.ambient + (1.0 - self.light.ambient) * diffuse) * tone
        # Halfway between the light and the viewer, who looks straight down.
        norm = math.sqrt(2.0 + 2.0 * lz)
        glint = np.maximum((nx * lx + ny * ly + nz * (lz + 1.0)) / norm, 0.0)
        glint = glint * glint * glint * glint
        glint = glint * glint * glint * glint * gloss
        lit = base * shade[..., None] + glint[..., None]
        rest = 1.0 - alpha
        self.colour[region] = self.colour[region] * rest[..., None] + lit * alpha[..., None]
        self.alpha[region] = self.alpha[region] * rest + alpha


def _fur(
    u: FloatArray, v: FloatArray, radius: FloatArray, length: float, noise: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the outline that the hair tips make, and the tone of the hairs."""
    around, along = HAIR_BINS
    turn = ((np.arctan2(v, u) / (2 * math.pi) + 0.5) * around).astype(np.intp) % around
    depth = np.minimum((radius * along / (1.0 + length)).astype(np.intp), along - 1)
    outline: FloatArray = 1.0 + length * noise[turn, along - 1]
    tone: FloatArray = 0.7 + 0.6 * noise[turn, depth]
    return outline, tone


def blur(array: FloatArray, radius: float) -> FloatArray:
    """Blur an array `(height, width, channels)` in [0, 1] by a Gaussian of `radius` pixels."""
    # Pillow blurs bytes only; their steps vanish in the noise that the picture gets later.
    levels = (np.clip(array, 0.0, 1.0) * np.float32(255.0)).astype(np.uint8)
    gauss = ImageFilter.GaussianBlur(radius)
    planes = [
        np.asarray(Image.fromarray(levels[..., channel]).filter(gauss))
        for channel in range(levels.shape[2])
    ]
    return np.stack(planes, axis=2).astype(np.float32) / np.float32(255.0)


def pick_colour(rng: np.random.Generator, colours: Sequence[tuple[float, float, float]]) -> Colour:
    """Return one of the colours, made a little lighter or darker."""
    colour = np.asarray(colours[int(rng.integers(len(colours)))], dtype=np.float32)
    return colour * np.float32(rng.uniform(0.75, 1.2))
