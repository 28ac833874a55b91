"""One picture: from bytes to pixels, and from pixels to what a network takes.

`decode_image` is the one place where bytes become pixels. `Preprocess` is the description
of the deterministic way from pixels to the network's input, and augmentation presets are
the random way. This room imports nothing of the package but the
errors and the private modules that are open to all.
"""

from transferkit.images.augment import (
    Augmentation,
    list_augmentations,
    make_augmentation,
)
from transferkit.images.decode import SUPPORTED_FORMATS, ImageSource, decode_image
from transferkit.images.preprocess import Preprocess, Transform

__all__ = [
    "SUPPORTED_FORMATS",
    "Augmentation",
    "ImageSource",
    "Preprocess",
    "Transform",
    "decode_image",
    "list_augmentations",
    "make_augmentation",
]
