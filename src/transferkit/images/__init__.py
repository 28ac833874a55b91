"""One picture: from bytes to pixels, and from pixels to what a network takes.

`decode_image` is the one place where bytes become pixels. `Preprocess` is the description
of the deterministic way from pixels to the network's input, and augmentation presets are
the random way. This room imports nothing of the package but the
errors and the private modules that are open to all.
"""

from transferkit.images._headers import SUPPORTED_FORMATS
from transferkit.images.augment import (
    Augmentation,
    list_augmentations,
    make_augmentation,
)
from transferkit.images.decode import MAX_PIXELS, Decoder, ImageSource, decode_image
from transferkit.images.preprocess import Preprocess, Transform
from transferkit.images.seedable import is_seedable

__all__ = [
    "MAX_PIXELS",
    "SUPPORTED_FORMATS",
    "Augmentation",
    "Decoder",
    "ImageSource",
    "Preprocess",
    "Transform",
    "decode_image",
    "is_seedable",
    "list_augmentations",
    "make_augmentation",
]
