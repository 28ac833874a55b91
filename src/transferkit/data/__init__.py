"""Many pictures: folders, class names, splits, and the order in which they are seen.

Class indices come from the sorted class names of the training split and are pinned by name
in every other split. Order and augmentation are pure functions of (seed, epoch, index).
This room may import `images` and what lies below.
"""

from transferkit.data import ants_bees
from transferkit.data.dataset import ImageDataset, ImageSplits, SkippedFile
from transferkit.data.folders import load_folders
from transferkit.data.loader import ImageLoader
from transferkit.data.reading import Batch
from transferkit.data.sampling import class_weights

__all__ = [
    "Batch",
    "ImageDataset",
    "ImageLoader",
    "ImageSplits",
    "SkippedFile",
    "ants_bees",
    "class_weights",
    "load_folders",
]
