"""One picture: from bytes to pixels, and from pixels to what a network takes.

`decode_image` is the one place where bytes become pixels. `Preprocess` is the description
of the deterministic way from pixels to the network's input, augmentation presets are
the random way, and batch augmentations mix the pictures of a batch. This room imports
nothing of the package but the errors and the private modules that are open to all.
"""

from transferkit.images._headers import SUPPORTED_FORMATS
from transferkit.images.augment import (
    Augmentation,
    describe_augmentation,
    list_augmentations,
    make_augmentation,
)
from transferkit.images.batch_augment import (
    BatchAugmentation,
    list_batch_augmentations,
    make_batch_augmentation,
)
from transferkit.images.decode import MAX_PIXELS, Decoder, ImageSource, decode_image
from transferkit.images.preprocess import Preprocess, Transform
from transferkit.images.seedable import is_seedable

__all__ = [
    "MAX_PIXELS",
    "SUPPORTED_FORMATS",
    "Augmentation",
    "BatchAugmentation",
    "Decoder",
    "ImageSource",
    "Preprocess",
    "Transform",
    "decode_image",
    "describe_augmentation",
    "is_seedable",
    "list_augmentations",
    "list_batch_augmentations",
    "make_augmentation",
    "make_batch_augmentation",
]
