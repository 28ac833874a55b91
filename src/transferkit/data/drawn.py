"""Drawn pictures of ants and bees: a small data set that needs no download.

The pictures are painted from a seed and stand in for photographs in tests, examples and
measurements. Ants and bees share surroundings, body colours, sizes and light, so that the
shape of the animal is what tells the classes apart.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from transferkit._files import make_folder
from transferkit._seeding import check_seed
from transferkit.data._insects import Frame, paint_insect
from transferkit.data._painting import FloatArray, Layer, Light
from transferkit.data._scenery import FOREGROUND_SHARE, lay, paint_foreground, paint_ground
from transferkit.errors import DataError

CLASS_NAMES = ("ants", "bees")
SPLITS = ("train", "val", "test")
DEFAULT_COUNTS: Mapping[str, Mapping[str, int]] = {
    "train": {"ants": 123, "bees": 121},
    "val": {"ants": 70, "bees": 83},
}
JPEG_QUALITY = 90

SIDES = (300, 500)
"""Smallest and largest side of a picture, in pixels."""

INSECT_SIZES = (0.32, 1.0)
"""Length of a body relative to the shorter side of the picture."""

INSECT_BLUR = 0.018
"""Strongest blur of an insect relative to its length; most are much sharper."""

EXPOSURES = (0.7, 1.3)
SENSOR_NOISE = (0.005, 0.05)


def draw_picture(class_name: str, *, seed: int) -> Image.Image:
    """Draw one picture of an ant or a bee.

    Args:
        class_name: "ants" or "bees".
        seed: An integer in [0, 2**32 - 1] that rules everything in the picture; the global
            random state is neither used nor changed.

    Returns:
        The picture, mode RGB, 300 to 500 pixels at each side.

    Raises:
        DataError: There are no drawn pictures of the class.
        ConfigError: The seed is out of range.

    Example:
        >>> picture = draw_picture("ants", seed=3)
        >>> picture.mode, 300 <= min(picture.size), max(picture.size) <= 500
        ('RGB', True, True)
    """
    number = _class_number(class_name)
    # The second number is that of no split, so that the picture is in no written data set.
    return _draw(class_name, np.random.default_rng((check_seed(seed), len(SPLITS), number)))


def write_drawn_pictures(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    counts: Mapping[str, Mapping[str, int]] | None = None,
) -> Path:
    """Write a data set of drawn pictures as `root/split/class/number.jpg`.

    The pictures are drawn into a temporary folder beside `root`, which takes its name at
    the end, so that a stop in the middle leaves no part of a data set. A picture depends on
    the seed, its split, class and number alone: no two splits share one, and smaller counts
    give the first pictures of larger ones.

    Args:
        root: The folder to make. Its parents are made as needed.
        seed: An integer in [0, 2**32 - 1] that rules all pictures.
        counts: Number of pictures by split ("train", "val", "test") and class ("ants",
            "bees"). None gives train 123 ants and 121 bees, val 70 ants and 83 bees.

    Returns:
        The folder `root`.

    Raises:
        DataError: `root` is a file or a folder with something in it, or `counts` names an
            unknown split or class, or a count is negative.
        ConfigError: The seed is out of range.
        OutputError: The folder of `root` cannot be made or written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     counts = {"train": {"ants": 1, "bees": 1}}
        ...     root = write_drawn_pictures(Path(folder, "insects"), seed=1, counts=counts)
        ...     [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.jpg"))]
        ['train/ants/000.jpg', 'train/bees/000.jpg']
    """
    root = Path(root)
    counts = DEFAULT_COUNTS if counts is None else counts
    check_seed(seed)
    _check_counts(counts)
    _check_free(root)
    parent = make_folder(root.parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{root.name}.") as temporary:
        drawing = Path(temporary, "pictures")
        drawing.mkdir()
        for split, classes in counts.items():
            for class_name, count in classes.items():
                folder = drawing / split / class_name
                folder.mkdir(parents=True)
                entropy = (seed, SPLITS.index(split), _class_number(class_name))
                for index in range(count):
                    picture = _draw(class_name, np.random.default_rng((*entropy, index)))
                    picture.save(folder / f"{index:03d}.jpg", quality=JPEG_QUALITY)
        if root.exists():
            # An empty folder: not every system renames over one.
            root.rmdir()
        drawing.rename(root)
    return root


def _class_number(class_name: str) -> int:
    if class_name not in CLASS_NAMES:
        raise DataError(
            f"Unknown class `{class_name}`. Drawn pictures exist for `ants` and `bees`."
        )
    return CLASS_NAMES.index(class_name)


def _check_counts(counts: Mapping[str, Mapping[str, int]]) -> None:
    for split, classes in counts.items():
        if split not in SPLITS:
            raise DataError(
                f"Unknown split `{split}`. Drawn pictures exist for `train`, `val` and `test`."
            )
        for class_name, count in classes.items():
            _class_number(class_name)
            if count < 0:
                raise DataError(
                    f"The count of `{class_name}` in `{split}` should be 0 or more, found {count}."
                )


def _check_free(root: Path) -> None:
    if root.is_dir():
        if any(root.iterdir()):
            raise DataError(
                f"The folder `{root}` exists and is not empty. Drawn pictures are written into "
                f"a new folder: remove it or choose another one."
            )
    elif root.exists():
        raise DataError(
            f"`{root}` is a file. Drawn pictures are written into a new folder: "
            f"choose another name."
        )


def _draw(class_name: str, rng: np.random.Generator) -> Image.Image:
    """Draw one picture; everything but the insect is drawn alike for both classes."""
    width, height = (int(side) for side in rng.integers(SIDES[0], SIDES[1] + 1, size=2))
    slant = rng.uniform(0.35, 0.95)
    around = rng.uniform(0.0, 2 * math.pi)
    direction = (math.cos(around) * slant, math.sin(around) * slant, math.sqrt(1 - slant * slant))
    light = Light(direction, ambient=rng.uniform(0.25, 0.6))
    frame = _place(Layer(width, height, light), rng)
    scene = paint_ground(width, height, light, frame.origin, rng)
    insect_rng, camera_rng = rng.spawn(2)
    paint_insect(class_name, frame, insect_rng)
    return _photograph(scene, frame, camera_rng)


def _place(layer: Layer, rng: np.random.Generator) -> Frame:
    """Choose size, position and direction of the insect."""
    height, width = layer.alpha.shape
    scale = min(width, height) * rng.uniform(*INSECT_SIZES)
    # Small ones may lie far from the middle, large ones would be cut off.
    play = 0.3 * (1.3 - scale / min(width, height))
    origin = (
        width * (0.5 + rng.uniform(-play, play)),
        height * (0.5 + rng.uniform(-play, play)),
    )
    mirror = 1 if rng.random() < 0.5 else -1
    return Frame(layer, origin, scale, rng.uniform(0.0, 2 * math.pi), mirror)


def _photograph(scene: FloatArray, frame: Frame, rng: np.random.Generator) -> Image.Image:
    """Lay the insect with its shadow over the scene and take the picture."""
    insect = frame.layer
    insect.defocus(rng.uniform(0.0, 1.0) ** 4 * INSECT_BLUR * frame.scale)
    scene = lay(scene, insect, frame.scale * rng.uniform(0.03, 0.1), rng.uniform(0.3, 0.7))
    if rng.random() < FOREGROUND_SHARE:
        scene = lay(scene, paint_foreground(insect, rng), 0.0, 0.0)
    warmth, exposure = rng.normal(0.0, 0.06), rng.uniform(*EXPOSURES)
    tint = np.asarray((1.0 + warmth, 1.0, 1.0 - warmth), dtype=np.float32) * exposure
    scene = np.maximum(scene * tint, 0.0) ** np.float32(rng.uniform(0.8, 1.2))
    rows, columns = scene.shape[:2]
    y = np.linspace(-1.0, 1.0, rows, dtype=np.float32)[:, None]
    x = np.linspace(-1.0, 1.0, columns, dtype=np.float32)[None, :]
    scene *= (1.0 - rng.uniform(0.0, 0.25) * (x * x + y * y))[..., None]
    noise = rng.standard_normal(scene.shape, dtype=np.float32)
    scene += noise * np.float32(rng.uniform(*SENSOR_NOISE))
    return Image.fromarray((np.clip(scene, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8))
