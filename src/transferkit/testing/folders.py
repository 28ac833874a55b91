"""A maker of small picture folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from transferkit._files import make_folder

_COLORS = {"blue": (40, 60, 200), "red": (200, 50, 40)}


def make_image_folder(
    root: str | os.PathLike[str],
    *,
    class_names: Sequence[str] = ("blue", "red"),
    num_train: int = 8,
    num_val: int = 4,
    size: tuple[int, int] = (40, 32),
    seed: int = 0,
) -> Path:
    """Write a small folder of easy pictures: each class has a colour of its own.

    Args:
        root: Where to write; created if it is not there.
        class_names: The names of the classes.
        num_train: Training pictures of each class.
        num_val: Validation pictures of each class.
        size: Width and height in pixels.
        seed: Rules the noise, and the colours of classes other than "blue" and "red".

    Returns:
        The root.

    Raises:
        OutputError: The folder cannot be written.

    Example:
        >>> import tempfile
        >>> root = make_image_folder(tempfile.mkdtemp(), num_train=2, num_val=1)
        >>> len(sorted(root.rglob("*.png")))
        6
    """
    rng = np.random.default_rng(seed)
    for split, count in (("train", num_train), ("val", num_val)):
        for name in class_names:
            folder = make_folder(Path(root, split, name))
            own = np.random.default_rng((seed, *name.encode())).integers(0, 256, 3)
            color = np.asarray(_COLORS.get(name, own))
            for index in range(count):
                noise = rng.normal(0, 25, (size[1], size[0], 3))
                pixels = np.clip(color + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return Path(root)
