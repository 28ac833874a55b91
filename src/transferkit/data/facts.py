"""What there is to know about one file, and reading it for many files in threads."""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from transferkit.data.hashing import PictureHash, perceptual_hash
from transferkit.data.workers import start_threads
from transferkit.errors import ImageError
from transferkit.images import SUPPORTED_FORMATS, decode_image

_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
_ORIENTATION_TAG = 0x0112
_NUM_AHEAD = 8


@dataclass(frozen=True)
class Facts:
    """What there is to know about one file.

    Args:
        path: The file.
        split: Its split.
        label: Its class.
        problem: Why it cannot be read; None where it can. The rest is then empty.
        digest: A digest of its bytes.
        width: Width in pixels, upright.
        height: Height in pixels, upright.
        kind: Its format by content.
        mode: Pillow's name for how pixels are stored.
        is_rotated: Whether its EXIF data turn or mirror it.
        num_frames: How many pictures it holds.
        hash: Its perceptual hash; None for a picture of one colour.
    """

    path: Path
    split: str
    label: str
    problem: str | None = None
    digest: bytes = b""
    width: int = 0
    height: int = 0
    kind: str = ""
    mode: str = ""
    is_rotated: bool = False
    num_frames: int = 1
    hash: PictureHash | None = None

    @property
    def is_named_rightly(self) -> bool:
        """Whether the extension is one of the format's."""
        return self.path.suffix.lower() in _EXTENSIONS[self.kind]

    def oddities(self, min_side: int, max_proportion: int) -> list[str]:
        """Return what may surprise about it, in words that follow "3 files"."""
        found = []
        if self.is_rotated:
            found.append("turned upright by EXIF data")
        if self.mode not in ("RGB", "L", "P"):
            found.append(f"of the mode {self.mode}, converted to RGB")
        if self.num_frames > 1:
            found.append("with several frames, of which the first is taken")
        short, long = sorted((self.width, self.height))
        if short < min_side:
            found.append(f"with a side under {min_side} pixels")
        if long > max_proportion * short:
            found.append(f"over {max_proportion} times as long as wide, seen in the middle only")
        return found


def read_facts(
    files: Sequence[tuple[Path, str, str]], *, num_workers: int, max_pixels: int
) -> Iterator[Facts]:
    """Read files, each with its split and label, in their order.

    Args:
        files: Paths with split and label.
        num_workers: Threads; 0 reads in the calling one.
        max_pixels: Larger pictures count as broken.

    Yields:
        The facts of each file. Pixels are forgotten as soon as they were looked at.
    """
    if not num_workers:
        yield from (_read(*file, max_pixels) for file in files)
        return
    pool = start_threads(num_workers)
    try:
        yield from _ahead(pool, files, num_workers * _NUM_AHEAD, max_pixels)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ahead(
    pool: ThreadPoolExecutor,
    files: Iterable[tuple[Path, str, str]],
    num_ahead: int,
    max_pixels: int,
) -> Iterator[Facts]:
    pending: deque[Future[Facts]] = deque()
    for file in files:
        pending.append(pool.submit(_read, *file, max_pixels))
        if len(pending) > num_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _read(path: Path, split: str, label: str, max_pixels: int) -> Facts:
    try:
        pixels = decode_image(path, max_pixels=max_pixels)
        data = path.read_bytes()
    except ImageError as error:
        return Facts(path, split, label, problem=str(error))
    except OSError as error:  # Gone or changed since it was decoded.
        return Facts(path, split, label, problem=f"Cannot read the picture `{path}`: {error}.")
    kind, mode, is_rotated, num_frames = _read_header(data)
    return Facts(
        path,
        split,
        label,
        digest=hashlib.blake2b(data, digest_size=16).digest(),
        width=pixels.shape[2],
        height=pixels.shape[1],
        kind=kind,
        mode=mode,
        is_rotated=is_rotated,
        num_frames=num_frames,
        hash=perceptual_hash(pixels),
    )


def _read_header(data: bytes) -> tuple[str, str, bool, int]:
    """Return format, mode, whether it is rotated, and the number of frames."""
    with Image.open(io.BytesIO(data), formats=SUPPORTED_FORMATS) as image:
        try:
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        except Exception:  # Malformed EXIF data, which decoding ignores.
            orientation = 1
        frames = int(getattr(image, "n_frames", 1)) if image.format != "MPO" else 1
        kind = "JPEG" if image.format == "MPO" else str(image.format)
        return kind, image.mode, orientation in range(2, 9), frames
