"""What pictures may come as: folders, patterns and iterables, and pixels in other layouts."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from transferkit.data import ImageDataset
from transferkit.data.folders import find_images
from transferkit.errors import ConfigError, DataError, ImageError
from transferkit.images import ImageSource, Preprocess, decode_image
from transferkit.images.decode import read_stream

# A path object has one slash where the text had two.
_SCHEMES = ("http:/", "https:/", "ftp:/", "s3:/", "gs:/")


def find_sources(images: Any) -> tuple[Iterator[ImageSource], int | None]:
    """Return the pictures that something stands for, and how many there are where it is known.

    Args:
        images: A folder, whose pictures are found at any depth and sorted by path; a file; a
            glob pattern; or an iterable, such as a list, a generator or a column of a table.

    Raises:
        DataError: A folder holds no pictures, or nothing is there.
        ConfigError: It is something else.
    """
    if isinstance(images, (str, os.PathLike)):
        paths = find_files(images)
        return iter(paths), len(paths)
    # What would iterate over its lines, its keys or the names of its columns.
    others = hasattr(images, "read") or isinstance(images, Mapping) or hasattr(images, "columns")
    single = isinstance(images, (bytes, bytearray, memoryview, Tensor, np.ndarray, Image.Image))
    if single or others or not isinstance(images, Iterable):
        raise ConfigError(
            f"`images` should be a folder, a glob pattern or an iterable of pictures, found "
            f"{type(images).__name__}. Put one picture into a list; of a table pass the column."
        )
    return iter(images), len(images) if isinstance(images, Sized) else None


class PicturesOf:
    """The pictures of a data set, as an iterable that knows its length.

    Args:
        data: The data set. Where it decodes in its own way, it does so here.
    """

    def __init__(self, data: ImageDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[ImageSource]:
        data = self._data
        # By number: sequences of users need not say where they end.
        for index in range(len(data)):
            picture = data.images[index]
            yield picture if data.decode is decode_image else data.decode(picture)


def find_files(images: str | os.PathLike[str]) -> list[Path]:
    """Return the paths that a folder, a file or a glob pattern stands for.

    Raises:
        DataError: A folder holds no pictures, or nothing is there.
        ConfigError: It is the address of something in a network.
    """
    if is_url(images):
        raise ConfigError(explain_url(images))
    path = Path(images)
    if path.is_dir():
        return list(find_images(path))
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise DataError(f"`{path}` does not exist. Expected a folder, a picture or a glob pattern.")
    # `Path.glob` takes no pattern that begins at the root.
    found = sorted(Path(each) for each in glob.glob(str(path), recursive=True))  # noqa: PTH207
    files = [each for each in found if not each.is_dir()]
    if not files:
        raise DataError(f"No file fits the pattern `{path}`.")
    return files


def is_url(source: object) -> bool:
    """Tell whether something is a text with the address of something in a network."""
    return isinstance(source, (str, Path)) and str(source).lower().startswith(_SCHEMES)


def explain_url(source: object) -> str:
    """Return the message about an address in the place of a picture."""
    return (
        f"`{source}` is an address, and nothing is fetched from a network here. Download the "
        f"picture first, and pass its path or bytes."
    )


def to_source(source: Any, num_channels: int) -> ImageSource:
    """Return pixels in the layout and range that `Preprocess.decode` takes; the rest as it is.

    Args:
        source: What `Predictor.predict` takes.
        num_channels: The channels that the model takes.

    Returns:
        An array `(H, W, C)` or a tensor `(C, H, W)` of uint8; anything else unchanged.

    Raises:
        ImageError: It is the address of something in a network, or floats outside [0, 1].
    """
    if is_url(source):
        raise ImageError(explain_url(source))
    if isinstance(source, Tensor):
        source = source.detach().cpu()
        levels = _to_levels(source) if source.is_floating_point() else source
        return levels.permute(2, 0, 1) if _is_swapped(levels.shape, 0, num_channels) else levels
    if isinstance(source, np.ndarray):
        array = source
        if np.issubdtype(array.dtype, np.floating):
            # In this machine's byte order, and no wider than a tensor can be.
            array = _to_levels(torch.from_numpy(array.astype(np.float64, order="C"))).numpy()
        swapped = _is_swapped(array.shape, 2, num_channels)
        return np.ascontiguousarray(array.transpose(1, 2, 0)) if swapped else array
    other: ImageSource = source
    return other


def _is_swapped(shape: tuple[int, ...], place: int, num_channels: int) -> bool:
    """Tell whether the channels stand at the other end than usual, and only there."""
    other = 2 - place
    return len(shape) == 3 and shape[other] == num_channels and shape[place] != num_channels


def _to_levels(values: Tensor) -> Tensor:
    """Return floats in [0, 1] as uint8, rounded to the nearest level."""
    low, high = (float(each) for each in torch.aminmax(values)) if values.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise ImageError(
            f"A picture given as floats should have values in [0, 1], found {low:.4g} to "
            f"{high:.4g}. Divide levels by 255, and leave out the transform that normalised "
            f"them; it is done here."
        )
    return (values.double() * 255).round().to(torch.uint8)


def hold_source(source: Any, preprocess: Preprocess) -> ImageSource:
    """Return what stays as it is when the iterable that gave a picture goes on.

    Whoever yields pictures may close the file, or write the next frame to the same array,
    before a thread comes to read them. Paths and bytes stay what they are.

    Args:
        source: What `Predictor.predict` takes.
        preprocess: How pictures are decoded.

    Raises:
        ImageError: It cannot be read as a picture.
    """
    if isinstance(source, (str, bytes, os.PathLike)):
        return source
    if hasattr(source, "read") and not isinstance(source, Image.Image):
        data, name = read_stream(source)
        file = io.BytesIO(data)
        file.name = name  # For messages.
        return file
    # A tensor shares its memory with the caller's.
    return preprocess.decode(to_source(source, preprocess.num_channels)).clone()
